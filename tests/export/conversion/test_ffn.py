"""A plain feed-forward made gated computes the same, bit for bit, and learns; by the function, and by `headfold convert --ffn`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.families import config_to_json
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint, trainable
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.cli import main
from headfold.export.conversion.ffn import plain_to_gated
from headfold.export.data.token_data import TokenData
from headfold.export.training.loop import train
from headfold.export.training.options import TrainOptions
from headfold.runtime.errors import ConfigError

PLAIN = {"relu": "reglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu", "silu": "swiglu"}


def plain(config, act: str, bias: bool = False):
    return replace(config, model_type="headfold", gated=False, hidden_act=act, mlp_bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_form_gives_the_same_bits(config, memory_checkpoint, act, bias, dtype):
    checkpoint = memory_checkpoint(plain(config, act, bias))
    changed, tensors = plain_to_gated(checkpoint.config, checkpoint.tensors, PLAIN[act])
    assert changed.feed_forward.lower() == PLAIN[act]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(changed)
    gated = MemoryCheckpoint(checkpoint.path, changed, tensors)
    ids = torch.randint(config.vocab_size, (2, 20))
    first, second = (load_decoder(c, dtype)(ids).logits for c in (checkpoint, gated))
    assert torch.equal(first, second)


def test_transformers_loads_the_result_as_a_llama(config, memory_checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint = memory_checkpoint(plain(config, "silu"))
    changed, tensors = plain_to_gated(checkpoint.config, checkpoint.tensors)
    assert config_to_json(changed)["model_type"] == "llama"
    save_hf(tmp_path / "gated", MemoryCheckpoint(checkpoint.path, changed, tensors), torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gated").eval()
    ids = torch.randint(config.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, load_decoder(checkpoint)(ids).logits, atol=1e-4, rtol=1e-4
        )  # float32, logits of order 10


def test_the_gate_learns(config, memory_checkpoint):
    checkpoint = memory_checkpoint(plain(config, "silu"))
    changed, tensors = plain_to_gated(checkpoint.config, checkpoint.tensors)
    data = TokenData.from_ids(np.arange(2000) % 96)
    student = trainable(MemoryCheckpoint(checkpoint.path, changed, tensors), 16)
    trained = train(student, data, TrainOptions(steps=4, batch=4, sequence=16))
    assert trained.losses[-1] < trained.losses[0]
    assert all(trained.decoder.state_dict()[f"model.layers.{i}.mlp.up_proj.weight"].abs().max() > 0 for i in range(3))
    assert all(tensors[f"model.layers.{i}.mlp.up_proj.weight"].abs().max() == 0 for i in range(3))  # not written to


def test_what_has_no_exact_form_is_refused(config, memory_checkpoint):
    cases = [
        (config, "swiglu", "gated already"),
        (plain(config, "relu"), "swiglu", "Its exact gated form is reglu"),
        (plain(config, "silu"), "swish", "not a gated one"),
    ]
    for model, target, message in cases:
        checkpoint = memory_checkpoint(model)
        with pytest.raises(ConfigError, match=message):
            plain_to_gated(model, checkpoint.tensors, target)


def headfold(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("act", ["silu", "relu", "gelu"])
def test_the_command_writes_a_checkpoint_that_exports(config, memory_checkpoint, tmp_path, act):
    source, gated, bundle = (tmp_path / name for name in ("plain", "gated", "bundle"))
    save_hf(source, memory_checkpoint(plain(replace(config, num_hidden_layers=1), act)), torch.float32)
    done = headfold("convert", source, "-o", gated, "--ffn", PLAIN[act], "--quiet")
    assert done.exit_code == 0, done.stderr
    first, second = open_checkpoint(source), open_checkpoint(gated)
    assert second.config == replace(first.config, model_type="llama", gated=True, mlp_bias=True)
    assert second.config.feed_forward.lower() == PLAIN[act]
    ids = torch.randint(config.vocab_size, (2, 20))
    before, after = (load_decoder(checkpoint)(ids).logits for checkpoint in (first, second))
    assert torch.equal(before, after)
    done = headfold("export", gated, "-o", bundle, "--decode-steps", 2, "--json", "-q")
    assert done.exit_code == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    assert manifest["parity"]["passed"] is True
    assert manifest["config"]["hidden_act"] == act
    assert manifest["config"]["gated"] is True


def test_the_command_converts_heads_and_feed_forward_at_once(config, memory_checkpoint, tmp_path):
    save_hf(tmp_path / "plain", memory_checkpoint(plain(config, "silu")), torch.float32)
    heads = ("--kv-heads", 1, "--init", "mean", "--calibration-tokens", 64, "--calibration-length", 16, "--quiet")
    for name, more in (("heads", ()), ("both", ("--ffn", "swiglu"))):
        done = headfold("convert", tmp_path / "plain", "-o", tmp_path / name, *heads, *more)
        assert done.exit_code == 0, done.stderr
    heads, both = (open_checkpoint(tmp_path / name) for name in ("heads", "both"))
    assert (both.config.num_key_value_heads, both.config.feed_forward) == (1, "SwiGLU")
    ids = torch.randint(config.vocab_size, (2, 20))
    assert torch.equal(load_decoder(heads)(ids).logits, load_decoder(both)(ids).logits)


@pytest.mark.parametrize(
    ("act", "target", "message"),
    [
        ("relu", "swiglu", "a ReLU feed-forward has no exact form as swiglu. Its exact gated form is reglu."),
        ("silu", "swish", "'swish' is not one of 'swiglu', 'reglu', 'geglu'"),
    ],
)
def test_the_command_refuses_in_one_line(config, memory_checkpoint, tmp_path, act, target, message):
    save_hf(tmp_path / "plain", memory_checkpoint(plain(config, act)), torch.float32)
    done = headfold("convert", tmp_path / "plain", "-o", tmp_path / "gated", "--ffn", target, "--quiet")
    assert done.exit_code == 2
    assert done.stderr.startswith("headfold: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "gated").exists()
