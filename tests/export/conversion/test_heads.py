"""Each start of a shared head against numpy, written from the papers alone: explicit pairs, loops over heads, no shared code."""

from typing import Any

import numpy as np
import pytest
import torch
from multi_head_toy import VARIANTS, checkpoint_of, tokens

from headfold.export.checkpoints.opening import load_decoder
from headfold.export.conversion.heads import Moments
from headfold.export.conversion.layers import ConvertOptions, convert_layer
from headfold.export.conversion.statistics import attention_weights, moments
from headfold.export.conversion.streams import Streams
from headfold.export.model.config import ModelConfig

Array = np.ndarray[Any, Any]


class Layer:
    """One layer's weights per head, and the moments of its inputs, as numpy arrays."""

    def __init__(self, config: ModelConfig) -> None:
        checkpoint = checkpoint_of(config)
        prefix = "model.layers.0.self_attn."
        self.config = config
        self.part = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        decoder = load_decoder(checkpoint)
        self.moments: Moments = moments(Streams(decoder, tokens()))
        wide = [self.rows(name) for name in ("q_proj", "k_proj", "v_proj")]
        self.q, self.k, self.v = wide
        self.o = self.part["o_proj.weight"].double().numpy().reshape(48, 6, 16)  # [hidden, H, D]
        normed = decoder.model.layers[0].input_layernorm(decoder.model.embed_tokens(tokens()))  # type: ignore[operator, union-attr]
        attention = decoder.model.layers[0].self_attn
        _, weights = attention_weights(attention, normed, (decoder.cos_cache, decoder.sin_cache))  # type: ignore[arg-type]
        x = normed.double().numpy()
        self.x = np.concatenate((x, np.ones_like(x[..., :1])), 2) if config.qkv_bias else x  # [N, S, I]
        self.weights = weights.double().numpy()  # [N, H, S, S]

    def rows(self, name: str, part: Any = None) -> Array:
        """[heads, D, I]."""
        tensors = part or self.part
        weight: Array = tensors[f"{name}.weight"].double().numpy()
        if self.config.qkv_bias:
            weight = np.concatenate((weight, tensors[f"{name}.bias"].double().numpy()[:, None]), 1)
        return weight.reshape(-1, 16, weight.shape[1])

    def convert(self, *options: Any) -> dict[str, torch.Tensor]:
        doubles = {name: tensor.double() for name, tensor in self.part.items()}
        return convert_layer(doubles, self.config, ConvertOptions(*options), self.moments, 0)


@pytest.fixture(params=["plain", "biases"], scope="module")
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(VARIANTS[request.param])


def test_moments_are_those_of_inputs_attended_inputs_and_queries(layer: Layer) -> None:
    flat = layer.x.reshape(-1, layer.x.shape[2])
    np.testing.assert_allclose(layer.moments.inputs.numpy(), flat.T @ flat / len(flat), atol=1e-5)  # summed in float32
    for head in range(6):
        z = (layer.weights[:, head] @ layer.x).reshape(flat.shape)
        np.testing.assert_allclose(layer.moments.attended[head].numpy(), z.T @ z / len(z), atol=1e-5)
        q = flat @ layer.q[head].T
        np.testing.assert_allclose(layer.moments.queries[head].numpy(), q.T @ q / len(q), atol=1e-4)


def test_mean_and_first_are_the_papers(layer: Layer) -> None:
    for name, weight in (("k_proj", layer.k), ("v_proj", layer.v)):
        mean = layer.rows(name, layer.convert(2, "mean"))
        np.testing.assert_allclose(mean, np.stack([weight[:3].mean(0), weight[3:].mean(0)]), atol=1e-12)
        np.testing.assert_allclose(layer.rows(name, layer.convert(2, "first")), weight[[0, 3]], atol=1e-12)
    for name in ("q_proj.weight", "o_proj.weight"):
        assert torch.equal(layer.convert(2, "mean")[name], layer.part[name].double())


