"""Transformers' model as the oracle: its reading of config.json and weights, its eager attention, masks and RoPE; not ours.

Imported where transformers is installed (`pip install "headfold[transformers]"`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.checkpoints.directories.directory import Directory
from headfold.export.checkpoints.families import config_to_json
from headfold.export.checkpoints.gguf.file import GGUFCheckpoint
from headfold.export.checkpoints.hf import HuggingFaceCheckpoint
from headfold.export.exportables.foreign.widening import is_large, widened
from headfold.export.exportables.oracle import Answer, Array, Past, QuantizedCache, Tokens, given_to, handed_on
from headfold.export.exportables.transformers_road.loading import load_model, quiet, stored_dtype
from headfold.plugins.attention.torch_op import dequantize, quantize
from headfold.runtime.errors import ConfigError, VerificationError

# What it raises of what it does not know: a model, a GGUF file's, sizes; the last three of a dtype that is none
_UNKNOWN = (ValueError, KeyError, OSError, StrictDataclassError, AttributeError, IndexError, TypeError)
_OPTIONS: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}


def oracle_of(checkpoint: Checkpoint, stored: torch.dtype) -> "TransformersOracle | None":
    """Transformers' model of a checkpoint of ours, rounded to the dtype `stored` and computing in float32.

    None where it does not know the kind of file, or the model, or takes it for one of other sizes.
    """
    if not isinstance(checkpoint, GGUFCheckpoint | HuggingFaceCheckpoint):
        return None
    place: dict[str, Any]
    if isinstance(checkpoint, GGUFCheckpoint):
        place = {"pretrained_model_name_or_path": checkpoint.path.parent, "gguf_file": checkpoint.path.name}
    else:
        place = {"pretrained_model_name_or_path": checkpoint.directory.place}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(**place, local_files_only=True, trust_remote_code=False)
        except _UNKNOWN:
            return None
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return None
        if isinstance(checkpoint, GGUFCheckpoint):
            model = _from_gguf(checkpoint, config)
            return TransformersOracle(model, stored) if model is not None else None
    return TransformersOracle(_from_directory(checkpoint.directory, config), stored, checkpoint.directory.made)


def _from_directory(directory: Directory, config: Any) -> PreTrainedModel:
    if getattr(config, "quantization_config", None) is not None:  # the weights are not, when they have been read
        del config.quantization_config
    numbers = sum(math.prod(source.shape) for source in directory.tensors.values())
    dtype = (stored_dtype(directory) if is_large(numbers) else None) or torch.float32
    model, found = load_model(directory, config, dtype)
    wrong = [key if isinstance(key, str) else key[0] for key in (*found["missing_keys"], *found["mismatched_keys"])]
    if wrong:
        raise VerificationError(
            f"transformers misses {', '.join(sorted(wrong)[:3])} in it",
            where=directory.path,
            fix="It reads the checkpoint in another way than headfold: please report it.",
        )
    return model


def _from_gguf(checkpoint: GGUFCheckpoint, config: Any) -> PreTrainedModel | None:
    """Its reading of the metadata, our reading of the tensors: its own takes four times as long, with the same package.

    None where the tensors are not of the sizes that it reads: of some architectures it takes the heads' for given, say.
    """
    if checkpoint.config.rope.rope_type != "default":  # which it does not read there
        config.rope_parameters = config_to_json(checkpoint.config).get("rope_parameters", config.rope_parameters)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **_OPTIONS)
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    if any(shapes.get(name) != shape for name, shape in checkpoint.shapes().items()):
        return None
    for name in checkpoint:
        model.load_state_dict({name: checkpoint.read(name).float()}, strict=False, assign=True)
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):  # made on the meta device, and no weight
            model.set_submodule(name, type(module)(config=config))
    return model


def decoder_layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The list of a decoder's layers.

    Raises:
        ConfigError: there is none of that length.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of its {count} layers", fix="headfold needs it to tell layers apart."
        )
    return lists[0]


class TransformersOracle:
    """See `Oracle`.

    Args:
        model: with eager attention.
        stored: dtype of the bundle: weights and rotary tables are rounded to it, as transformers does when it computes in it. None for
            a model whose weights are, and whose tables stay as they are.
        made: what headfold did to its weights before it had them; empty if transformers read them itself.
    """

    def __init__(self, model: PreTrainedModel, stored: torch.dtype | None = None, made: str = "") -> None:
        self.module = model.eval().requires_grad_(False)
        self._layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
        if stored is not None:
            widened(self.module, self._layers, torch.float32, stored)
        self.name = f"{type(model).__name__} of transformers {transformers.__version__}, eager attention"
        self.name += f", weights {made} by headfold" if made else ""

        def rounded(_module: Any, _inputs: Any, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(table.to(stored).to(table.dtype) for table in tables)

        if stored not in {None, torch.float32}:
            for name, module in self.module.named_modules():
                if name.endswith("rotary_emb"):
                    module.register_forward_hook(rounded)

    @torch.inference_mode()
    def answer(
        self,
        tokens: Tokens,
        past: Past | None = None,
        given: Sequence[Array] | None = None,
        cache: QuantizedCache | None = None,
    ) -> Answer:
        """See Oracle."""
        dtype = next(self.module.parameters()).dtype
        before = past.layers if past is not None else [None] * len(self._layers)
        kept = [_KeepsNew(pair, cache, i, dtype) for i, pair in enumerate(before)]
        ids = torch.from_numpy(tokens)[None]
        with handed_on(self._layers, given) as heard, given_to(self.module.get_output_embeddings()) as normed:
            logits = self.module(ids, past_key_values=Cache(layers=kept), use_cache=True).logits[0]
        return Answer.of(logits, heard, ((layer.new[0][0], layer.new[1][0]) for layer in kept), *normed)


class _KeepsNew(DynamicLayer):  # type: ignore[misc]
    """A layer of transformers' cache that attends over a past it does not copy, and keeps only what is new."""

    def __init__(
        self, past: tuple[Tensor, Tensor] | None, cache: QuantizedCache | None, index: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._quantization, self._index, self._dtype = cache, index, dtype
        self.new: list[Tensor] = []  # keys, values, as they are stored
        if past is not None:
            self.keys, self.values = (x[None] for x in past)  # as they are stored: wide only while the layer computes
            self.is_initialized = True

    def _real(self, stored: Tensor, part: int) -> Tensor:
        cache = self._quantization
        return (stored if cache is None else dequantize(stored, cache.scales[self._index][part])).to(self._dtype)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, without a trace of these but in `new`."""
        cache, seen = self._quantization, []
        old = (self.keys, self.values) if self.is_initialized else (None, None)
        for part, (x, before) in enumerate(zip((keys, values), old, strict=True)):
            stored = x
            if cache is not None:
                stored = quantize(x, cache.scales[self._index][part], getattr(torch, cache.dtype)).float()
            self.new.append(stored)
            real = self._real(stored, part)
            seen.append(real if before is None else torch.cat((self._real(before, part), real), 2))
        return seen[0], seen[1]
