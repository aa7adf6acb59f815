"""What an engine should be, whether that is possible, and the shapes it must take. Nothing here needs TensorRT.

Profile 0 is prefill, profile 1 decode. All sizes are in tokens, but `max_batch`, which is in sequences, and `workspace`, in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headfold.plugins.attention.schema import Attention
from headfold.plugins.gpus import (
    BFLOAT16_SINCE,
    FLOAT4_SINCE,
    FLOAT8_SINCE,
    RTX_CAPABILITIES,
    RTX_FLOAT32_SINCE,
    RTX_INT4_SINCE,
)
from headfold.plugins.tensorrt_library import Flavour
from headfold.runtime.errors import BuildError
from headfold.runtime.manifest import EngineProfile, Manifest, ShapeRange, WeightsScheme

_MAX_INPUT = 512
# Since which GPU there are such numbers, and what to use before
_SINCE: dict[WeightsScheme, tuple[int, str, WeightsScheme]] = {
    "fp8": (FLOAT8_SINCE, "float8", "int8"),
    "nvfp4": (FLOAT4_SINCE, "float4", "int4"),
    "int4": (RTX_INT4_SINCE, "int4 in TensorRT-RTX", "int8"),
    "mixed": (RTX_INT4_SINCE, "int4 in TensorRT-RTX", "int8"),
}
_ORT = "Run it with ONNX Runtime."


@dataclass(frozen=True)
class BuildOptions:
    """What `headfold build` was asked for."""

    target: Flavour = "tensorrt-rtx"
    attention: Attention = "native"
    compute_capabilities: tuple[int, ...] = ()  # 86 for 8.6; none with full TensorRT, which builds for its own GPU
    max_batch: int = 4
    max_input: int | None = None  # new tokens of one prefill step; by default 512, or the capacity if that is less
    capacity: int | None = None  # by default the bundle's
    weight_streaming: bool = False
    workspace: int | None = None
    timing_cache: Path | None = None
    force: bool = False

    def settle(self, manifest: Manifest) -> tuple[int, int]:
        """Input and capacity, in tokens, with the defaults for this bundle."""
        capacity = self.capacity if self.capacity is not None else manifest.cache.capacity
        return (self.max_input if self.max_input is not None else min(_MAX_INPUT, capacity)), capacity


def check_options(options: BuildOptions, bundle: Path, manifest: Manifest) -> None:
    """Refuse what cannot be built, before any work.

    Raises:
        BuildError: names the option, and what is possible.
    """
    max_input, capacity = options.settle(manifest)
    if not 1 <= capacity <= manifest.cache.capacity:
        raise BuildError(
            f"{capacity} is not 1 to {manifest.cache.capacity}, the positions that the bundle's rotary tables cover",
            where="--capacity",
            fix="Choose fewer, or export with a larger --capacity.",
        )
    if not 1 <= max_input <= capacity:
        raise BuildError(
            f"{max_input} new tokens do not fit a cache of {capacity}",
            where="--max-input",
            fix=f"Choose 1 to {capacity}.",
        )
    check_cache_shapes(manifest.cache.shapes, bundle)
    check_flavour(options, manifest.dtype)
    if manifest.weights is not None:
        check_weights(options, manifest.weights.scheme)
    if manifest.cache.quantization is not None:
        check_cache(options, manifest.cache_dtype)
    if (
        any((e.flavour, e.attention) == (options.target, options.attention) for e in manifest.engines)
        and not options.force
    ):
        raise BuildError(
            f"has a {options.target} engine with {options.attention} attention already",
            where=bundle,
            fix="Replace it with --force.",
        )


def check_cache_shapes(shapes: Sequence[tuple[int, int]], where: Path) -> None:
    """Refuse caches that differ from layer to layer. Raises BuildError."""
    if len(set(shapes)) > 1:
        what = "its layers have caches of different shapes, which headfold's TensorRT session has not"
        raise BuildError(what, where=where, fix=_ORT)


def check_flavour(options: BuildOptions, dtype: str) -> None:
    """Refuse what no bundle of this dtype makes possible: numbers, a timing cache, GPUs. Raises BuildError."""
    if options.max_batch < 1:
        raise BuildError(f"is {options.max_batch}", where="--max-batch", fix="It must be at least 1.")
    if options.workspace is not None and options.workspace < 1:
        raise BuildError(f"is {options.workspace} bytes", where="--workspace", fix="Leave it out for no limit.")
    if options.timing_cache is not None and options.target == "tensorrt-rtx":
        raise BuildError(
            "TensorRT-RTX times nothing when it builds",
            where="--timing-cache",
            fix="Leave it out, or use --target tensorrt.",
        )
    if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
        raise BuildError(
            "is no directory", where=f"--timing-cache: {options.timing_cache.absolute().parent}", fix="Create it first."
        )
    _check_capabilities(options, dtype)


def _check_capabilities(options: BuildOptions, dtype: str) -> None:
    """Refuse GPUs that the flavour does not build for, or that have no arithmetic of this dtype. Raises BuildError."""
    asked = options.compute_capabilities
    if options.target == "tensorrt":
        if asked:
            raise BuildError(
                "full TensorRT builds for the GPU it runs on, and no other",
                where="--sm",
                fix="Leave it out, or use --target tensorrt-rtx.",
            )
        if not torch.cuda.is_available():
            raise BuildError(
                "full TensorRT needs the GPU it builds for, and this machine has none",
                where="--target tensorrt",
                fix="Use --target tensorrt-rtx, or build on the GPU.",
            )
        return
    known = ", ".join(map(str, RTX_CAPABILITIES))
    if not asked:
        raise BuildError(
            "no GPU is named", where="--sm", fix=f"Name compute capabilities, as 86,89; TensorRT-RTX knows {known}."
        )
    for sm in asked:
        if sm not in RTX_CAPABILITIES:
            raise BuildError(
                f"TensorRT-RTX does not build for SM {sm}",
                where="--sm",
                fix=f"It knows {known}; for others build with --target tensorrt on that GPU.",
            )
        if asked.count(sm) > 1:
            raise BuildError(f"{sm} is named twice", where="--sm", fix="Name each once.")
        if sm < {"bfloat16": BFLOAT16_SINCE, "float32": RTX_FLOAT32_SINCE}.get(dtype, sm):
            raise BuildError(
                f"SM {sm} has no {dtype} arithmetic in TensorRT-RTX",
                where="--sm",
                fix="Export the bundle with --dtype float16.",
            )


def check_weights(options: BuildOptions, scheme: WeightsScheme) -> None:
    """Refuse what TensorRT is given in no form, or a GPU has not. Raises BuildError."""
    if scheme == "w8a8":
        raise BuildError(
            "headfold has not in TensorRT: products with rounded inputs",
            where="--weights w8a8",
            fix="Export the bundle with --weights int8.",
        )
    for sm in options.compute_capabilities:
        since, numbers, instead = _SINCE.get(scheme, (sm, "", scheme))
        if sm < since:
            fix = f"Export the bundle with --weights {instead}."
            raise BuildError(f"SM {sm} has no {numbers}", where="--sm", fix=fix)


def check_cache(options: BuildOptions, cache_dtype: str) -> None:
    """Refuse what cannot be done with a quantized cache of this dtype. Raises BuildError."""
    if options.attention == "native":
        raise BuildError(
            f"TensorRT's own attention has no {cache_dtype} cache",
            where="--attention native",
            fix="Use --attention plugin, or export without --kv-cache.",
        )
    for sm in options.compute_capabilities:
        if sm < FLOAT8_SINCE and cache_dtype == "float8_e4m3fn":
            raise BuildError(f"SM {sm} has no float8", where="--sm", fix="Export the bundle with --kv-cache int8.")


def profiles(options: BuildOptions, manifest: Manifest) -> list[EngineProfile]:
    """Prefill of up to `max_input` tokens, and decode of one; batches up to `max_batch`, whatever is in the cache."""
    max_input, capacity = options.settle(manifest)

    def profile(name: str, opt_batch: int, longest: int) -> EngineProfile:
        batches = (1, opt_batch, options.max_batch)
        shapes = {
            "input_ids": _range(*([b, s] for b, s in zip(batches, (1, longest, longest), strict=True))),
            "attention_mask": _range(
                *([b, t] for b, t in zip(batches, (1, max(longest, capacity // 2), capacity), strict=True))
            ),
        }
        for (cache, _), (heads, head_dim) in manifest.cache.tensors.items():
            shapes[cache] = _range(*([b, heads, capacity, head_dim] for b in batches))
        return EngineProfile.model_validate({"name": name, "shapes": shapes})

    return [profile("prefill", 1, max_input), profile("decode", 1, 1)]


def _range(smallest: list[int], usual: list[int], largest: list[int]) -> ShapeRange:
    return ShapeRange(min=smallest, opt=usual, max=largest)
