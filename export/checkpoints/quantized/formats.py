"""Which format `quantization_config` names, and the tensors that a directory has by it. What is not in the table is refused by name."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from headfold.export.checkpoints.directories.stored import FLOATS, Source, Stored
from headfold.export.checkpoints.quantized.awq import AWQ
from headfold.export.checkpoints.quantized.compressed_tensors import CompressedTensors
from headfold.export.checkpoints.quantized.fp8 import FP8
from headfold.export.checkpoints.quantized.gptq import GPTQ
from headfold.export.checkpoints.quantized.mxfp4 import MXFP4
from headfold.export.checkpoints.quantized.parts import Format, Parts
from headfold.runtime.errors import CheckpointError, ConfigError

FORMATS: dict[str, type[GPTQ] | type[AWQ] | type[CompressedTensors] | type[FP8] | type[MXFP4]] = {  # by quant_method
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "fp8": FP8,
    "mxfp4": MXFP4,
}
_OF_ACTIVATIONS = re.compile(
    r"\.(input|output)_(scale|zero_point)$|\.activation_scale$|(^|\.)[qkv]_(scale|zero_point)$"
)


def format_of(settings: object, where: object) -> Format:
    """The format that a `quantization_config` names.

    Raises:
        ConfigError: headfold does not read it, or not with these settings.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if not isinstance(method, str) or method not in FORMATS:
        raise ConfigError(
            f"its weights are quantized ({method or 'quantization_config names no quant_method'}), which headfold does not read",
            where=where,
            fix=f"headfold reads {', '.join(FORMATS)}: take one of those, or the unquantized one.",
        )
    try:
        return FORMATS[method].model_validate(settings)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f" {first['input']!r}"
        raise ConfigError(
            f"its weights are quantized ({method}) with {field}{value}: {first['msg']}",
            where=where,
            fix="headfold does not read that: take another one, or the unquantized one.",
        ) from error


def left_over(settings: object, stored: Mapping[str, Stored]) -> bool:
    """Whether a `quantization_config` is of no tensor: all are plain floats, as whoever dequantizes them may leave them.

    Not of bitnet, whose floats are rounded as the model runs.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return method != "bitnet" and all(tensor.kind in FLOATS for tensor in stored.values())


def dequantized(format_: Format, stored: Mapping[str, Stored]) -> tuple[dict[str, Source], list[str]]:
    """The tensors, and the names of those that are for quantizing activations, which nothing here does.

    What has scales of the format is made of its parts, the rest is as it is stored.

    Raises:
        CheckpointError: parts are missing, or do not fit together.
    """
    ignored = [name for name in stored if _OF_ACTIVATIONS.search(name)]
    tensors: dict[str, Source] = {name: tensor for name, tensor in stored.items() if name not in set(ignored)}
    suffixes = (*format_.values, *format_.scales, *format_.others)

    def parts_of(base: str) -> Parts:
        found = {suffix: stored[base + suffix] for suffix in suffixes if base + suffix in stored}
        return Parts(base + format_.target, found)

    for scale in stored:
        for base in (scale.removesuffix(suffix) for suffix in format_.scales if scale.endswith(suffix)):
            parts = parts_of(base)
            if any(suffix in parts for suffix in format_.values):
                source = format_.source(parts)
                if parts.name in stored and format_.target not in parts:
                    raise CheckpointError(
                        f"has tensor {parts.name} twice, quantized and as it is",
                        where=stored[parts.name].file,
                        fix="Delete the one that is not meant.",
                    )
                for suffix in parts.stored:
                    tensors.pop(base + suffix, None)
                tensors[parts.name] = source
    named = [suffix for suffix in suffixes if suffix not in ("", format_.target)]  # what no plain tensor's name ends in
    for name, tensor in tensors.items():
        end = next((suffix for suffix in named if name.endswith(suffix)), None)
        if end is not None and isinstance(tensor, Stored) and tensor.kind not in FLOATS:  # so it is part of nothing
            parts = parts_of(name.removesuffix(end))
            parts[(format_.scales if any(x in parts for x in format_.values) else format_.values)[0]]  # is not there
    return tensors, ignored
