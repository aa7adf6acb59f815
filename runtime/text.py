"""Text in and out: the bundle's tokenizer and chat template, and turning tokens into text one by one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from headfold.runtime.errors import BundleError, InputError
from headfold.runtime.files.json_file import SETTINGS_BYTES, check_size, read_object
from headfold.runtime.templates.chat_template import ChatTemplate, Messages

Tools = Sequence[Mapping[str, Any]] | None
_TOKENIZER_BYTES = 1 << 27  # the largest that we know, of 262,144 tokens, has 33 MB
_FIX = "Export the bundle again."
_UNFINISHED = "\ufffd"  # what a tokenizer decodes the bytes of half a character to
_SETTLE = 32  # tokens decoded anew with every further one, at most; but see Detokenizer


class Text:
    """Tokenizer and chat template of a bundle. Both may be missing: using a missing one is an InputError."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.settings = _read_json(bundle / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(bundle / "tokenizer.json")
        self._template = self._read_template()

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` can be used."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself.

        Raises:
            InputError: the bundle has none.
        """
        if self._tokenizer is None:
            raise InputError(
                "the bundle has no tokenizer",
                where=self.bundle,
                fix="Give token ids, or export from a checkpoint with one.",
            )
        return self._tokenizer

    def special_token(self, name: str) -> int | None:
        """The id of what the configuration calls `name`, if there is such a token."""
        token = self._special_tokens().get(name)
        return None if token is None or self._tokenizer is None else self._tokenizer.token_to_id(token)

    def check_same_tokens(self, other: "Text") -> None:
        """Raise InputError if another bundle's tokens are not these. Only vocabularies count: guesses are of tokens."""
        own, others = (None if text._tokenizer is None else text._tokenizer.get_vocab() for text in (self, other))
        if own != others:
            raise InputError(
                f"its tokenizer has not the tokens of {self.bundle}",
                where=other.bundle,
                fix="Give a draft that was trained with the same tokenizer.",
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt. tokenizer.json says which special tokens go around it, as in transformers 5."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self, messages: Messages, tools: Tools = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation; the template writes the special tokens itself."""
        prompt = self.chat_prompt(messages, tools=tools, variables=variables)
        return self._encode(prompt, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self.tokenizer
        try:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # of a str that has no UTF-8
            raise InputError("the text holds half a surrogate pair", fix="Decode it as UTF-8.") from error
        except BaseException as error:
            if not _of_tokenizers(error):
                raise
            raise InputError(
                f"the tokenizer refuses the text: {error}", where=self.bundle, fix="Give other text."
            ) from error

    def chat_prompt(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Tools = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text the model was trained on. `variables` are the template's own, as `enable_thinking`.

        Raises:
            InputError: no template, malformed messages or tools, or the template refuses them.
            BundleError: the template takes too much time or memory.
        """
        if self._template is None:
            raise InputError("the bundle has no chat template", where=self.bundle, fix="Give a plain prompt.")
        return self._template.render(messages, add_generation_prompt, tools, variables or {})

    def _read_template(self) -> ChatTemplate | None:
        file, source = self.bundle / "chat_template.jinja", self.settings.get("chat_template")
        if file.is_file():
            source = file.read_bytes().decode(errors="replace")
        entries = source if isinstance(source, list) else [{"name": "default", "template": source}]
        named: dict[str, str] = {}
        for entry in entries:
            match entry:
                case {"name": str(name), "template": str(template)}:
                    named[name] = template
                case {"template": None}:
                    pass
                case _:
                    raise BundleError("its chat template is no text", where=self.bundle, fix=_FIX)
        return ChatTemplate(named, self._special_tokens(), self.bundle) if named else None

    def _special_tokens(self) -> dict[str, str]:
        """Special tokens by name, as transformers 5 finds them: `bos_token`, and whatever else ends in `_token` and is text.

        Older checkpoints have some in special_tokens_map.json alone, which comes first where no list of added tokens tells otherwise.
        """
        older = _read_json(self.bundle / "special_tokens_map.json")
        sources = [older, self.settings] if "added_tokens_decoder" in self.settings else [self.settings, older]
        own = self.settings.get("extra_special_tokens")
        sources += [own] if isinstance(own, dict) else []
        tokens = {name: _content(token) for source in sources for name, token in source.items() if token}
        return {name: token for name, token in tokens.items() if isinstance(token, str) and name.endswith("_token")}


def begun(mark: str, text: str) -> int:
    """How many of a text's last characters may be the beginning of a mark, which is not all there."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


class Detokenizer:
    """Turns one sequence's tokens into text as they come: never half a character, never the beginning of a stop string.

    Tokens are decoded together with the one before them, because a leading space may depend on it; and again with each further
    one, because a character may need several. Once about 32 of them have come and the last one is whole, they are settled.
    (tokenizers has a DecodeStream, which raises an exception for bytes that are no UTF-8; models do write such.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: int | None = None) -> None:
        """`before` is the prompt's last token. `stop` strings are not empty."""
        self._tokenizer, self._stop = tokenizer, stop
        self._set_context([] if before is None or not self._is_whole(before) else [before])
        self._settled = ""  # text of the tokens before `_ids`
        self._sent = 0  # characters that were returned
        self.stopped = False  # a stop string was found; the text ends before it

    def push(self, token: int | None) -> str:
        """Add a token, and return the text that is certain by now; None flushes what was held back at the end."""
        if self.stopped:
            return ""
        if token is not None:
            self._ids.append(token)
        whole = self._settled + self._decode(self._context + self._ids)[self._context_length :]
        if len(self._ids) >= _SETTLE and self._is_whole(self._ids[-1]):
            self._settled = whole
            self._set_context(self._ids[-1:])
        end = len(whole)
        longest = max(map(len, self._stop), default=0)
        found = [at for stop in self._stop if (at := whole.find(stop, max(0, self._sent - longest))) >= 0]
        if found:
            self.stopped, end = True, min(found)
        elif token is not None:
            end = len(whole.rstrip(_UNFINISHED))
            # What was returned begins no stop string: it was held back otherwise
            end -= max((begun(stop, whole[self._sent : end]) for stop in self._stop), default=0)
        new = whole[self._sent : end]
        self._sent += len(new)
        return new

    def _set_context(self, tokens: list[int]) -> None:
        """Begin anew behind these tokens."""
        self._context, self._context_length = tokens, len(self._decode(tokens))  # characters
        self._ids: list[int] = []  # since the context

    def _decode(self, ids: list[int]) -> str:
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
        except BaseException as error:
            if not _of_tokenizers(error):
                raise
            raise BundleError(f"its tokenizer cannot decode: {error}", where="tokenizer.json") from error

    def _is_whole(self, token: int) -> bool:
        """Whether the token is text by itself, so that what follows it can be decoded with it alone."""
        text = self._decode([token])
        return bool(text) and _UNFINISHED not in text


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the bundle, empty if there is no such file. Raises BundleError: it is something else."""
    return read_object(path, SETTINGS_BYTES, BundleError, _FIX) if path.is_file() else {}


def _read_tokenizer(path: Path) -> Tokenizer | None:
    if not path.is_file():
        return None
    check_size(path, _TOKENIZER_BYTES, BundleError, _FIX)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        if not _of_tokenizers(error):
            raise
        raise BundleError(f"is no tokenizer: {error}", where=path, fix=_FIX) from error
    tokenizer.no_truncation()  # settings of its training, which would cut a prompt or pad it
    tokenizer.no_padding()
    return tokenizer


def _of_tokenizers(error: BaseException) -> bool:
    """Whether the tokenizers library raised it: plain Exceptions, and where its Rust panics a BaseException that it does not export."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _content(token: Any) -> Any:
    """A special token is a string, or an object that has it as `content`."""
    return token.get("content") if isinstance(token, dict) else token
