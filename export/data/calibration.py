"""Tokens to calibrate on: a person's text, or text that the model writes itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headfold.export.data.token_data import tokenize
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter
from headfold.runtime.errors import DataError

TOKENS, LENGTH = 8192, 256  # by default: tokens in all, and of each sequence


def calibration_tokens(
    tokenizer: bytes | None,
    decoder: Decoder,
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
        length: tokens of each sequence, at most the decoder's capacity.
        seed: of the model's own text.
        reporter: told what goes on.

    Raises:
        DataError: see `tokenize`; or less data than one sequence.
    """
    reporter = reporter or Reporter(quiet=True)
    length = min(length, decoder.capacity)
    rows = max(count // length, 1)
    if data:
        text = tokenize(data, tokenizer, decoder.config, reporter)
        if not text.windows(length):
            raise DataError(
                f"{len(text)} tokens are less than a sequence of {length} to calibrate on",
                where=", ".join(data),
                fix="Give more text, or a shorter --calibration-length.",
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
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens = torch.cat((tokens, chosen), 1)
                advance(1)
    return tokens
