"""The gate: a bundle whose rounded weights cost too much is not published. It also picks how the products compute."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from headfold.export.progress import Reporter
from headfold.export.quantization.cost import Reference, weights_cost
from headfold.export.quantization.products import set_level_in_file
from headfold.plugins.quantized.schema import Level
from headfold.runtime.errors import ConfigError, VerificationError
from headfold.runtime.manifest import MODEL, Manifest, WeightsCost, WeightsScheme, WeightsSpec

# On text that a model itself wrote, the mean KL is what its loss rises by in expectation. A model of a billion parameters is 0.094 nats
# better than one half its size (Hoffmann et al. 2022, appendix D.3: 406.4 / N^0.34): who loses more than that to rounding is better
# off with a smaller model.
MAX_KL = 0.1
_LEVEL_KL = 0.01  # what rounding the inputs may add, for products that are faster
_SHARES = (1 / 16, 1 / 4)  # of the products whose inputs lose most, tried in turn
_HELPS: dict[WeightsScheme, str] = {
    "int4": "Use --weights mixed or int8",
    "mixed": "Use --weights int8, or --bits over {bits:.3g}",
    "int8": "Leave --weights out",
    "w8a8": "Use --weights int8",
    "fp8": "Use --weights int8",
    "nvfp4": "Use --weights int8",
}
# The last is a last resort: by float32 inputs ONNX Runtime multiplies a matrix of eight bits that it makes wide at every call (32,000
# outputs of 2,048 inputs: 280 ms instead of 8; of four bits 16 instead of 2).
_EIGHT, _FLOATS_BY_FOUR = "inputs in eight bits", "inputs in float32 where weights have four bits"
_FLOATS = "inputs in float32, which decodes slowly"
_OF_THE_HEAD: set[WeightsScheme] = {"w8a8", "fp8"}  # other products have ways of their own


def check_max_kl(value: float) -> None:
    """Raise ConfigError for what is no bound."""
    if not 0 < value < math.inf:
        raise ConfigError(f"is {value:g}", where="--max-kl", fix="It must be positive and finite, in nats.")


def pass_gate(
    stage: Path,
    manifest: Manifest,
    before: Reference,
    by_loss: Callable[[], Sequence[str]],
    reporter: Reporter,
) -> WeightsSpec:
    """Measure a staged bundle with rounded weights, leave it with the fastest levels of accuracy that are accurate enough.

    Args:
        stage: the bundle.
        manifest: its own.
        before: what it is measured by.
        by_loss: asked only if it matters, see `by_loss_of_inputs`.
        reporter: told what goes on.

    Raises:
        VerificationError: at no level they stay within what the manifest allows.
    """
    assert manifest.weights is not None
    spec, scheme, max_kl = manifest.weights, manifest.weights.scheme, manifest.weights.max_kl

    whose = "the head's " if scheme in _OF_THE_HEAD else ""

    def measure(inputs: str) -> WeightsCost:
        with reporter.step(f"measure what {scheme} weights cost, {whose}{inputs}"):
            return weights_cost(stage, manifest, before)

    set_level_in_file(stage / MODEL, 4)
    chosen: Level = 4
    inputs, cost = _EIGHT, measure(_EIGHT)
    # Otherwise it costs at most so much more, whatever the slower level does
    if not cost.kl <= min(max_kl, _LEVEL_KL) and set_level_in_file(stage / MODEL, 1, [4]):
        slower = measure(_FLOATS_BY_FOUR)
        enough = min(max_kl, slower.kl + _LEVEL_KL)
        if cost.kl <= enough:
            set_level_in_file(stage / MODEL, 4)
        else:
            worst = by_loss() if slower.kl <= max_kl else []
            fewer = _fewer_floats(stage / MODEL, worst, measure, enough)
            chosen, (inputs, cost) = 1, fewer or (_FLOATS_BY_FOUR, slower)
    if not cost.kl <= max_kl and set_level_in_file(stage / MODEL, 1, [8]):
        chosen, inputs, cost = 1, _FLOATS, measure(_FLOATS)
    if not cost.kl <= max_kl:  # NaN is not
        raise VerificationError(
            f"{_whose_cost(manifest)} cost more than {max_kl:g} nats: {describe(cost)}",
            where=manifest.source,
            fix=f"{what_helps(manifest, cost)}. No bundle was written.",
        )
    reporter.note(f"{scheme} weights, {whose}{inputs}: {describe(cost)}")
    return spec.model_copy(update={"accuracy_level": chosen, "cost": cost})


def _fewer_floats(
    path: Path, worst: Sequence[str], measure: Callable[[str], WeightsCost], enough: float
) -> tuple[str, WeightsCost] | None:
    """Have only the products of the first few of these weights take floats, and say so; None: that is not enough, and all do again."""
    for count in (math.ceil(share * len(worst)) for share in _SHARES if worst):
        set_level_in_file(path, 4)
        set_level_in_file(path, 1, [4], worst[:count])
        inputs = f"inputs in float32 of {count} of {len(worst)} weights"
        if (cost := measure(inputs)).kl <= enough:
            return inputs, cost
    set_level_in_file(path, 1, [4])
    return None


def what_helps(manifest: Manifest, cost: WeightsCost) -> str:
    """What to do where rounded weights, and a quantized cache, cost too much, without a full stop."""
    spec, cache = manifest.weights, manifest.cache.quantization
    assert spec is not None
    if math.isnan(cost.kl):  # which no --max-kl allows
        return "It computes NaN: " + ("leave --weights out" if manifest.dtype == "float32" else "use --dtype float32")
    scheme = "int8" if spec.scheme == "mixed" and spec.bits == 8 else spec.scheme
    helps = _HELPS[scheme].format(bits=spec.bits)
    if scheme == "int8" and manifest.dtype == "float16":  # whose scales have few bits where weights are small
        helps = "Use --dtype float32, or leave --weights out"
    helps = f"{helps}, or allow it with --max-kl"
    if cache is None or cache.kl <= min(cost.kl / 2, spec.max_kl):
        return helps
    alone = f"Leave --kv-cache out, which alone cost {cache.kl:.3g} nats on the text that it was calibrated on"
    return f"{alone}; if that is not enough: {helps[0].lower()}{helps[1:]}"


def _whose_cost(manifest: Manifest) -> str:
    assert manifest.weights is not None
    cache = manifest.cache.quantization
    return f"{manifest.weights.scheme} weights" + (f" and the {cache.dtype} cache" if cache is not None else "")


def describe(cost: WeightsCost) -> str:
    """One line."""
    return (
        f"KL {cost.kl:.3g} nats (99th percentile {cost.kl_99:.3g}), perplexity {cost.perplexity_before:.4g} to {cost.perplexity:.4g}, "
        f"same likeliest token {cost.top1:.1%}, greedy answers the same for {cost.greedy_agreement:.1f} of {cost.greedy_tokens} tokens"
    )
