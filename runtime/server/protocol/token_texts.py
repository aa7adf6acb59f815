"""Tokens as text and bytes, for log probabilities: also those that are half a character."""

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from headfold.runtime.scheduling.request import TokenLogprob
from headfold.runtime.server.protocol.responses import ChatLogprobs, CompletionLogprobs, Likely, TokenLogprobs

_HALF = "\ufffd"


class TokenTexts:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token for token, one in added.items() if one.special}
        self.of = lru_cache(1 << 14)(self._of)

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        """Its text, within a text, and its bytes; None where they are not known."""
        once, twice = (self._tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
        text = twice[len(once) :]  # a first token's space is dropped by some decoders
        if _HALF not in text:
            return text, list(text.encode())
        own = self._tokenizer.id_to_token(token) or ""
        if len(own) == 6 and own.startswith("<0x") and own.endswith(">"):  # SentencePiece's bytes
            return text, [int(own[3:5], 16)]
        known = [_BYTES.get(character) for character in own]
        return text, [byte for byte in known if byte is not None] if None not in known else None

    def chat(self, logprobs: list[TokenLogprob]) -> ChatLogprobs:
        """As a chat has them."""
        return ChatLogprobs(
            content=[
                TokenLogprobs(
                    **self._likely(one.token_id, one.logprob).__dict__,
                    top_logprobs=[self._likely(*top) for top in one.top],
                )
                for one in logprobs
            ]
        )

    def completion(self, logprobs: list[TokenLogprob], top: int, offset: int = 0) -> CompletionLogprobs:
        """As a completion has them; the first token's text begins at `offset`."""
        texts, offsets = [self.of(one.token_id)[0] for one in logprobs], list[int]()
        for one, text in zip(logprobs, texts, strict=True):
            offsets.append(offset)
            offset += len(text) if one.token_id not in self._special else 0  # which the answer's text leaves out
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[one.logprob for one in logprobs],
            top_logprobs=[self._by_text(one.top) for one in logprobs] if top else None,
            text_offset=offsets,
        )

    def _by_text(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By their texts; of those with the same one, as halves of characters have it, the likeliest, which comes first."""
        found = dict[str, float]()
        for token, logprob in likeliest:
            found.setdefault(self.of(token)[0], logprob)
        return found

    def _likely(self, token: int, logprob: float) -> Likely:
        text, encoded = self.of(token)
        return Likely(token=text, logprob=logprob, bytes=encoded)


def _byte_characters() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies. Source: Radford et al. 2019 (GPT-2), encoder.py."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
