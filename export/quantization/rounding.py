"""How a model's weights are rounded: to how many bits, to which numbers, smoothed or not; and what it was before.

Calibrated on some of the text, and measured on the rest.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import get_args

import onnx_ir as ir
import torch
from torch import Tensor

from headfold.export.data.calibration import LENGTH, calibration_tokens, together
from headfold.export.exportables.base import Exportable, Tensors
from headfold.export.exportables.kept import kept_forms, why_again
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedCheckpoint, RoundedTensors, SmoothedCheckpoint
from headfold.export.exportables.rounding_record import Method
from headfold.export.graph.passes import fingerprint
from headfold.export.model.rounding import (
    Form,
    Rounded,
    Width,
    bits_of,
    forms_of,
    holds,
    is_by_output,
    rounded,
    suits_narrow_scales,
)
from headfold.export.progress import Reporter
from headfold.export.quantization.cost import Reference, reference
from headfold.export.quantization.gate import MAX_KL, check_max_kl
from headfold.export.quantization.gptq import gptq_head, gptq_layers
from headfold.export.quantization.products import roundable, transposed
from headfold.export.quantization.running import Running
from headfold.export.quantization.sensitivity import TOKENS as SENSITIVITY
from headfold.export.quantization.sensitivity import by_loss_of_inputs, choose_bits, sensitivities
from headfold.export.quantization.shelf import InMemory, Shelf, digest_of, remembered
from headfold.export.quantization.smoothing import find_smoothing
from headfold.export.typed import check_types
from headfold.plugins.quantized.schema import BLOCK
from headfold.runtime.errors import ConfigError, located
from headfold.runtime.manifest import BlockSize, WeightsScheme, WeightsSpec

# A model whose weights come and go with each pass is given shorter sequences: each token that is decoded is a pass
SHORT = 64  # tokens
HELD_OUT, CALIBRATION = 2048, 8192  # tokens to measure on, and to calibrate GPTQ or smoothing on


@dataclass(frozen=True, kw_only=True)
class WeightRounding:
    """Weights of four or eight bits, and what they may cost.

    Raises:
        ConfigError: a value is none of those it can have.
    """

    scheme: WeightsScheme
    max_kl: float = MAX_KL  # nats
    bits: float | None = None  # of "mixed": the average; None for the fewest that seem to stay within `max_kl`
    method: Method = "gptq"  # of weights of four bits
    block_size: BlockSize = BLOCK  # weights that share a scale, or as many of them as divide a row
    data: tuple[str, ...] = ()  # sources of text; the model writes its own if there is none

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--weights", self.scheme, get_args(WeightsScheme)),
            ("--rounding", self.method, get_args(Method)),
            ("--block-size", self.block_size, get_args(BlockSize)),
        ):
            if value not in known or type(value) is not type(known[0]):
                raise ConfigError(
                    f"{value!r} is not known", where=name, fix=f"Choose one of {', '.join(map(str, known))}."
                )
        if isinstance(self.data, str):
            raise ConfigError("is one text", where="data", fix='Give a tuple of sources: ("corpus.txt",).')
        check_types(self)
        check_max_kl(self.max_kl)
        if self.bits is not None and self.scheme != "mixed":
            raise ConfigError("is for weights of either width", where="--bits", fix="Add --weights mixed.")
        if self.bits is not None and not 4 <= self.bits <= 8:
            raise ConfigError(f"is {self.bits:g}", where="--bits", fix="It must lie between 4 and 8.")


@dataclass(frozen=True)
class Prepared:
    """Weights that are rounded, or will be as they are read."""

    weights: RoundedTensors
    before: Reference  # what PyTorch makes of the held-out text without rounding
    others: Tensor  # tokens [N, S] of the same text, none of them of the held-out ones
    costs: Mapping[str, float]  # nats that four bits cost alone, of each weight for which that was measured
    spec: WeightsSpec  # without what it costs, which is not measured yet

    def by_loss(self, source: Exportable, capacity: int) -> list[str]:
        """Its weights in four bits of layers, see `by_loss_of_inputs`; the model is opened again."""
        forms = {name: form for name, form in self.weights.forms.items() if form.bits == 4 and form.order is None}
        model = Running(source, self.weights, capacity)
        blocks, tokens = {name: form.block for name, form in forms.items()}, torch.from_numpy(self.before.tokens)
        return by_loss_of_inputs(model, blocks, tokens[: max(SENSITIVITY // tokens.shape[1], 1)])


def prepare(
    source: Exportable,
    tensors: Tensors,
    graph: ir.Model,
    capacity: int,
    dtype: torch.dtype,
    options: WeightRounding,
    reporter: Reporter,
    unfinished: Callable[[], Path],
    more: int = 0,
) -> Prepared:
    """Round the weights of a model.

    Args:
        source: the model.
        tensors: its weights, opened.
        graph: traced from it; it is not changed.
        capacity: of the bundle.
        dtype: of the bundle's other weights, and of scales.
        options: how.
        reporter: told what goes on.
        unfinished: makes a directory for what a large model should not have in memory, and for what an export that is killed should not
            do again.
        more: tokens of the same text that something else is to be calibrated on.

    Raises:
        ConfigError: nothing in it can be rounded; or a capacity of one token.
        CheckpointError: see `Running`.
    """
    if capacity < 2:
        alone = source.facts.capacity < 2  # what the model was made for
        where, fix = (source.path, "Leave --weights out.") if alone else (f"--capacity {capacity}", "Choose 2 or more.")
        what = "is for one token, too few" if alone else "is too short"
        raise ConfigError(f"{what} to measure rounded weights on", where=where, fix=fix)
    groups, turned = roundable(graph), transposed(graph)
    with reporter.step("read the checkpoint"):
        model = Running(source, tensors, capacity, dict.fromkeys(groups, dtype), unfinished)
    shapes, kept, costs = tensors.shapes(), dict[str, Form](), dict[str, float]()
    wide_rows = dict[str, int]()  # see Form
    wide = [name for name in groups if model.layer_of(name) is None]
    bits = widths_of({name: shapes[name] for name in groups}, options.scheme, wide, source.path)
    if isinstance(source, OwnModel):
        kept = kept_forms(source.checkpoint, bits, dtype)
    _tell(source, bits, kept, dtype, reporter)
    _tell_of_floats(shapes, bits, reporter)
    block = options.block_size
    experts = {name for name in bits if len(shapes[name]) == 3}
    least = bits | {name: form.bits for name, form in kept.items()}
    bits = {name: width for name, width in bits.items() if name not in kept}  # of those that are rounded
    in_blocks = [name for name, width in bits.items() if not is_by_output(width) and name not in experts]
    wider = dtype == torch.float32  # than float16
    narrow = {name for name in in_blocks if wider and suits_narrow_scales(tensors.read(name))}
    smoothed = options.scheme == "w8a8" and isinstance(source, OwnModel)
    four: Width = "float4" if options.scheme == "nvfp4" else 4  # what GPTQ rounds to
    calibrated = smoothed or (four in bits.values() and (options.scheme == "mixed" or options.method == "gptq"))
    held_out, calibration = _text(source, model, options, max(CALIBRATION if calibrated else 0, more), reporter)
    lies_there = model.streams and calibrated and not smoothed  # what is made of it, if an export was killed
    origin = _origin(tensors, graph, source.tables(dtype, capacity), capacity, reporter) if lies_there else b""
    with reporter.step("run PyTorch on held-out text"), located(source.path):
        before = reference(model, held_out)
    if options.scheme == "mixed" and calibrated:
        few = calibration[: max(SENSITIVITY // calibration.shape[1], 1)]
        joined = {groups[name] for name, width in bits.items() if width == 4}
        measure = partial(sensitivities, model, tensors, joined, turned, block, few, reporter)
        of_these = json.dumps([sorted(joined), sorted(turned), block]).encode(), origin, few.numpy().tobytes()
        found = remembered(unfinished(), of_these, measure) if lies_there else measure()
        max_kl = options.max_kl if options.bits is None else None
        widths, wide_rows = choose_bits(least, shapes, found, max_kl, options.bits)
        bits = {name: widths[name] for name in bits}
        costs = {name: cost[0] for names, cost in found.items() for name in names}
    if smoothed and isinstance(source, OwnModel):
        smooth = find_smoothing(model, source.checkpoint.config, calibration, reporter)
        weights: RoundedTensors = RoundedCheckpoint(
            SmoothedCheckpoint(source.checkpoint, smooth), forms_of(bits, shapes, narrow=narrow), None, kept, dtype
        )
    else:
        gptq: Mapping[str, Rounded] = {}
        if calibrated and options.method == "gptq":
            products = {name for name, width in bits.items() if width == four} - experts
            held = {name for name in products if is_held(tensors, name, four, dtype, block)}
            narrow -= {name for name in held & narrow if not is_held(tensors, name, four, torch.float16, block)}
            by_gptq = products - held
            if any(bits[name] == 4 for name in experts & bits.keys()):
                reporter.note("experts of four bits are the nearest numbers: GPTQ hears the inputs of products alone")
            if by_gptq:
                chosen = _Chosen(bits, wide_rows, narrow, block, dtype)
                gptq = _gptq(tensors, model, chosen, by_gptq, four, calibration, origin, reporter, unfinished)
        forms = forms_of(bits, shapes, block, turned, narrow, wide_rows)
        if isinstance(source, OwnModel):
            weights = RoundedCheckpoint(source.checkpoint, forms, gptq, kept, dtype)
        else:
            weights = RoundedTensors(tensors, forms, gptq, dtype)
    spec = WeightsSpec(
        scheme=options.scheme,
        block_size=block,
        bits=weights.average_bits,
        kept=len(kept),
        accuracy_level=4,
        max_kl=options.max_kl,
        cost=None,
    )
    return Prepared(weights, before, calibration, costs, spec)


@dataclass(frozen=True)
class _Chosen:
    """What weights are rounded to."""

    bits: Mapping[str, Width]
    wide_rows: Mapping[str, int]  # see Form
    narrow: Collection[str]  # those whose scales take two bytes
    block: int  # see `form_of`
    dtype: torch.dtype  # of the others' scales

    def of(self, names: Collection[str], tensors: Tensors, gptq: Mapping[str, Rounded] | None = None) -> RoundedTensors:
        """A model's weights, some of them rounded; to these numbers, where there are any."""
        bits = {name: self.bits[name] for name in names}
        forms = forms_of(bits, tensors.shapes(), self.block, narrow=self.narrow, wide_rows=self.wide_rows)
        return RoundedTensors(tensors, forms, gptq, self.dtype)


