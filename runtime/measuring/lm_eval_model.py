"""headfold as a model of lm-eval, named "headfold" once this is imported; `headfold lm-eval` does so and runs lm-eval's own command.

Requests become tokens as lm-eval's own transformers model makes them, so both can be compared item by item.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headfold.runtime import load
from headfold.runtime.errors import InputError

_NEW_TOKENS = 256  # of an answer, where a task says nothing: as lm-eval's other models have it
_TOGETHER = 256  # answers that are asked for at once
_OURS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")  # of what a task may ask of sampling
_Tokens = tuple[Any, list[int], list[int]]  # what it was made of, context, continuation


class HeadfoldLM(TemplateLM):  # type: ignore[misc]  # the base is Any
    """`--model_args bundle=PATH,…`.

    Args:
        bundle: the bundle's directory.
        backend: see `headfold.runtime.load`, as for the next two.
        provider: of ONNX Runtime.
        threads: of the CPU provider.
        max_length: tokens of a prompt and its answer; by default the bundle's capacity.
        add_bos_token: whether the beginning-of-sequence token is put first; by default as the tokenizer has it.
        batch_size: has no effect, nor have the others that lm-eval gives every model: headfold batches by itself.
    """

    def __init__(
        self,
        bundle: str,
        backend: Any = "onnxruntime",
        provider: str = "cpu",
        threads: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.model = load(bundle, backend=backend, provider=provider, threads=threads)
        self._max_length, self._add_bos_token = max_length or self.model.capacity, add_bos_token
        self._bos, self._eos = self.model.special_token("bos_token"), self.model.special_token("eos_token")

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self._max_length

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        if self._eos is not None:
            return self._eos
        if not self.model.eos_token_ids:
            raise InputError(
                "the bundle names no end-of-sequence token", where=self.model.bundle, fix="Export it with one."
            )
        return min(self.model.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without context."""
        return self.eot_token_id if self._bos is None else self._bos

    @property
    def tokenizer_name(self) -> str:
        """Names what prompts are made with, for lm-eval's caches."""
        return str(self.model.bundle.absolute())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """See TemplateLM."""
        tokenizer = self.model.tokenizer
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        beginning = tokenizer.id_to_token(self.prefix_token_id)
        if add_special_tokens is None and beginning and string.startswith(beginning):
            special = False
        return list(tokenizer.encode(string, add_special_tokens=special is not False).ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See LM."""
        if not add_generation_prompt:
            raise InputError("headfold cannot go on with an assistant's message", fix="Leave --gen_prefix out.")
        return self.model.chat_prompt(chat_history)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See LM."""
        sums = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            sums.append(sum(score for score, _ in self._scores([(None, *make_disjoint_window(w)) for w in windows])))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See LM; what is asked for at once is decoded together."""
        answers: list[str] = []
        for begin in range(0, len(requests), _TOGETHER):
            block = requests[begin : begin + _TOGETHER]
            for request, stream in zip(block, [self._generate(*request.args) for request in block], strict=True):
                answers.append("".join(delta.text for delta in stream))
                self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _generate(self, context: str, options: dict[str, Any]) -> Any:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, _NEW_TOKENS))
        new = wanted["max_gen_toks"]
        if new >= self.max_length:
            raise InputError(
                f"{new} new tokens leave no room for a prompt in {self.max_length}", fix="Ask for fewer: max_gen_toks."
            )
        return self.model.generate(
            self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id],
            stream=True,
            max_new_tokens=new,
            stop=[text for text in wanted["until"] if text],
            **{name: wanted[name] for name in _OURS if name in wanted},
        )

    def _loglikelihood_tokens(self, requests: list[_Tokens], **_: Any) -> list[tuple[float, bool]]:
        answers = []
        for request, answer in zip(requests, self._scores(requests), strict=True):
            answers.append(answer)
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _scores(self, requests: Sequence[_Tokens]) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what greedy decoding gives."""
        answers = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            scores = self.model.score(ids, len(ids) - len(continuation))
            answers.append((float(scores.logprobs.sum()), bool(scores.likeliest.all())))
        return answers


if "headfold" not in model_registry:  # a module may be imported anew
    model_registry.register("headfold")(HeadfoldLM)
