"""How much each seam of a model is smoothed: of a few exponents (alpha of Xiao et al. 2022, equation 4) the one whose products, rounded
weights with rounded inputs, are nearest to the exact ones.

Layer by layer, so one layer and the residual streams are all that is in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headfold.export.data.calibration import together
from headfold.export.model.config import ModelConfig
from headfold.export.model.hearing import hearing
from headfold.export.model.rounding import as_rounded, rounded_rows
from headfold.export.model.smoothing import LARGEST, seams, shifted
from headfold.export.progress import Reporter
from headfold.export.quantization.running import Running

_ALPHAS = (0.35, 0.5, 0.65, 0.8)
_ROWS = 256  # inputs of a product that its error is measured on


@torch.inference_mode()
def find_smoothing(model: Running, config: ModelConfig, tokens: Tensor, reporter: Reporter) -> dict[str, Tensor]:
    """The exponents of each seam of a decoder of ours that gains by them, on int64 tokens [N, S]."""
    found, parts = dict[str, Tensor](), together(tokens)
    hidden = model.enter(parts)  # [N, S, hidden] each
    with reporter.step("find what smooths the layers' inputs", config.num_hidden_layers) as advance:
        for index in range(model.count):
            places = seams(config, index)
            heard = {seam.name: _Inputs(tokens.numel()) for seam in places}
            with model.layer(index) as modules:
                readers = {seam.name: modules[seam.readers[0].removesuffix(".weight")] for seam in places}
                with hearing((readers[name], inputs.hear) for name, inputs in heard.items()):
                    hidden = [model.run_layer(index, *pair) for pair in zip(parts, hidden, strict=True)]
            for seam in places:
                weights = [model.read(name) for name in seam.readers]
                exponents = best_exponents(heard[seam.name].rows(), heard[seam.name].largest, weights)
                if exponents.any():
                    found[seam.name] = exponents
            advance(1)
    return found


def best_exponents(x: Tensor, largest: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Exponents, int64 [K], for the inputs of products with weights [N, K].

    Args:
        x: some of these inputs, float32 [rows, K].
        largest: magnitude of each of all inputs, [K].
        weights: see above.
    """
    largest_weight = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    exact = [x @ weight.T for weight in weights]
    best, least = torch.zeros(len(largest), dtype=torch.int64), torch.inf
    for alpha in (None, *_ALPHAS):
        powers = torch.zeros_like(best) if alpha is None else exponents_of(largest, largest_weight, alpha)
        seen = rounded_rows(shifted(x, 1, -powers))
        error = 0.0
        for weight, right in zip(weights, exact, strict=True):
            now = seen @ as_rounded(shifted(weight, 1, powers), 7).T
            error += ((now - right).square().sum() / right.square().sum().clamp_min(1e-30)).item()
        if error < least:
            best, least = powers, error
    return best


def exponents_of(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    """Those of the powers of two nearest to max|x|^alpha / max|w|^(1 - alpha), int64 [K], over their median; 0 where either is 0."""
    used = (largest_input > 0) & (largest_weight > 0)
    powers = alpha * largest_input.double().log2() - (1 - alpha) * largest_weight.double().log2()
    middle = powers[used].median() if used.any() else 0.0
    return torch.where(used, (powers - middle).round().clamp(-LARGEST, LARGEST), 0.0).long()


class _Inputs:
    """Some of the inputs of a module, and how large each is."""

    def __init__(self, count: int) -> None:
        self._every, self._rows = max(count // _ROWS, 1), list[Tensor]()
        self.largest = torch.zeros(())

    def hear(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A hook before the module."""
        x = inputs[0].flatten(0, 1)
        self.largest = torch.maximum(self.largest, x.abs().amax(0))
        self._rows.append(x[:: self._every].clone())

    def rows(self) -> Tensor:
        """[rows, K]."""
        return torch.cat(self._rows)
