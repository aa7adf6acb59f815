"""How a model's weights are rounded: to how many bits, to which numbers, smoothed or not; and what it was before.

Calibrated on some of the text, and measured on the rest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.opening import load_decoder
from headfold.export.data.calibration import LENGTH, calibration_tokens
from headfold.export.exportables.base import Exportable
from headfold.export.exportables.rounded import RoundedCheckpoint, SmoothedCheckpoint, rounded_checkpoint
from headfold.export.exportables.rounding_record import Method
from headfold.export.model.rounding import restored, rounded
from headfold.export.progress import Reporter
from headfold.export.quantization.cost import Reference, reference
from headfold.export.quantization.gate import MAX_KL
from headfold.export.quantization.gptq import gptq_layers
from headfold.export.quantization.sensitivity import TOKENS as SENSITIVITY
from headfold.export.quantization.sensitivity import choose_bits, sensitivities
from headfold.export.quantization.smoothing import find_smoothing
from headfold.runtime.errors import ConfigError
from headfold.runtime.manifest import WeightsScheme, WeightsSpec

HELD_OUT, CALIBRATION = 2048, 8192  # tokens to measure on, and to calibrate GPTQ or smoothing on


@dataclass(frozen=True, kw_only=True)
class WeightRounding:
    """Weights of four or eight bits, and what they may cost."""

    scheme: WeightsScheme
    max_kl: float = MAX_KL  # nats
    bits: float | None = None  # of "mixed": the average; None for the fewest that seem to stay within `max_kl`
    method: Method = "gptq"  # of weights of four bits
    data: tuple[str, ...] = ()  # sources of text; the model writes its own if there is none


@dataclass(frozen=True)
class Prepared:
    """Weights that are rounded, or will be as they are read."""

    checkpoint: RoundedCheckpoint
    before: Reference  # what PyTorch makes of the held-out text without rounding
    costs: Mapping[str, float]  # nats that four bits cost alone, of each weight for which that was measured
    spec: WeightsSpec  # without what it costs, which is not measured yet


def prepare(source: Exportable, capacity: int, options: WeightRounding, reporter: Reporter) -> Prepared:
    """Round the weights of a model. The decoder that this takes is gone afterwards.

    Raises:
        ConfigError: see `rounded_checkpoint`; or a capacity of one token.
    """
    plain = rounded_checkpoint(source, options.scheme)
    _tell(plain, reporter)
    original, kept, costs = plain.original, plain.kept, dict[str, float]()
    bits = {name: form.bits for name, form in plain.forms.items() if name not in kept}  # of those that are rounded
    if capacity < 2:
        where = f"--capacity {capacity}"
        raise ConfigError("is too short to measure rounded weights on", where=where, fix="Choose 2 or more.")
    with reporter.step("read the checkpoint"):
        decoder = load_decoder(original, torch.float32, capacity)
    smoothed = options.scheme == "w8a8"
    calibrated = smoothed or (4 in bits.values() and (options.scheme == "mixed" or options.method == "gptq"))
    count = HELD_OUT + CALIBRATION if calibrated else HELD_OUT
    tokens = calibration_tokens(
        original.tokenizer.definition, decoder, options.data, count, LENGTH, seed=1, reporter=reporter
    )
    measured = torch.arange(len(tokens)) % (count // HELD_OUT) == 0
    if calibrated and measured.all():
        raise ConfigError(
            f"{tokens.numel():,} tokens are too few to calibrate weights on, and others to measure them on",
            where=", ".join(options.data),
            fix="Give more text, or --weights int8.",
        )
    with reporter.step("run PyTorch on held-out text"):
        before = reference(decoder, tokens[measured])
    if options.scheme == "mixed" and calibrated:
        few = tokens[~measured][: max(SENSITIVITY // tokens.shape[1], 1)]
        found = sensitivities(decoder, bits, few, reporter)
        least = bits | {name: form.bits for name, form in kept.items()}
        max_kl = options.max_kl if options.bits is None else None
        chosen = choose_bits(least, original.shapes(), found, max_kl, options.bits)
        bits = {name: chosen[name] for name in bits}
        costs = {name: cost for names, cost in found.items() for name in names}
    del decoder
    checkpoint = RoundedCheckpoint(original, bits, kept=kept)
    if smoothed:
        smooth = SmoothedCheckpoint(original, find_smoothing(original, tokens[~measured], reporter))
        checkpoint = RoundedCheckpoint(smooth, bits, kept=kept)
    elif calibrated and options.method == "gptq":
        wide = RoundedCheckpoint(original, {name: width for name, width in bits.items() if width == 8})
        narrow = {name: width for name, width in bits.items() if width == 4 and not is_held(original, name)}
        found_ = gptq_layers(wide, narrow, tokens[~measured], reporter) if narrow else {}
        checkpoint = RoundedCheckpoint(original, bits, found_, kept)
    spec = WeightsSpec(
        scheme=options.scheme,
        bits=average_bits(checkpoint),
        kept=len(kept),
        accuracy_level=4,
        max_kl=options.max_kl,
        cost=None,
    )
    return Prepared(checkpoint, before, costs, spec)


def _tell(checkpoint: RoundedCheckpoint, reporter: Reporter) -> None:
    """What becomes of a checkpoint that is quantized already."""
    kept, kinds = checkpoint.kept, {name: checkpoint.original.kind(name) for name in checkpoint.forms}
    again = [f"{name} ({kind})" for name, kind in kinds.items() if kind is not None and name not in kept]
    if kept:
        reporter.note(f"{len(kept)} of {len(checkpoint.forms)} weights are kept as they are quantized, bit for bit")
    if again:
        others = f" and {len(again) - 1} others" if len(again) > 1 else ""
        reporter.note(f"quantized, and rounded again, for no form here holds it: {again[0]}{others}")


def average_bits(checkpoint: RoundedCheckpoint) -> float:
    """Of a rounded weight's numbers; scales not counted."""
    sizes = {name: math.prod(checkpoint.shapes()[name]) for name in checkpoint.forms}
    return sum(form.bits * sizes[name] for name, form in checkpoint.forms.items()) / sum(sizes.values())


def is_held(checkpoint: Checkpoint, name: str) -> bool:
    """Whether four bits hold a weight exactly as it is (it was dequantized from such ones)."""
    weight = checkpoint.read(name).float()
    return torch.equal(restored(rounded(weight, 4)), weight)
