"""The road of families with a table: a checkpoint of `headfold.export.checkpoints`, and our own decoder."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headfold.export.checkpoints.base import Checkpoint, TokenizerFiles
from headfold.export.checkpoints.opening import load_decoder
from headfold.export.exportables.base import Changed, Master
from headfold.export.exportables.facts import Facts, LayerFacts
from headfold.export.exportables.foreign.widening import widened
from headfold.export.exportables.oracle import DecoderOracle, Oracle
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Cache, Decoder
from headfold.export.model.rope import rope_tables
from headfold.plugins.dtypes import Quantized
from headfold.runtime.manifest import Road


class OwnModel:
    """An Exportable of a checkpoint; see there."""

    road: Road = "headfold"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path, self.tokenizer = checkpoint, checkpoint.path, checkpoint.tokenizer
        self.facts = facts_of(checkpoint.config)

    path: Path
    tokenizer: TokenizerFiles

    @property
    def titles(self) -> Mapping[str, str]:
        """See Exportable."""
        return self.checkpoint.titles

    def describe(self) -> dict[str, Any]:
        """See Exportable."""
        return self.checkpoint.config.to_json()

    def master(self, dtype: torch.dtype, capacity: int, all_logits: bool, cache: Quantized | None = None) -> Master:
        """See Exportable."""
        config = self.checkpoint.config
        with torch.device("meta"):
            decoder = Decoder(config, capacity).to(device="meta", dtype=dtype).eval()
            if cache is not None:
                heads, layers = config.num_key_value_heads, range(config.num_hidden_layers)
                decoder.quantize_cache(getattr(torch, cache), [(torch.ones(heads), torch.ones(heads)) for _ in layers])
        return OwnMaster(decoder, all_logits).eval()

    def tensors(self, dtype: torch.dtype) -> Checkpoint:
        """See Exportable; read one at a time."""
        return self.checkpoint

    def tables(self, dtype: torch.dtype, capacity: int) -> Mapping[str, Tensor]:
        """See Exportable."""
        cos, sin = rope_tables(self.checkpoint.config, capacity)
        return {"cos_cache": cos.to(dtype), "sin_cache": sin.to(dtype)}

    def oracle(self, stored: torch.dtype, capacity: int, weights: Changed | None = None) -> Oracle:
        """See Exportable: transformers' model, loaded by its own code, where it knows this one."""
        if weights is None and find_spec("transformers") is not None:
            from headfold.export.exportables.transformers_road.transformers_oracle import oracle_of

            oracle = oracle_of(self.checkpoint, stored)
            if oracle is not None:
                return oracle
        return self.reference(stored, capacity, torch.float32, weights)

    def reference(
        self, stored: torch.dtype, capacity: int, arithmetic: torch.dtype, weights: Changed | None = None
    ) -> DecoderOracle:
        """See Exportable."""
        decoder = load_decoder(self.checkpoint, None, capacity)
        decoder.cos_cache, decoder.sin_cache = decoder.cos_cache.to(stored), decoder.sin_cache.to(stored)
        # In float64 embedding and head stay, to be nudged: all that comes behind them tells what it makes of that
        apart = [] if arithmetic == torch.float64 else embedding_and_head(decoder)
        return DecoderOracle(widened(decoder, [*decoder.model.layers, *apart], arithmetic, stored, weights))


class OwnMaster(Master):
    """Our decoder with the graph's inputs and outputs; see Master."""

    decoder: Decoder

    def __init__(self, decoder: Decoder, all_logits: bool) -> None:
        super().__init__()
        self.decoder, self.layers, self.all_logits = decoder, list(decoder.model.layers), all_logits
        self.others = embedding_and_head(decoder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Cache) -> tuple[Tensor, Cache, list[Tensor]]:
        """See Master."""
        output = self.decoder(input_ids, attention_mask, cache, not self.all_logits, self.hidden_states)
        return output.logits, output.cache, [*output.hidden_states, *([] if output.normed is None else [output.normed])]


def embedding_and_head(decoder: Decoder) -> list[nn.Module]:
    """Those two, or the one that is both."""
    return [decoder.model.embed_tokens, *([] if decoder.lm_head is None else [decoder.lm_head])]


def facts_of(config: ModelConfig) -> Facts:
    """What everything behind an Exportable knows of one of our decoders."""
    layers = [
        LayerFacts(
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            window=config.window(layer),
        )
        for layer in range(config.num_hidden_layers)
    ]
    return Facts(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        capacity=config.max_position_embeddings,
        layers=tuple(layers),
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
