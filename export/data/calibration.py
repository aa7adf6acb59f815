"""Tokens to calibrate on: a person's text, or text that the model writes itself; and where a bundle keeps them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from headfold.export.data.token_data import tokenize
from headfold.export.exportables.facts import Facts
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Cache, Output
from headfold.export.progress import Reporter
from headfold.runtime.errors import BundleError, DataError

TOKENS, LENGTH = 8192, 256  # by default: tokens in all, and of each sequence
MOST_TOKENS = 1 << 20  # that may be asked for: the model writes them all at once
CALIBRATION = (
    "calibration.json"  # of a bundle: the tokens that its scales are from, so that a proof can find them again
)
_LARGEST = 1 << 28  # bytes of it


class Model(Protocol):
    """What text is calibrated for, as a `headfold.export.model.decoder.Decoder` is."""

    capacity: int

    @property
    def config(self) -> ModelConfig | Facts:
        """For the size of the vocabulary and the end token."""
        ...

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty one."""
        ...

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache, last_only: bool) -> Output:
        """Go on by some tokens."""
        ...


def calibration_tokens(
    tokenizer: bytes | None,
    decoder: Model,
    data: Sequence[str] = (),
    count: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Tensor:
    """Token ids int64 [N, S] to calibrate on, about `count` of them.

    From `data`, sources as `tokenize` takes them, evenly spread windows. Without, the model writes its own text: sampled at
    temperature 1 from a random first token (Liu et al. 2023, arXiv 2305.17888, section 3.1), which needs no tokenizer and no
    network, and follows the distribution that the model was trained on.

    Args:
        tokenizer: the content of the model's tokenizer.json, which `data` needs.
        decoder: the model.
        data: see above.
        count: tokens in all.
        length: tokens of each sequence, at most the model's capacity.
        seed: of the model's own text.
        reporter: told what goes on.

    Raises:
        DataError: see `tokenize`; less data than one sequence; or a model that computes NaN.
    """
    reporter = reporter or Reporter(quiet=True)
    length = min(length, decoder.capacity)
    rows = max(count // length, 1)
    if data:
        text = tokenize(data, tokenizer, decoder.config, reporter)
        if not text.windows(length):
            raise DataError(
                f"{len(text)} tokens are less than a sequence of {length}, and one behind it, to calibrate on",
                where=", ".join(data),
                fix="Give more text, or take shorter sequences: a smaller --capacity, of convert --calibration-length.",
            )
        return text.spread(rows, length)[:, :-1]
    with reporter.step("write text to calibrate on", length) as advance:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(decoder.config.vocab_size, (rows, 1), generator=generator)  # [N, 1]
        cache = decoder.new_cache(rows, length)
        with torch.inference_mode():
            for step in range(1, length):
                seen = torch.ones(rows, step, dtype=torch.long)
                logits = decoder(tokens[:, -1:], seen, cache, last_only=True).logits[:, -1].float()  # [N, V]
                if not logits.isfinite().all():
                    raise DataError(
                        "the model computes NaN or infinity, so it writes no text to calibrate on",
                        fix="Leave out --kv-cache and --weights, or correct the model.",
                    )
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens = torch.cat((tokens, chosen), 1)
                advance(1)
    return tokens


def together(tokens: Tensor, most: int = 1024) -> tuple[Tensor, ...]:
    """Tokens [N, S], or what goes with them [N, S, ...], as many sequences at a time as have so many tokens: at least one."""
    return torch.split(tokens, max(most // tokens.shape[1], 1))


def write_tokens(tokens: Tensor) -> bytes:
    """Token ids [N, S] as the content of a bundle's `calibration.json`."""
    return json.dumps({"token_ids": tokens.tolist()}).encode()


def read_tokens(path: Path, vocab_size: int, capacity: int) -> Tensor:
    """Token ids [N, S] as `write_tokens` wrote them.

    Raises:
        BundleError: there are none, or they are not the model's, or more in a row than its capacity.
    """
    fix = "Export the bundle again."
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise BundleError("has no tokens that its cache's scales could be from", where=path, fix=fix)
    try:
        tokens = torch.tensor(json.loads(path.read_bytes())["token_ids"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # the last of PyTorch, and of what is nested
        raise BundleError(f"has no token ids: {error}", where=path, fix=fix) from error
    whole = tokens.dtype == torch.long and tokens.ndim == 2 and bool(tokens.numel())
    if not whole or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise BundleError(f"its token ids are not of a vocabulary of {vocab_size}", where=path, fix=fix)
    if tokens.shape[1] > capacity:
        raise BundleError(f"has rows of {tokens.shape[1]} tokens, and a capacity of {capacity}", where=path, fix=fix)
    return tokens
