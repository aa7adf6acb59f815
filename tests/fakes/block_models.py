"""What tests of rounded weights share: a small llama whose matrices have whole blocks, and the command line."""

from click.testing import CliRunner

from headfold.export.cli import main
from headfold.export.model.config import ModelConfig

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
