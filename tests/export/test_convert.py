"""Conversion to fewer key/value heads: the identity at equal heads, each start against numpy, transformers as a second reader."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from headfold.export.calibration import attention_weights, calibration_tokens, layer_inputs
from headfold.export.checkpoint import MemoryCheckpoint, load_decoder, open_checkpoint
from headfold.export.cli import main
from headfold.export.config import ModelConfig, RopeConfig
from headfold.export.conversion import Conversion, convert_checkpoint
from headfold.export.convert import ConvertOptions, convert, convert_layer, partition
from headfold.export.hf import save_hf
from headfold.export.merge_heads import INITS, Moments
from headfold.export.model import Decoder
from headfold.export.progress import Reporter
from headfold.runtime.errors import ConfigError, InputError

QUIET = Reporter(quiet=True)
Array = np.ndarray[Any, Any]
MHA = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=6,
    head_dim=16,
    max_position_embeddings=64,
)
VARIANTS = {
    "plain": MHA,
    "biases": replace(MHA, qkv_bias=True, output_bias=True),
    "partial RoPE": replace(MHA, rope=RopeConfig(partial_rotary_factor=0.5)),
    "partial RoPE, biases": replace(MHA, rope=RopeConfig(partial_rotary_factor=0.5), qkv_bias=True, output_bias=True),
    "GQA": replace(MHA, num_key_value_heads=3),
    "q/k norm": replace(MHA, model_type="qwen3", qk_norm=True),
    "sliding window": replace(MHA, model_type="mistral", sliding_window=5, sliding_layers=(0, 1)),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def checkpoint_of(config: ModelConfig) -> MemoryCheckpoint:
    """Random weights, such that attention attends to something and every head differs."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if "norm" in name else 0.0)
    return MemoryCheckpoint(Path("random"), config, {n: t.detach() for n, t in decoder.state_dict().items()})


def tokens(rows: int = 16, length: int = 32) -> torch.Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(1))


def converted(config: ModelConfig, *options: Any) -> Conversion:
    return convert_checkpoint(checkpoint_of(config), ConvertOptions(*options), tokens(), QUIET)


def logits(checkpoint: Any) -> torch.Tensor:
    return load_decoder(checkpoint)(tokens(2, 24)).logits


@variants
@pytest.mark.parametrize("init", sorted(set(INITS) - {"random"}))
def test_as_many_heads_as_before_change_nothing(config: ModelConfig, init: str) -> None:
    result = converted(config, config.num_key_value_heads, init, "cluster")
    difference = (logits(result.checkpoint) - logits(checkpoint_of(config))).abs().max()
    assert difference < 1e-5  # logits of up to 10; float32 rounding of weights and activations
    assert max(result.errors) < 1e-10


@variants
def test_svd_loses_less_than_procrustes_and_that_less_than_the_mean(config: ModelConfig) -> None:
    for groups in (1, 3) if config.num_key_value_heads == 6 else (1,):
        svd, aligned, mean = (sum(converted(config, groups, i).errors) for i in ("svd", "procrustes", "mean"))
        assert svd < aligned < mean


@variants
@pytest.mark.parametrize("init", INITS)
def test_result_has_exactly_the_tensors_of_its_configuration(config: ModelConfig, init: str) -> None:
    result = converted(config, 1, init).checkpoint
    expected = {
        name: tuple(t.shape) for name, t in Decoder(replace(config, num_key_value_heads=1)).state_dict().items()
    }
    assert dict(result.shapes()) == expected
    assert torch.isfinite(logits(result)).all()


def test_the_input_is_left_alone() -> None:
    checkpoint = checkpoint_of(MHA)
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    convert_checkpoint(checkpoint, ConvertOptions(2), tokens(), QUIET)
    assert all(torch.equal(before[name], checkpoint.tensors[name]) for name in before)


