"""The tokenizer inside a GGUF file as Hugging Face files: tokenizer.json, tokenizer_config.json, chat template, generation settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.checkpoints.gguf.vocabulary import (
    CONTROL,
    USER_DEFINED,
    SpecialTokens,
    Vocabulary,
    sentencepiece_tokenizer,
)
from headfold.export.checkpoints.pre_tokenizers import LLAMA3, PRE_TOKENIZERS, byte_level
from headfold.runtime.errors import CheckpointError


def tokenizer_files(path: Path, metadata: Mapping[str, Any], capacity: int) -> TokenizerFiles:
    """Build the files from a GGUF file's metadata; none if it has no tokenizer. `capacity` is the model's, in tokens.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not implemented here.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return TokenizerFiles()
    vocabulary = Vocabulary.read(metadata, path)
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    fix = "Export from the Hugging Face directory of the model, which has its tokenizer.json."
    if model == "llama":
        tokenizer = sentencepiece_tokenizer(vocabulary, metadata)
        begins = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    elif model != "gpt2":
        raise CheckpointError(
            f"tokenizer model {model!r} cannot be read from GGUF, only byte-level BPE and SentencePiece",
            where=path,
            fix=fix,
        )
    elif pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"pre-tokenizer {pre!r} is unknown; known are {', '.join(PRE_TOKENIZERS)}", where=path, fix=fix
        )
    else:
        tokenizer = _byte_level(vocabulary, metadata, pre)
        begins = bool(metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3))
    special = [token for token, kind in vocabulary if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    users = [token for token, kind in vocabulary if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in users])
    tokens = vocabulary.tokens
    bos = metadata.get("tokenizer.ggml.bos_token_id") if begins else None
    if bos is not None:
        start = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
        present = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([present, start]) if present is not None else start
    return TokenizerFiles(_files(tokenizer, metadata, tokens, capacity))


def _byte_level(vocabulary: Vocabulary, metadata: Mapping[str, Any], pre: str) -> Tokenizer:
    known = {token: i for i, token in enumerate(vocabulary.tokens)}
    pairs = (merge.partition(" ") for merge in metadata.get("tokenizer.ggml.merges", []))
    merges = [(a, b) for a, _, b in pairs if a in known and b in known and a + b in known]  # others merge nothing
    return byte_level(known, merges, pre)


def _files(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], capacity: int) -> dict[str, bytes]:
    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return tokens[index] if index is not None else None

    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": capacity,
        "clean_up_tokenization_spaces": False,
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
    }
    special = SpecialTokens.read(metadata)
    generation = {"bos_token_id": special.bos, "eos_token_id": list(special.ends), "pad_token_id": special.pad}
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
