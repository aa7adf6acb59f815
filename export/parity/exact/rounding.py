"""Weights that no rule rounded: read from the graph, and held to what its record says of them.

Others are found again from the checkpoint by their rule, and compared bit for bit as all weights are.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from headfold.export.exportables.rounded import RoundedCheckpoint, RoundedTensors
from headfold.export.exportables.rounding_record import WeightRecord, digest, relative_squared_error
from headfold.export.graph.recipes import recipe_of
from headfold.export.graph.weights import let_go
from headfold.export.model.rounding import Form, Rounded, Width, forms_of, holds, joined
from headfold.export.model.storing import SCALES, stored_bits, stored_shapes, unpacked, whole_name
from headfold.export.parity.report import CheckResult, verdict
from headfold.runtime.errors import BundleError
from headfold.runtime.manifest import WeightsScheme, WeightsSpec

# Squared error of a weight that GPTQ found, beside the weight's own squares. It makes up for what those before it lost, so it is
# further off than the nearest numbers are: on SmolLM2 up to 0.021, in tiny random mixtures of experts to 0.2. Another weight has 2.
_FURTHEST = 0.5
_AS_FAR = 1e-6  # of a sum of squares, float64
_LEAST_KL = -1e-4  # nats: 0, but for float32's rounding
_SCHEMES: dict[WeightsScheme, set[Width]] = {
    "int8": {8},
    "int4": {4, 8},
    "mixed": {4, 8},
    "w8a8": {7, 8},
    "fp8": {"float8", 8},
    "nvfp4": {"float4", 8},
}


class StoredRoundings(Mapping[str, Rounded]):
    """Some rounded weights of a graph, by the names that they have in the checkpoint; read when they are asked for.

    Raises:
        BundleError: when one is asked for that the graph does not have.
    """

    def __init__(
        self,
        model: ir.Model,
        forms: Mapping[str, Form],
        shapes: Mapping[str, tuple[int, ...]],
        path: Path,
    ) -> None:
        """`path`: the graph's, for messages."""
        self._forms, self._shapes, self._path = forms, shapes, path
        self._values = dict[str, tuple[ir.Value, int]]()  # of each part the initializer, and its first row there
        for value in model.graph.initializers.values():
            row = 0
            for part in _sources(value):
                self._values[part] = value, row
                whole = whole_name(part.removesuffix(SCALES))
                row += shapes[whole][0] if whole in shapes else 0

    def __getitem__(self, name: str) -> Rounded:
        def read(form: Form, shape: tuple[int, ...]) -> Rounded:
            values, scales = (self._read(*part) for part in stored_shapes(name, form, shape).items())
            return Rounded(form.bits, unpacked(values, stored_bits(form.bits)), scales.float())

        return joined([read(*piece) for piece in self._forms[name].pieces(self._shapes[name])])

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)

    def _read(self, part: str, shape: tuple[int, ...]) -> torch.Tensor:
        value, row = self._values.get(part, (None, 0))
        if value is None or value.const_value is None:
            raise BundleError(f"has no {part}", where=self._path, fix="Export the bundle again.")
        found = torch.from_numpy(value.const_value.numpy()[row : row + shape[0]].copy())
        let_go(value)
        if tuple(found.shape) != shape:
            wrong = f"its {part} is {list(found.shape)}, not {list(shape)}"
            raise BundleError(wrong, where=self._path, fix="Export the bundle again.")
        return found


def _sources(value: ir.Value) -> tuple[str, ...]:
    """What an initializer is made of; nothing where it does not say, which the comparison of the weights tells."""
    try:
        recipe = recipe_of(value)
    except ValueError:
        return ()
    return recipe.sources if recipe is not None else ()


def rounded_in(model: ir.Model) -> set[str]:
    """The weights that a graph says it has rounded."""
    parts = (part for value in model.graph.initializers.values() for part in _sources(value))
    return {whole_name(part.removesuffix(SCALES)) for part in parts if part.endswith(SCALES)}