def test_bfloat16_in_bfloat16_out() -> None:
    plain = checkpoint_of(MHA)
    checkpoint = replace(plain, tensors={name: tensor.bfloat16() for name, tensor in plain.tensors.items()})
    result = convert_checkpoint(checkpoint, ConvertOptions(2), tokens(), QUIET).checkpoint
    assert {result.dtype(name) for name in result} == {torch.bfloat16}


# Each start against numpy, written from the paper alone: explicit pairs, loops over heads, no shared code.


class Layer:
    """One layer's weights per head, and the moments of its inputs, as numpy arrays."""

    def __init__(self, config: ModelConfig) -> None:
        checkpoint = checkpoint_of(config)
        prefix = "model.layers.0.self_attn."
        self.config = config
        self.part = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        decoder = load_decoder(checkpoint)
        inputs = next(layer_inputs(decoder, tokens()))
        self.moments: Moments = inputs.moments()
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


def test_refitting_the_output_never_loses_on_the_calibration_tokens() -> None:
    checkpoint, options = checkpoint_of(MHA), ConvertOptions(1)
    decoder = load_decoder(checkpoint)
    moments = [inputs.moments() for inputs in layer_inputs(decoder, tokens())]
    config, tensors = convert(checkpoint.tensors, MHA, options, moments)
    bare = load_decoder(replace(checkpoint, config=config, tensors=tensors))
    fitted = load_decoder(convert_checkpoint(checkpoint, options, tokens(), QUIET).checkpoint)
    target = decoder(tokens()).hidden_states[-1]
    losses = [(model(tokens()).hidden_states[-1] - target).square().mean() for model in (bare, fitted)]
    assert losses[1] < losses[0]


def test_cluster_finds_the_partition_of_least_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(6, 6, generator=generator).double()
    losses = (noise + noise.T) / 10
    for a, b in itertools.product(range(6), repeat=2):
        losses[a, b] += float(a % 2 != b % 2)  # the even and the odd ones belong together
    losses.fill_diagonal_(0)
    assert partition(losses, [[0, 1, 2], [3, 4, 5]]) == [[0, 2, 4], [1, 3, 5]]


def test_cluster_puts_equal_heads_together_and_reorders_queries_with_their_outputs() -> None:
    plain = checkpoint_of(MHA)
    tensors = dict(plain.tensors)
    for layer, name in itertools.product(range(2), "kv"):
        weight = tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"].view(6, 16, 48).clone()
        weight[[2, 4]], weight[[3, 5]] = weight[0].clone(), weight[1].clone()  # heads 0, 2, 4 are equal, and 1, 3, 5
        tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = weight.view(96, 48)
    checkpoint = replace(plain, tensors=tensors)
    clustered = convert_checkpoint(checkpoint, ConvertOptions(2, "mean", "cluster"), tokens(), QUIET)
    contiguous = convert_checkpoint(checkpoint, ConvertOptions(2, "mean"), tokens(), QUIET)
    assert max(clustered.errors) < 1e-10 < min(contiguous.errors)
    assert (logits(clustered.checkpoint) - logits(checkpoint)).abs().max() < 1e-5


def test_groups_need_not_divide_the_key_value_heads() -> None:
    config = replace(MHA, num_attention_heads=12, num_key_value_heads=4, hidden_size=48, head_dim=16)
    svd, mean = (sum(converted(config, 3, init).errors) for init in ("svd", "mean"))
    assert 0 < svd < mean


