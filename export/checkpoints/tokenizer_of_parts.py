"""A tokenizer.json from vocab.json and merges.txt, for checkpoints that have only those: byte-level byte-pair encoding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from headfold.export.checkpoints.pre_tokenizers import byte_level
from headfold.runtime.errors import CheckpointError

_CLASSES = {
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
}


def with_tokenizer(files: Mapping[str, bytes], where: Path) -> Mapping[str, bytes]:
    """The files, with a tokenizer.json if they are enough to make one.

    Raises:
        CheckpointError: the parts are damaged, or of a tokenizer class that is cut in a way not known here.
    """
    if "tokenizer.json" in files or not {"vocab.json", "merges.txt"} <= set(files):
        return files
    fix = "Save it with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..) writes a tokenizer.json."
    try:
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        kind = settings.get("tokenizer_class", "GPT2Tokenizer")
        if kind not in _CLASSES:
            raise CheckpointError(f"has no tokenizer.json, and its class is {kind!r}", where=where, fix=fix)
        lines = files["merges.txt"].decode().splitlines()
        pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        merges = [(first, second) for first, _, second in pairs]
        pre = _CLASSES[kind]
        tokenizer = byte_level(json.loads(files["vocab.json"]), merges, pre)
        if settings.get("add_prefix_space") and pre == "gpt-2":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        _add_tokens(tokenizer, settings, files)
    except CheckpointError:
        raise
    except Exception as error:  # of json, of what is no object, or of tokenizers, which raises plain Exception
        raise CheckpointError(f"the parts of its tokenizer make none: {error}", where=where, fix=fix) from error
    return dict(files) | {"tokenizer.json": tokenizer.to_str(pretty=False).encode()}


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """The added tokens in the order of their ids, then the special ones that are named without an id."""
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, Mapping):
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
            token = AddedToken(entry["content"], special=bool(entry.get("special")), **flags)
            (tokenizer.add_special_tokens if entry.get("special") else tokenizer.add_tokens)([token])
    added = json.loads(files.get("added_tokens.json", b"{}"))
    for content, _ in sorted(added.items(), key=lambda item: int(item[1])):
        tokenizer.add_tokens([AddedToken(content, normalized=False)])
    named = [settings.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")]
    contents = [token.get("content") if isinstance(token, Mapping) else token for token in named]
    tokenizer.add_special_tokens(
        [AddedToken(c, special=True, normalized=False) for c in contents if isinstance(c, str)]
    )