def prove_rounding(checkpoint: RoundedTensors, record: Mapping[str, WeightRecord]) -> CheckResult:
    """Every weight that no rule finds is the one that was recorded when it was found, and near the checkpoint's own.

    It is as far from that as was recorded, too: a checkpoint that was trained on is near as well, and is another.
    """
    worst, at, note = 0.0, "", ""
    for name in checkpoint.found:
        found = checkpoint.rounded(name)
        error = relative_squared_error(found, checkpoint.original.read(name))
        if digest(found) != record[name].sha256:
            error, note = math.inf, "is not what GPTQ found"
        elif not math.isclose(error, record[name].relative_squared_error, rel_tol=_AS_FAR):
            error, note = math.inf, "is not as far from the checkpoint's as it was"
        if error > worst or math.isnan(error):
            worst, at = (math.inf if math.isnan(error) else error), name
    passed = worst <= _FURTHEST
    return CheckResult(
        "weights by GPTQ, relative squared error", worst, worst, _FURTHEST, at, passed, note="" if passed else note
    )


def prove_recorded(checkpoint: RoundedTensors, record: Mapping[str, WeightRecord]) -> CheckResult:
    """What the record says of weights that a rule found, or that are kept, and of what the checkpoint has each in, is so."""
    faults = []
    for name, said in record.items():
        kind = checkpoint.original.kind(name) if isinstance(checkpoint, RoundedCheckpoint) else None
        if said.quantized != kind:
            faults.append((name, f"is {kind or 'not quantized'} in the checkpoint, not {said.quantized}"))
        elif name not in checkpoint.found:
            now = checkpoint.rounded(name)
            error = relative_squared_error(now, checkpoint.original.read(name))
            if digest(now) != said.sha256:
                faults.append((name, "has another SHA-256"))
            elif not math.isclose(error, said.relative_squared_error, rel_tol=_AS_FAR):
                faults.append((name, f"is off by {error:.3g} of its squares, not {said.relative_squared_error:.3g}"))
    return verdict("what weights.json says of rounded weights", faults)


def prove_described(spec: WeightsSpec, checkpoint: RoundedTensors, levels: Collection[int]) -> CheckResult:
    """What the manifest says of the weights, by which people choose, is what they are; `levels`: of accuracy, of the graph's products.

    What they cost depends on text, so of that only the bound is looked at.
    """
    made = {name: form for name, form in checkpoint.forms.items() if name not in checkpoint.kept}
    bits = {name: form.bits for name, form in made.items()}
    turned, narrow = ([name for name in made if getattr(made[name], flag)] for flag in ("transposed", "narrow"))
    wide_rows = {name: form.wide_rows for name, form in made.items() if form.wide_rows}
    right = {
        "scheme": set(bits.values()) <= _SCHEMES[spec.scheme] and (spec.scheme == "mixed" or not wide_rows),
        "block_size": forms_of(bits, checkpoint.shapes(), spec.block_size, turned, narrow, wide_rows) == made,
        "kept": spec.kept == len(checkpoint.kept),
        "bits": math.isclose(spec.bits, checkpoint.average_bits),
        "accuracy_level": min(levels, default=spec.accuracy_level) == spec.accuracy_level,
        "cost": spec.cost is not None and _LEAST_KL <= spec.cost.kl <= spec.max_kl,
    }
    faults = [
        (f"weights.{name}", "says something else than the bundle has") for name, holds in right.items() if not holds
    ]
    return verdict("what the manifest says of rounded weights", faults)


def prove_kept(checkpoint: RoundedCheckpoint) -> CheckResult:
    """What the checkpoint holds in few bits itself is restored to what the checkpoint says it is."""
    faults = [
        (name, "is restored to other numbers")
        for name in checkpoint.kept
        if not holds(checkpoint.rounded(name), checkpoint.original.read(name))
    ]
    return verdict(f"weights kept in their own bits, {len(checkpoint.kept)}", faults)