def _gptq(
    tensors: Tensors,
    model: Running,
    chosen: _Chosen,
    names: Collection[str],
    width: Width,
    calibration: Tensor,
    origin: bytes,
    reporter: Reporter,
    unfinished: Callable[[], Path],
) -> Mapping[str, Rounded]:
    """Round weights of products, of these names, to `width`, calibrated on tokens [N, S]; for the rest see `prepare` and `_origin`.

    The head first, behind a model of which only what has eight bits is rounded; then layer by layer, behind the rounded embedding.
    """
    how = chosen.bits, chosen.wide_rows, chosen.block, str(chosen.dtype), sorted(chosen.narrow), sorted(names)

    def shelf(*streams: Tensor) -> Shelf | InMemory:
        """For what is rounded where these enter the first layer."""
        if not model.streams:
            return InMemory()
        entering = (stream.numpy().tobytes() for stream in streams)
        return Shelf(unfinished(), width, chain((json.dumps(how, sort_keys=True).encode(), origin), entering))

    scales = {name: torch.float16 if name in chosen.narrow else chosen.dtype for name in names}
    wide = [name for name, bits in chosen.bits.items() if bits == 8 and len(tensors.shapes()[name]) == 2]
    parts = together(calibration)
    exact, head = model.enter(parts), model.head
    alone = shelf(*exact)
    if head is not None and head in names and not alone.next_layer({head: model.stored(head)}):
        with model.reading(chosen.of(wide, tensors)):
            rows = chosen.wide_rows.get(head, 0)
            alone.put({head: gptq_head(model, head, calibration, scales, chosen.block, rows, reporter)})
    others = chosen.of([*wide, *alone], tensors, alone)
    with model.reading(others):
        hidden = model.enter(parts)
        found = shelf(*exact, *hidden)
        if alone:
            found.put(alone)
        others.found = found
        del alone
        gptq_layers(model, names, width, calibration, exact, hidden, scales, chosen.block, reporter, found)
    return found