def test_random_has_the_size_of_the_trained_heads_and_follows_the_seed(layer: Layer) -> None:
    one, again, other = (layer.convert(1, "random", "contiguous", seed)["k_proj.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert abs(one.pow(2).mean().sqrt() / np.sqrt((layer.k**2).mean()) - 1) < 0.15  # 768 draws: 2.6% standard error
    assert abs(one.mean()) < 0.05


def test_mean_of_grouped_heads_is_the_mean_of_key_value_heads() -> None:
    grouped = Layer(VARIANTS["GQA"])
    np.testing.assert_allclose(grouped.rows("k_proj", grouped.convert(1, "mean"))[0], grouped.k.mean(0), atol=1e-12)


def test_values_are_the_best_of_rank_head_dim(layer: Layer) -> None:
    """Eckart-Young: no shared value rows lose less, under the mean attended moment, than the leading singular vectors."""
    result = layer.convert(2, "svd")
    shared, output = layer.rows("v_proj", result), result["o_proj.weight"].numpy().reshape(48, 6, 16)
    for group in range(2):
        heads = range(3 * group, 3 * group + 3)
        moment = layer.moments.attended[3 * group : 3 * group + 3].numpy().mean(0)
        values, vectors = np.linalg.eigh(moment)
        root = vectors * np.sqrt(np.maximum(values, values[-1] * 1e-6)) @ vectors.T
        maps = np.concatenate([root @ layer.v[h].T @ layer.o[:, h].T for h in heads], 1)  # [I, 3 hidden]
        left = np.linalg.svd(maps)[0][:, :16]
        ours = np.linalg.qr(root @ shared[group].T)[0]
        np.testing.assert_allclose(ours @ ours.T, left @ left.T, atol=1e-7)
        for h in heads:  # and each head's output is least squares on what it attends to
            own = layer.moments.attended[h].numpy()
            best = np.linalg.solve(
                shared[group] @ own @ shared[group].T, shared[group] @ own @ layer.v[h].T @ layer.o[:, h].T
            )
            np.testing.assert_allclose(output[:, h].T, best, atol=1e-4 * abs(best).max())  # a ridge of 1e-6 is in it


def complex_rows(weight: Array) -> Array:
    """[D, I] to the complex rows of 8 planes: dimension i pairs with i + 8."""
    return np.stack([weight[i] + 1j * weight[i + 8] for i in range(8)])


def test_keys_are_rank_one_per_plane_and_queries_absorb_the_factor(layer: Layer) -> None:
    result = layer.convert(1, "svd")
    shared, queries = complex_rows(layer.rows("k_proj", result)[0]), layer.rows("q_proj", result)
    moment = layer.moments.inputs.numpy()
    for plane in range(8):
        energy = [
            np.trace(layer.moments.queries[h].numpy()[np.ix_([plane, plane + 8], [plane, plane + 8])]) for h in range(6)
        ]
        rows = np.stack([complex_rows(layer.k[h])[plane] for h in range(6)])  # [6, I]
        gram = (np.sqrt(energy)[:, None] * rows) @ moment @ (np.sqrt(energy)[:, None] * rows).conj().T
        best = np.linalg.eigvalsh(gram)[:-1].sum()  # what rank 1 must lose
        lost = 0.0
        for h in range(6):
            old, new = complex_rows(layer.q[h])[plane], complex_rows(queries[h])[plane]
            factor = np.vdot(old, new) / np.vdot(old, old)
            np.testing.assert_allclose(new, factor * old, atol=1e-9)  # one complex number per head and plane
            error = rows[h] - factor.conj() * shared[plane]
            lost += energy[h] * (error @ moment @ error.conj()).real
        assert lost == pytest.approx(best, rel=1e-3)  # small eigenvalues of the moment are floored at 1e-6


def test_procrustes_is_the_generalized_analysis_of_activations(layer: Layer) -> None:
    """The paper's form: rotate each head's activations onto their mean, for twenty rounds that start from the first head."""
    x = layer.x.reshape(-1, layer.x.shape[2])
    result = layer.convert(1, "procrustes")
    values, keys = [x @ v.T for v in layer.v], [x @ complex_rows(k).T for k in layer.k]  # [tokens, D], [tokens, R/2]
    value, key = values[0], keys[0]
    for _ in range(20):
        turns = []
        for activation in values:
            left, _, right = np.linalg.svd(activation.T @ value)
            turns.append(left @ right)
        phases = [(activation.conj() * key).sum(0) for activation in keys]
        phases = [phase / abs(phase) for phase in phases]
        value = np.mean([a @ t for a, t in zip(values, turns, strict=True)], 0)
        key = np.mean([a * p for a, p in zip(keys, phases, strict=True)], 0)
    close = {"atol": 1e-3}  # our inner products were summed in float32, and twenty rounds amplify that
    output, queries = result["o_proj.weight"].numpy().reshape(48, 6, 16), layer.rows("q_proj", result)
    np.testing.assert_allclose(
        layer.rows("v_proj", result)[0], np.mean([t.T @ v for t, v in zip(turns, layer.v, strict=True)], 0), **close
    )
    rotated = np.mean([p[:, None] * complex_rows(k) for p, k in zip(phases, layer.k, strict=True)], 0)
    np.testing.assert_allclose(complex_rows(layer.rows("k_proj", result)[0]), rotated, **close)
    for h in range(6):
        np.testing.assert_allclose(output[:, h].T, turns[h].T @ layer.o[:, h].T, **close)
        np.testing.assert_allclose(complex_rows(queries[h]), phases[h][:, None] * complex_rows(layer.q[h]), **close)
