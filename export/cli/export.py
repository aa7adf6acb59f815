"""`headfold export`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from headfold.export.cli.engine import ENGINE, TARGETS, build_and_tell, check_early, engine_options, make_options
from headfold.export.cli.shared import (
    BASE,
    JSON,
    QUIET,
    REMOTE_CODE,
    SOURCE,
    STEPS,
    VIA,
    Range,
    print_json,
    refuse_idle,
    reporter_for,
)
from headfold.plugins.dtypes import FLOATS, QUANTIZED, DType, Quantized

if TYPE_CHECKING:
    from headfold.export.exportables.rounding_record import Method
    from headfold.runtime.manifest import BlockSize, Road, WeightsScheme


@click.command()
@SOURCE
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the bundle to make.")
@click.option(
    "--dtype", type=click.Choice(FLOATS), default="float32", show_default=True, help="Of weights, cache and logits."
)
@click.option(
    "--kv-cache",
    type=click.Choice(list(QUANTIZED)),
    help="Store keys and values in one byte each, with a scale per head. [default: in --dtype]",
)
@click.option(
    "--weights",
    type=click.Choice(["int8", "int4", "mixed", "w8a8", "fp8", "nvfp4"]),
    help="Store weights in eight or four bits, blocks with a scale; embedding and head in eight. mixed: these, too, in four or "
    "eight, or their first rows in eight, by what four cost. w8a8: products of integers, for long prompts. fp8: float8, "
    "for TensorRT since SM 89; nvfp4: float4, since SM 100. What is quantized already keeps its own bits, but in w8a8, fp8 and "
    "nvfp4. [default: in --dtype]",
)
@click.option(
    "--bits",
    type=Range(4, 8),
    help="Of --weights mixed: the average. [default: the fewest that seem to stay within --max-kl]",
)
@click.option(
    "--rounding",
    type=click.Choice(["gptq", "nearest"]),
    help="How weights of four bits are rounded: gptq takes longer and loses less. [default: gptq]",
)
@click.option(
    "--block-size",
    type=click.Choice([32, 64, 128]),
    help="Weights that share a scale, of four or eight bits: more is smaller and faster, and loses more. [default: 32]",
)
@click.option(
    "--max-kl",
    type=Range(min=0, min_open=True),
    help="Most that --weights and --kv-cache may cost: mean KL to the model without them, in nats. [default: 0.1]",
)
@click.option(
    "--data",
    multiple=True,
    help="Text to find the cache's scales, or the cost of --weights on. [default: the model writes its own]",
)
@click.option("--calibration-tokens", type=click.IntRange(min=1), help="How much for the cache. [default: 8192]")
@click.option(
    "--capacity",
    type=int,
    help="Most tokens of a sequence. [default: what the model was made for]",
)
@click.option("--all-logits", is_flag=True, help="Logits of every token, for scoring; not only of the last one.")
@click.option("--hidden-states", is_flag=True, help="Of every token, for embeddings: what the head is given.")
@click.option("--allow-nan", is_flag=True, help="Export weights that hold NaN or infinity.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with PyTorch before publishing.")
@STEPS
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--target", type=click.Choice(TARGETS), help="Build an engine into the bundle, too; see `build`.")
@engine_options
@BASE
@VIA
@REMOTE_CODE
@JSON
@QUIET
def export(
    source: str,
    output: Path,
    dtype: DType,
    kv_cache: Quantized | None,
    weights: "WeightsScheme | None",
    bits: float | None,
    rounding: "Method | None",
    block_size: "BlockSize | None",
    max_kl: float | None,
    data: tuple[str, ...],
    calibration_tokens: int | None,
    capacity: int | None,
    all_logits: bool,
    hidden_states: bool,
    allow_nan: bool,
    verify: bool,
    decode_steps: int,
    force: bool,
    target: str | None,
    base: Path | None,
    via: "Road | None",
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Export CHECKPOINT to a bundle, and prove it equal to PyTorch.

    CHECKPOINT is a Hugging Face directory or hub name (config.json and safetensors, quantized or not), a LoRA adapter's, which is
    merged into its base, or a GGUF file. A bundle that fails the comparison is not written.

    **Examples**

    `headfold export ./SmolLM2-135M-Instruct -o smol`

    `headfold export model.Q4_1.gguf -o smol-fp16 --dtype float16 --capacity 4096`

    `headfold export model.Q4_1.gguf -o smol-fp16 --dtype float16 --target tensorrt-rtx --sm 86,89,120`

    `headfold export model.Q4_1.gguf -o smol-int8 --weights int8 --kv-cache int8 --data corpus.txt`
    """
    from headfold.export.bundle.pipeline import CacheCalibration, ExportOptions, export_bundle
    from headfold.export.bundle.writer import check_output
    from headfold.export.data.calibration import TOKENS
    from headfold.export.exportables.opening import open_exportable
    from headfold.export.parity.rendering import render
    from headfold.export.quantization.gate import MAX_KL
    from headfold.export.quantization.rounding import WeightRounding
    from headfold.plugins.quantized.schema import BLOCK

    refuse_idle(
        kv_cache is None,
        "calibration_tokens",
        why="is for calibrating a quantized cache",
        fix="Add --kv-cache int8.",
    )
    refuse_idle(
        kv_cache is None and weights is None,
        "data",
        why="is for calibrating a quantized cache or rounded weights",
        fix="Add --kv-cache int8, or --weights int8.",
    )
    refuse_idle(
        kv_cache is None and weights is None,
        "max_kl",
        why="is for rounded weights or a quantized cache",
        fix="Add --weights int8, or --kv-cache int8.",
    )
    refuse_idle(weights != "mixed", "bits", why="is for weights of either width", fix="Add --weights mixed.")
    refuse_idle(
        weights not in {"int4", "mixed", "nvfp4"},
        "rounding",
        why="is for weights of four bits",
        fix="Add --weights int4, mixed or nvfp4.",
    )
    refuse_idle(
        weights not in {"int8", "int4", "mixed"},
        "block_size",
        why="is for weights in blocks",
        fix="Add --weights int8, int4 or mixed.",
    )
    refuse_idle(
        target is None, *ENGINE, why="is for building an engine", fix="Add --target tensorrt-rtx, or leave it out."
    )
    refuse_idle(not verify, "decode_steps", why="is of the comparison", fix="Leave out --no-verify, or leave it out.")
    calibration = None
    if kv_cache is not None:
        calibration = CacheCalibration(kv_cache, data, calibration_tokens or TOKENS, max_kl or MAX_KL)
    rounded = None
    if weights is not None:
        how = rounding or "gptq"
        rounded = WeightRounding(
            scheme=weights,
            max_kl=max_kl or MAX_KL,
            bits=bits,
            method=how,
            block_size=block_size or BLOCK,
            data=data,
        )
    options = ExportOptions(
        dtype=dtype,
        capacity=capacity,
        all_logits=all_logits,
        hidden_states=hidden_states,
        allow_nan=allow_nan,
        verify=verify,
        decode_steps=decode_steps,
        force=force,
        cache=calibration,
        weights=rounded,
    )
    reporter = reporter_for(quiet)
    build = make_options(target, **engine) if target is not None else None
    if build is not None:
        check_early(build, dtype, kv_cache, weights)
    check_output(output, force)
    exportable = open_exportable(Path(source), via, trust_remote_code, reporter, base)
    result = export_bundle(exportable, output, options, reporter)
    facts = build_and_tell(output, build, reporter) if build is not None else None
    if as_json:
        peak = {"weight_bytes": result.weight_bytes, "peak_bytes": result.peak_bytes}
        built = {"build": facts} if facts is not None else {}
        print_json({"bundle": str(output), **peak, "manifest": result.manifest.model_dump(), **built})
        return
    if result.parity is not None and not quiet:
        render(result.parity, reporter.console)
    click.echo(f"wrote {output}")