def _origin(
    tensors: Tensors, graph: ir.Model, tables: Mapping[str, Tensor], capacity: int, reporter: Reporter
) -> bytes:
    """What is made of a model is made of this: its weights, and what its graph, whose constants are `tables`, computes."""
    with reporter.step("hash the weights"):
        return f"{version('headfold')} {capacity} ".encode() + fingerprint(graph, tables) + digest_of(tensors)


def _text(
    source: Exportable, model: Running, options: WeightRounding, count: int, reporter: Reporter
) -> tuple[Tensor, Tensor]:
    """Tokens [N, S] to measure on, and about `count` others to calibrate on, evenly among them."""
    length, asked = SHORT if model.streams else LENGTH, HELD_OUT + count
    tokens = calibration_tokens(
        source.tokenizer.definition, model, options.data, asked, length, seed=1, reporter=reporter
    )
    if count and len(tokens) == 1:
        raise ConfigError(
            f"{tokens.numel():,} tokens are too few to calibrate on, and others to measure weights on",
            where=", ".join(options.data),
            fix="Give more text, or --weights int8 without --kv-cache.",
        )
    rows = math.ceil(len(tokens) * HELD_OUT / asked)
    measured = torch.zeros(len(tokens), dtype=torch.bool)
    measured[torch.arange(rows) * len(tokens) // rows] = True
    return tokens[measured], tokens[~measured]


def widths_of(
    shapes: Mapping[str, tuple[int, ...]], scheme: WeightsScheme, wide: Collection[str], path: Path
) -> dict[str, Width]:
    """See `bits_of`; `shapes` are of those that the graph can have rounded.

    Raises:
        ConfigError: there are none.
    """
    bits = bits_of(shapes, scheme, wide)
    if not bits:
        others = "Use --weights w8a8 or fp8, which need none, or leave --weights out." if bits_of(shapes, "fp8") else ""
        fix = others or "Leave --weights out."
        raise ConfigError("no weight has blocks of 32 inputs, so none can be rounded", where=path, fix=fix)
    return bits


def _tell(
    source: Exportable, bits: Mapping[str, Width], kept: Collection[str], dtype: torch.dtype, reporter: Reporter
) -> None:
    """What becomes of a checkpoint that is quantized already."""
    if not isinstance(source, OwnModel):
        if "quantization" in source.titles:
            reporter.note(
                f"quantized ({source.titles['quantization']}), and rounded again: only families with a table keep it"
            )
        return
    kinds = {name: source.checkpoint.kind(name) for name in bits}
    again = dict[str, list[str]]()  # names by reason
    for name, width in bits.items():
        if kinds[name] is not None and name not in kept:
            again.setdefault(why_again(source.checkpoint, name, width, dtype), []).append(name)
    if kept:
        reporter.note(f"{len(kept)} of {len(bits)} weights are kept as they are quantized, bit for bit")
    for why, (first, *more) in again.items():
        others = f" and {len(more)} other{'s' if len(more) > 1 else ''}" if more else ""
        reporter.note(f"quantized, and rounded again, for {why}: {first} ({kinds[first]}){others}")


def _tell_of_floats(shapes: Mapping[str, tuple[int, ...]], bits: Collection[str], reporter: Reporter) -> None:
    """What is not rounded, and how much of the model that is."""
    left = [name for name, shape in shapes.items() if len(shape) > 1 and name not in bits]
    if left:
        share = sum(math.prod(shapes[name]) for name in left) / sum(map(math.prod, shapes.values()))
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in left})
        others = f" and {len(kinds) - 2} other kinds" if len(kinds) > 2 else ""
        reporter.note(f"{len(left)} tensors stay floats, {share:.0%} of all numbers: {', '.join(kinds[:2])}{others}")


def is_held(tensors: Tensors, name: str, width: Width, scales: torch.dtype, block: int) -> bool:
    """Whether so many bits, in blocks as `form_of` has them, hold a weight exactly as it is (it was dequantized from such ones)."""
    weight = tensors.read(name)
    return holds(rounded(weight, width, scales, block=block), weight)
