"""What tests of rounded weights share: a small llama whose matrices have whole blocks, and the command line."""

from pathlib import Path

import torch
from click.testing import CliRunner

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.cli import main
from headfold.export.exportables.rounded import RoundedCheckpoint
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.model.rounding import bits_of, forms_of

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    eos_token_id=(0,),
    tie_word_embeddings=True,
)


def run(*arguments: object) -> tuple[int, str]:
    """Exit code, and what is on standard error and output."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


def exported(source: Path, output: Path, *options: object) -> Path:
    """The bundle that the command makes without complaint."""
    code, message = run("export", source, "-o", output, *options, "-q")
    assert code == 0, message
    return output


def checkpoint(config: ModelConfig, outlier: float = 1.0) -> MemoryCheckpoint:
    """Random weights. An input of each block is `outlier` times smaller, its weights so many times larger: the same function."""
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.02 if "norm" in name else 0.2)
    decoder.model.embed_tokens.weight /= 2  # and the head, which is tied to it: with smaller logits rounding costs less
    for layer in decoder.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[::32] /= outlier
            for reader in readers:
                reader.weight[:, ::32] *= outlier
    return MemoryCheckpoint(Path("memory"), config, decoder.state_dict())


def rounding(source: Path) -> RoundedCheckpoint:
    """What --weights int4 --rounding nearest makes of it."""
    original = open_checkpoint(source)
    shapes = original.shapes()
    return RoundedCheckpoint(original, forms_of(bits_of(shapes, "int4"), shapes, narrow=shapes))
