"""The road of a person's own nn.Module: the module itself is traced, and says what is right, with attention spelled out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.exportables.base import Changed, Master, no_quantized_cache
from headfold.export.exportables.facts import Facts
from headfold.export.exportables.foreign.copying import sharing, without_weights
from headfold.export.exportables.foreign.traced import ModelTensors, OnePass, TracedMaster
from headfold.export.exportables.foreign.widening import widened
from headfold.export.exportables.module_road.learning import Learned, learn
from headfold.export.exportables.module_road.module_oracle import ModuleOracle
from headfold.export.exportables.oracle import Oracle
from headfold.export.model.config import MOST_POSITIONS
from headfold.export.typed import check_types
from headfold.plugins.dtypes import Quantized
from headfold.runtime.errors import ConfigError
from headfold.runtime.manifest import Road


@dataclass(frozen=True, kw_only=True)
class ModuleFacts:
    """What running a module does not tell of it; all else is learned from a pass on meta tensors."""

    max_position_embeddings: Annotated[int, Field(ge=1, le=MOST_POSITIONS)]  # the most tokens that it was made for
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()  # those that end an answer
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_types(self)


class ModuleModel:
    """An Exportable of a module; see `headfold.export.bundle.modules.export_module` for what it must be.

    Raises:
        ConfigError: it is no decoder that can be exported; which submodule, and why, is named.
    """

    road: Road = "module"

    def __init__(self, module: nn.Module, facts: ModuleFacts, tokenizer: TokenizerFiles) -> None:
        name = type(module).__name__
        self.path, self.tokenizer = Path(name), tokenizer
        self._module = module
        _check_parameters(module, name)
        self._learned = self._learn(torch.float32)
        for token in (facts.bos_token_id, *facts.eos_token_id, facts.pad_token_id):
            if token is not None and not 0 <= token < self._learned.vocab_size:
                fix = f"Token ids are 0 to {self._learned.vocab_size - 1}."
                raise ConfigError(f"its facts name token {token}, which it does not have", where=name, fix=fix)
        self.facts = Facts(
            model_type=name,
            vocab_size=self._learned.vocab_size,
            hidden_size=self._learned.hidden_size,
            capacity=facts.max_position_embeddings,
            layers=self._learned.layers,
            bos_token_id=facts.bos_token_id,
            eos_token_id=facts.eos_token_id,
            pad_token_id=facts.pad_token_id,
        )

    def _learn(self, dtype: torch.dtype) -> Learned:
        try:
            return learn(without_weights(self._module, dtype))
        except ConfigError as error:
            where = f"{self.path}.{error.where}" if error.where else self.path
            raise ConfigError(error.what, where=where, fix=error.fix) from error

    @property
    def titles(self) -> Mapping[str, str]:
        """See Exportable: none."""
        return {}

    def describe(self) -> dict[str, Any]:
        """See Exportable."""
        return self.facts.to_json()

    def master(self, dtype: torch.dtype, capacity: int, all_logits: bool, cache: Quantized | None = None) -> Master:
        """See Exportable."""
        if cache is not None:
            raise no_quantized_cache(self.path)
        self._learn(dtype)  # what does not run in it is named
        module, learned = without_weights(self._module, dtype), self._learned
        head = module.get_submodule(learned.head) if learned.head is not None else None
        return ModuleMaster(module, map(module.get_submodule, learned.names), head, all_logits)

    def tensors(self, dtype: torch.dtype) -> ModelTensors:
        """See Exportable."""
        return ModelTensors(self._module, self.path)

    def tables(self, dtype: torch.dtype, capacity: int) -> Mapping[str, Tensor]:
        """See Exportable: none; buffers come with the weights."""
        return {}

    def oracle(self, stored: torch.dtype, capacity: int, weights: Changed | None = None) -> Oracle:
        """See Exportable: the module itself, without headfold's op."""
        return self.reference(stored, capacity, torch.float32, weights)

    def reference(
        self, stored: torch.dtype, capacity: int, arithmetic: torch.dtype, weights: Changed | None = None
    ) -> Oracle:
        """See Exportable."""
        module = sharing(self._module)
        layers = [module.get_submodule(name) for name in self._learned.names]
        return ModuleOracle(
            widened(module, layers, arithmetic, stored, weights), self._learned.names, self._learned.head
        )


class ModuleMaster(TracedMaster):
    """A module with the graph's inputs and outputs; see Master."""

    def logits(self, input_ids: Tensor, positions: Tensor, cache: OnePass) -> Tensor:
        """See TracedMaster."""
        with torch.device(input_ids.device):  # of what it makes on the way, as torch.arange(n)
            return cast(Tensor, self.decoder(input_ids, positions, cache))


def _check_parameters(module: nn.Module, name: str) -> None:
    parameters = dict(module.named_parameters())
    if not parameters:
        raise ConfigError("has no parameters", where=name, fix="Give a model with its weights.")
    for parameter, x in parameters.items():
        if x.is_meta:
            raise ConfigError("has no values, only a shape", where=f"{name}.{parameter}", fix="Load the weights first.")
        if x.dtype not in {torch.float64, torch.float32, torch.float16, torch.bfloat16}:
            raise ConfigError(
                f"is of {str(x.dtype).removeprefix('torch.')}",
                where=f"{name}.{parameter}",
                fix="headfold exports parameters of float32, float16, bfloat16 and float64.",
            )
