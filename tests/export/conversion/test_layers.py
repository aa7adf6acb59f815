"""Conversion to fewer key/value heads: the identity at equal heads, the grouping, the command, transformers as a second reader."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from multi_head_toy import MHA, QUIET, VARIANTS, checkpoint_of, converted, logits, tokens
from transformers import AutoModelForCausalLM

from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.cli import main
from headfold.export.conversion import checkpoint as conversion
from headfold.export.conversion.checkpoint import convert_checkpoint
from headfold.export.conversion.heads import INITS
from headfold.export.conversion.layers import ConvertOptions, attention_prefix, convert_layer, partition
from headfold.export.data.calibration import calibration_tokens
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.runtime.errors import ConfigError, InputError

variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


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


def test_refitting_the_output_never_loses_on_the_calibration_tokens(monkeypatch) -> None:
    checkpoint, options = checkpoint_of(MHA), ConvertOptions(1)
    decoder = load_decoder(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "refit", lambda _, converted: converted.o_proj.weight.double())
        bare = load_decoder(convert_checkpoint(checkpoint, options, tokens(), QUIET).checkpoint)
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
    text = calibration_tokens(checkpoint.tokenizer.definition, decoder, count=1024, length=32)
    assert text.shape == (32, 32)
    assert torch.equal(text, calibration_tokens(checkpoint.tokenizer.definition, decoder, count=1024, length=32))
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
    prefix = attention_prefix(0)
    part = {n.removeprefix(prefix): x for n, x in checkpoint_of(MHA).tensors.items() if n.startswith(prefix)}
    assert convert_layer(part, MHA, ConvertOptions(2, "mean"), None, 0)["k_proj.weight"].shape == (32, 48)
    with pytest.raises(InputError, match="needs calibration statistics"):
        convert_layer(part, MHA, ConvertOptions(2, "svd"), None, 0)


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_few_calibration_sequences_are_not_learnt_by_heart(sequences: int) -> None:
    checkpoint = checkpoint_of(MHA)
    held_out = torch.randint(0, MHA.vocab_size, (8, 16), generator=torch.Generator().manual_seed(5))
    few = tokens()[:sequences]
    target = load_decoder(checkpoint)(held_out).hidden_states[-1]
    result = convert_checkpoint(checkpoint, ConvertOptions(1), few, QUIET).checkpoint
    fitted = (load_decoder(result)(held_out).hidden_states[-1] - target).square().mean()
    first = convert_checkpoint(checkpoint, ConvertOptions(1, "first"), few, QUIET).checkpoint
    plain = (load_decoder(first)(held_out).hidden_states[-1] - target).square().mean()
    assert fitted < plain


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
        (("--kv-heads", 6), "it has 6 key/value heads already"),
        (("--kv-heads", 6, "--init", "mean", "--grouping", "cluster"), "it has 6 key/value heads already"),
        (("--kv-heads", 12), "more than the 6 that there are"),
        (
            ("--kv-heads", 2, "--init", "median"),
            "Invalid value for '--init': 'median' is not one of 'svd', 'procrustes', 'mean', 'first', 'random'.",
        ),
        (
            ("--kv-heads", 2, "--grouping", "odd"),
            "Invalid value for '--grouping': 'odd' is not one of 'contiguous', 'cluster'.",
        ),
        ((), "nothing to convert. Give --kv-heads, --ffn, or both."),
        (("--kv-heads", 2, "--calibration-tokens", 0), "calibration tokens is 0"),
        (("--kv-heads", 2, "--calibration-tokens", 10**13), "calibration tokens is 10000000000000"),
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
