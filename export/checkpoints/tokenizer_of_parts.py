"""A tokenizer.json from vocab.json and merges.txt, for checkpoints that have only those: byte-level byte-pair encoding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from headfold.export.checkpoints.pre_tokenizers import byte_level
from headfold.runtime.errors import CheckpointError

_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}  # with Fast behind it or without
_OF_TYPES = {"gpt2": "GPT2Tokenizer"} | dict.fromkeys(
    ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"
)  # where no file names a class; for qwen2 even where one does
_DEFAULT = "<|endoftext|>"  # of both classes
_ROLES = {"qwen2": ("eos", "unk", "pad"), "gpt-2": ("bos", "eos", "unk")}  # that have it
_OTHER_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def with_tokenizer(files: Mapping[str, bytes], config: Mapping[str, Any], where: Path) -> Mapping[str, bytes]:
    """The files, with a tokenizer.json if they are enough to make one; `config` is the model's config.json.

    Raises:
        CheckpointError: the parts are damaged, or of a tokenizer class that is cut in a way not known here.
    """
    if "tokenizer.json" in files or not {"vocab.json", "merges.txt"} <= set(files):
        return files
    fix = "Save it with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..) writes a tokenizer.json."
    try:
        settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        if "added_tokens_decoder" not in settings:  # an older checkpoint
            settings |= json.loads(files.get("special_tokens_map.json", b"{}"))
        kind = _class(settings, config)
        if kind not in _CLASSES:
            said = "nothing names its class" if kind is None else f"its class is {kind!r}"
            raise CheckpointError(f"has no tokenizer.json, and {said}", where=where, fix=fix)
        lines = files["merges.txt"].decode().splitlines()
        pairs = (line.partition(" ") for line in lines if line and not line.startswith("#version"))
        merges = [(first, second) for first, _, second in pairs]
        pre = _CLASSES[kind]
        tokenizer = byte_level(json.loads(files["vocab.json"]), merges, pre)
        if settings.get("add_prefix_space"):
            cut = tokenizer.pre_tokenizer
            (cut[1] if isinstance(cut, pre_tokenizers.Sequence) else cut).add_prefix_space = True
        _add_tokens(tokenizer, settings, files, pre)
        _put_around(tokenizer, settings)
    except CheckpointError:
        raise
    except Exception as error:  # of json, of what is no object, or of tokenizers, which raises plain Exception
        raise CheckpointError(f"the parts of its tokenizer make none: {error}", where=where, fix=fix) from error
    return dict(files) | {"tokenizer.json": tokenizer.to_str(pretty=False).encode()}


def _class(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The class that transformers makes of the parts."""
    model_type = str(config.get("model_type"))
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if model_type == "qwen2" or not named:
        return _OF_TYPES.get(model_type)
    return str(named).removesuffix("Fast")


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], files: Mapping[str, bytes], pre: str) -> None:
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
    named = [settings.get(f"{role}_token", _DEFAULT if role in _ROLES[pre] else None) for role in _OTHER_ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        named += [*more.values()] if isinstance(more, Mapping) else list(more)
    contents = dict.fromkeys(text for text in map(_content, named) if isinstance(text, str))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in contents])


def _put_around(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Tokens that begin and end every text, if the settings want them."""
    asked = {role: settings.get(f"add_{role}_token") for role in ("bos", "eos")}
    around = {role: _content(settings.get(f"{role}_token")) if asked[role] else None for role in asked}
    if not any(around.values()):
        return
    known = [(text, tokenizer.token_to_id(text)) for text in around.values() if text]
    single = [around["bos"], "$A", around["eos"]]
    tokenizer.post_processor = processors.TemplateProcessing(single=list(filter(None, single)), special_tokens=known)


def _content(token: Any) -> Any:
    """A special token is a text, or an object that has it as `content`."""
    return token.get("content") if isinstance(token, Mapping) else token
