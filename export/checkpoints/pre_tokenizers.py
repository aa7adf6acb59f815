"""Byte-level byte-pair encoding, and how text is cut before it, by the names that GGUF files have for that (tokenizer.ggml.pre).

The expressions are those of the models' own tokenizer.json.
"""

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_HAN = "[一-龥ࠀ-一가-퟿]+"
_CASED = (  # letters that deepseek-llm knows: those that have a case, but not of every script
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\u0560-\u0588\u10d0-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua790-\ua7ff\uab30-\uab6f"
    "\U00010570-\U000105bc\U00016e40-\U00016e7f\U0001d400-\U0001dfff]]"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _split(*patterns: str) -> PreTokenizer:
    """Cut by one expression after the other; what each finds stands alone."""
    parts: list[PreTokenizer] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(digits: bool) -> PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)  # has GPT-2's regular expression built in
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )


PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": lambda: _gpt2(digits=False),
    "smollm": lambda: _gpt2(digits=True),
    "default": lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),  # llama.cpp's own
    "deepseek-llm": lambda: _split(
        r"[\r\n]",
        rf"\s?{_CASED}+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _HAN,
        r"\p{N}+",
    ),
    "deepseek-coder": lambda: _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"),
    "deepseek-v3": lambda: _split(r"\p{N}{1,3}", r"[一-龥\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), lambda: _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), lambda: _split(_QWEN2)),
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # begin with BOS, and take a word that is a token without merging it
_NFC = ("qwen2", "deepseek-r1-qwen")  # normalize first


def byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], pre: str) -> Tokenizer:
    """The tokenizer of a vocabulary and its merges; `pre` is one of PRE_TOKENIZERS. It has no special tokens yet."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=pre in LLAMA3))
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    return tokenizer
