"""A person's own module becomes a bundle that computes what the module computes; what was learned of it is what it does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_modules import Odd, Plain
from torch import nn

from headfold.export import ExportOptions, ModuleFacts, export_module, verify_module
from headfold.export.checkpoints.base import TokenizerFiles
from headfold.export.exportables.module_road.module_model import ModuleModel
from headfold.export.exportables.module_road.module_oracle import ModuleOracle
from headfold.plugins.torch import attention
from headfold.runtime import load
from headfold.runtime.errors import BundleError, ConfigError, VerificationError

FACTS = ModuleFacts(max_position_embeddings=64, eos_token_id=(2,))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_is_proven_with_all_that_a_decoder_may_have(dtype, tmp_path) -> None:
    module = Odd()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    options = ExportOptions(dtype=dtype, decode_steps=4)
    result = export_module(module, tmp_path / "bundle", FACTS, options=options)
    assert result.parity is not None
    assert result.parity.passed
    assert (result.manifest.road, result.manifest.source) == ("module", "Odd")
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    backend, prompt = load(tmp_path / "bundle").backend, np.arange(3, 20)
    expected = module(torch.tensor(prompt)[None], torch.arange(17)[None])[
        0, -1
    ].detach()  # without a cache: torch's own
    tolerance = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(backend.prefill(backend.new_cache(1, 32), 0, prompt), expected, atol=tolerance)


def test_hidden_states_are_what_its_head_is_given(tmp_path) -> None:
    module, seen = Plain(), []
    options = ExportOptions(hidden_states=True, decode_steps=2)
    assert export_module(module, tmp_path / "bundle", FACTS, options=options).parity.passed
    module.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].detach().numpy()))
    module(torch.tensor([[5, 6, 7]]), torch.arange(3)[None])
    with load(tmp_path / "bundle", threads=1) as model:
        np.testing.assert_allclose(model.embed([5, 6, 7]), seen[0].mean(0), atol=1e-4)


def test_a_module_without_a_head_has_none(tmp_path) -> None:
    class Tied(Plain):
        def forward(self, input_ids, positions, cache=None):
            x = self.embedding(input_ids) + self.positions(positions)
            for number, layer in enumerate(self.layers):
                x = layer(x, cache, number)
            return x @ self.embedding.weight.T

    module = Tied()
    del module.head
    with pytest.raises(ConfigError, match="no head of its own"):
        export_module(module, tmp_path / "bundle", FACTS, options=ExportOptions(hidden_states=True))


def test_facts_are_learned() -> None:
    facts = ModuleModel(Odd(), FACTS, TokenizerFiles()).facts
    assert (facts.model_type, facts.vocab_size, facts.hidden_size, facts.capacity) == ("Odd", 257, 48, 64)
    assert [(layer.window, layer.softcap, layer.scale, layer.sinks) for layer in facts.layers] == [
        (5, 0.0, 0.3, True),
        (-1, 20.0, 0.3, True),
        (9, 0.0, 0.3, True),
    ]
    assert {(x.num_attention_heads, x.num_key_value_heads, x.head_dim) for x in facts.layers} == {(3, 1, 24)}


def test_a_finished_bundle_is_compared_with_its_module(tmp_path) -> None:
    module = Plain()
    export_module(module, tmp_path / "bundle", FACTS, options=ExportOptions(verify=False))
    assert verify_module(tmp_path / "bundle", module, decode_steps=4).passed
    with torch.no_grad():
        module.layers[1].up.bias[3] += 0.01
    report = verify_module(tmp_path / "bundle", module, decode_steps=4)
    assert "layers.1.up.bias" in report.failure()
    with pytest.raises(BundleError, match="was made from another model than Odd"):
        verify_module(tmp_path / "bundle", Odd())


def test_what_tracing_does_not_see_the_proof_does(tmp_path) -> None:
    class ByLength(Plain):
        def forward(self, input_ids, positions, cache=None):
            return super().forward(input_ids, positions, cache) * (1 if input_ids.shape[1] > 5 else 2)

    with pytest.raises(VerificationError):
        export_module(ByLength(), tmp_path / "bundle", FACTS, options=ExportOptions(decode_steps=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [{}, {"window": 3}, {"softcap": 5.0}, {"sinks": torch.tensor([0.5, -1, 2, 0])}])
def test_the_oracles_attention_is_torchs(given) -> None:
    """Of the module alone, against the op without a cache; which is torch's where torch has it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, count, 6, 8, dtype=torch.float64) for count in (4, 2, 2))
    expected = attention(q, k, v, **given)
    if not given:
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(expected, plain)

    class Only(nn.Module):
        def forward(self, input_ids, positions, cache):
            self.seen = attention(q, k, v, cache, 0, **given)
            return self.layers[0](torch.zeros(1, 6, 4))

    module = Only()
    module.layers = nn.ModuleList([nn.Linear(4, 4)])
    ModuleOracle(module, ["layers.0"]).answer(np.arange(6))
    torch.testing.assert_close(module.seen, expected)


def test_attention_trains() -> None:
    module = Plain()
    ids = torch.randint(60, (3, 9))
    loss = F.cross_entropy(module(ids, torch.arange(9)[None]).flatten(0, 1), ids.flatten())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
