"""What a finished bundle's rounded weights cost on text of a person's own: the export's measure, on other text."""

from collections.abc import Sequence
from pathlib import Path

import torch

from headfold.export.data.calibration import LENGTH, calibration_tokens
from headfold.export.exportables.base import Exportable
from headfold.export.progress import Reporter
from headfold.export.quantization.cost import reference, weights_cost
from headfold.export.quantization.gate import describe, what_helps
from headfold.export.quantization.rounding import HELD_OUT
from headfold.export.quantization.running import Running
from headfold.runtime.errors import VerificationError, located
from headfold.runtime.manifest import Manifest, WeightsCost


def cost_on_text(
    bundle: Path,
    manifest: Manifest,
    source: Exportable,
    data: Sequence[str],
    reporter: Reporter,
    prefill: Path | None = None,
) -> WeightsCost:
    """Measure a bundle with rounded weights against the model that it was made from.

    Args:
        bundle: its directory.
        manifest: its own.
        source: the model.
        data: sources of text, as `headfold.export.data.token_data.tokenize` takes them.
        reporter: told what goes on.
        prefill: another bundle, which reads the prompts: see `weights_cost`.

    Raises:
        DataError: there is less text than one sequence.
        BundleError: the other bundle is altered.
        InputError: it is of another model.
    """
    with reporter.step("read the checkpoint"):
        model = Running(source, source.tensors(getattr(torch, manifest.dtype)), manifest.cache.capacity)
    tokens = calibration_tokens(source.tokenizer.definition, model, data, HELD_OUT, LENGTH, reporter=reporter)
    with reporter.step("run PyTorch on the text"), located(source.path):
        before = reference(model, tokens)
    del model
    with reporter.step("run the bundle on it"):
        cost = weights_cost(bundle, manifest, before, prefill)
    read = f" behind prompts that {prefill} reads" if prefill is not None else ""
    reporter.note(f"rounded weights on {', '.join(data)}{read}: {describe(cost)}")
    return cost


def refuse_over(cost: WeightsCost, manifest: Manifest, bundle: Path, data: Sequence[str]) -> None:
    """Raises VerificationError: on this text they cost more than their export allowed."""
    assert manifest.weights is not None
    if not cost.kl <= manifest.weights.max_kl:  # NaN is not
        raise VerificationError(
            f"its weights cost {cost.kl:.3g} nats on {', '.join(data)}, and its export allowed {manifest.weights.max_kl:g}",
            where=bundle,
            fix=f"{what_helps(manifest, cost)}, when you export it again.",
        )