@pytest.mark.parametrize("name", ["plain", "biases", "GQA", "q/k norm"])
def test_transformers_loads_the_result_and_computes_the_same(name: str, tmp_path: Path) -> None:
    result = converted(VARIANTS[name], 1).checkpoint
    save_hf(tmp_path / "out", result, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        difference = (theirs(tokens(2, 24)).logits - logits(open_checkpoint(tmp_path / "out"))).abs().max()
    assert difference < 1e-4  # float32, logits of up to 10, another order of summation


def test_the_models_own_text_is_repeatable_and_follows_its_distribution() -> None:
    checkpoint = checkpoint_of(MHA)
    decoder = load_decoder(checkpoint)
    text = calibration_tokens(checkpoint, decoder, count=1024, length=32)
    assert text.shape == (32, 32)
    assert torch.equal(text, calibration_tokens(checkpoint, decoder, count=1024, length=32))
    own = torch.nn.functional.cross_entropy(decoder(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
    other = tokens(32, 32)
    random = torch.nn.functional.cross_entropy(decoder(other[:, :-1]).logits.flatten(0, 1), other[:, 1:].flatten())
    assert own < random - 1


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (4, "--kv-heads: 4 does not divide the 6 query heads. Choose 1, 2, 3, 6."),
        (0, "--kv-heads: 0 does not divide the 6 query heads. Choose 1, 2, 3, 6."),
        (12, "--kv-heads: 12 key/value heads are more than the 6 that there are. Choose 1, 2, 3, 6."),
    ],
)
def test_impossible_numbers_of_heads(heads: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        converted(MHA, heads)
    assert str(error.value) == message


def test_statistics_are_asked_for_where_they_are_needed() -> None:
    checkpoint = checkpoint_of(MHA)
    config, _ = convert(checkpoint.tensors, MHA, ConvertOptions(2, "mean"), [None, None])
    assert config == replace(MHA, num_key_value_heads=2)
    with pytest.raises(InputError, match="needs calibration statistics"):
        convert(checkpoint.tensors, MHA, ConvertOptions(2, "svd"), [None, None])


def test_q_k_norm_says_what_is_not_valid() -> None:
    assert "aligned by signs" in converted(VARIANTS["q/k norm"], 1).notes[0]
    assert not converted(MHA, 1).notes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "mha"
    save_hf(path, checkpoint_of(MHA), torch.float32)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(main, ["convert", *map(str, arguments), "-o", str(tmp_path / "out")])


SMALL = ("--calibration-tokens", 256, "--calibration-length", 32)


def test_the_command_writes_a_checkpoint_and_its_errors(source: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    result = run(source, "--kv-heads", 2, "--json", "--report", tmp_path / "report.json", *SMALL)
    assert result.exit_code == 0, result.output
    assert open_checkpoint(tmp_path / "out").config == replace(MHA, num_key_value_heads=2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["layer_errors"]) == 2
    assert report["calibration_tokens"] == 256
    assert 0 < report["mean_error"] < 1


def test_the_command_prints_each_layers_error(source: Path, run: Callable[..., Any]) -> None:
    result = run(source, "--kv-heads", 1, "--init", "mean", *SMALL)
    assert result.exit_code == 0, result.output
    assert "mean" in result.stderr.partition("layer")[2]
    assert result.stdout.startswith("wrote ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kv-heads", 4), "4 does not divide the 6 query heads"),
        (("--kv-heads", 12), "more than the 6 that there are"),
        (
            ("--kv-heads", 2, "--init", "median"),
            "--init: 'median' is unknown. Choose random, first, mean, procrustes, svd.",
        ),
        (("--kv-heads", 2, "--grouping", "odd"), "--grouping: 'odd' is unknown. Choose contiguous, cluster."),
        ((), "nothing to convert. Give --kv-heads, --ffn, or both."),
        (("--kv-heads", 2, "--calibration-tokens", 0), "calibration tokens is 0"),
        (("--kv-heads", 2, "--calibration-length", 1), "calibration length is 1"),
        (("--kv-heads", 2, "--data", __file__), "the checkpoint has no tokenizer.json"),
        (("--kv-heads", 2, "--report", "nowhere/report.json"), "is no directory"),
    ],
)
def test_bad_input_is_one_line(
    source: Path, run: Callable[..., Any], tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    result = run(source, *arguments, "--quiet")
    assert result.exit_code == 2
    assert result.stderr.startswith("headfold: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept(source: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "already exists" in run(source, "--kv-heads", 2).stderr


def test_every_start_is_documented_in_the_help() -> None:
    text = CliRunner().invoke(main, ["convert", "--help"]).output
    assert all(init in text for init in INITS)
