"""Which tensors a Hugging Face directory has, under the decoder's names, whatever tied, base or older checkpoints call or add."""

import re
from collections.abc import Iterable, Mapping

from headfold.export.checkpoints.directories.directory import Directory
from headfold.export.checkpoints.directories.lora import without_adapter
from headfold.export.checkpoints.directories.stored import EMBEDDING, FLOATS, HEAD, Source, Stored
from headfold.export.checkpoints.quantized.parts import Dequantized
from headfold.runtime.errors import CheckpointError

HARMLESS = re.compile(  # what training and serving leave beside the weights, and no forward pass reads
    r"(^|\.)rotary_emb\.[a-z_]+$|^v_head\.|(^|\.)[qkv]_scale$|\.masked_bias$|\.self_attn\.bias$|^value_head\."
)
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|absmax|quant_map|SCB|weight_blocks)$"
)

# Of AutoGPTQ and AutoAWQ, which transformers does not read either
_SETTINGS = ("quantize_config.json", "quant_config.json")


def scan(directory: Directory, expected: Iterable[str], tied: bool) -> tuple[dict[str, Source], list[str]]:
    """Every tensor by the decoder's name; and the names of those that were left aside as harmless.

    Args:
        directory: whose tensors.
        expected: the decoder's names.
        tied: whether head and embedding are one tensor, which may be stored under either name.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is quantized in a way that config.json does not say.
    """
    tensors = directory.tensors
    based = not any(name.startswith("model.") for name in tensors)  # a checkpoint of the model without its head
    wanted, found, ignored = set(expected), dict[str, Source](), list(directory.ignored)
    for name, source in tensors.items():
        ours = f"model.{name}" if based and f"model.{name}" in wanted else name
        if ours not in wanted and ours != HEAD and (HARMLESS.search(name) or adds_nothing(name, tensors)):
            ignored.append(name)
            continue
        found[ours] = _plain(name, source, directory)
    if tied and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    return found, ignored


def adds_nothing(name: str, tensors: Mapping[str, Source]) -> bool:
    """Whether a tensor, of those of a directory, is a bias of zeros, as AutoGPTQ stores beside all weights that it quantizes."""
    if name not in tensors:
        return False
    weight = tensors.get(f"{name.removesuffix('.bias')}.weight")
    of_quantized = name.endswith(".bias") and weight is not None and isinstance(without_adapter(weight), Dequantized)
    return of_quantized and not bool(tensors[name].read().any())


def _plain(name: str, source: Source, directory: Directory) -> Source:
    if not isinstance(source, Stored) or (source.kind in FLOATS and not _QUANTIZED.search(name)):
        return source
    fix = f"headfold reads {', '.join(FLOATS)} alone: take the unquantized one."
    if "quantization_config" in directory.config:
        explains = "its quantization_config does not explain"
    else:
        explains = "no quantization_config of its config.json explains"
        beside = next((file for file in _SETTINGS if (directory.place / file).is_file()), None)
        if beside is not None:
            fix = f'Put what {beside} says into config.json: "quantization_config": {{"quant_method": ..., ...}}.'
    raise CheckpointError(f"tensor {name} is {source.kind}, which {explains}", where=source.file, fix=fix)
