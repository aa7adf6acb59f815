"""A plain feed-forward made gated computes the same, bit for bit, and learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from headfold.export.checkpoint import MemoryCheckpoint, expected_shapes, load_decoder
from headfold.export.families import config_to_json
from headfold.export.ffn import plain_to_gated
from headfold.export.hf import save_hf
from headfold.export.token_data import TokenData
from headfold.export.training import TrainOptions, train, trainable
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
