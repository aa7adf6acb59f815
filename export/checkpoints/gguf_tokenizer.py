"""The tokenizer inside a GGUF file as Hugging Face files: tokenizer.json, tokenizer_config.json, chat template, generation settings."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.model.config import ModelConfig
from headfold.runtime.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF specification
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def _gpt2(digits: bool) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)  # has GPT-2's regular expression built in
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )


# tokenizer.ggml.pre: how text is cut before byte-pair merges; the same expressions as in the models' own tokenizer.json
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _gpt2(digits=False),
    "smollm": lambda: _gpt2(digits=True),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}


def tokenizer_files(path: Path, metadata: Mapping[str, Any], config: ModelConfig) -> TokenizerFiles:
    """Build the files from a GGUF file's metadata; none if it has no tokenizer.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not implemented here.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return TokenizerFiles()
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    fix = "Export from the Hugging Face directory of the model, which has its tokenizer.json."
    if model != "gpt2":
        raise CheckpointError(
            f"tokenizer model {model!r} cannot be read from GGUF, only byte-level BPE", where=path, fix=fix
        )
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"pre-tokenizer {pre!r} is unknown; known are {', '.join(PRE_TOKENIZERS)}", where=path, fix=fix
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=False)
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata, tokens)
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in {_CONTROL, _USER_DEFINED}]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in added if kind == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == _USER_DEFINED])
    return TokenizerFiles(_files(tokenizer, metadata, tokens, config))


def _post_processor(metadata: Mapping[str, Any], tokens: list[str]) -> processors.PostProcessor:
    """Puts the beginning-of-sequence token before a text, if the model wants it."""
    byte_level, bos = processors.ByteLevel(trim_offsets=False), metadata.get("tokenizer.ggml.bos_token_id")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", False):
        return byte_level
    template = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    return processors.Sequence([byte_level, template])


def _files(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], config: ModelConfig
) -> dict[str, bytes]:
    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None else None

    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
    }
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "generation_config.json": _json({k: v for k, v in generation.items() if v not in (None, [])}),
    }
    template = metadata.get("tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = _json({k: v for k, v in settings.items() if v is not None})
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
