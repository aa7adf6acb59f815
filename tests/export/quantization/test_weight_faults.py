"""What is wrong with rounded weights is seen: by the proof, by the gate, by their record; and what cannot be is refused in a line."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from block_models import CONFIG, checkpoint, rounding, run

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.rounded import RoundedTensors, StoredTensors
from headfold.export.exportables.rounding_record import record_of
from headfold.export.graph.bodies import quantized_products
from headfold.export.graph.weights import load_model
from headfold.export.model.rounding import Form, rounded
from headfold.export.parity.exact.rounding import prove_rounding
from headfold.export.parity.exact.weights import prove_weights
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.cost import Reference, reference, weights_cost
from headfold.export.quantization.gate import pass_gate
from headfold.export.quantization.rounding import WeightRounding
from headfold.export.quantization.running import Running
from headfold.plugins.attention.schema import TABLES
from headfold.runtime.errors import BundleError, ConfigError, VerificationError
from headfold.runtime.manifest import QuantizationSpec, read_manifest


def test_scales_that_float16_does_not_hold_are_seen_by_the_proof(bundle, source) -> None:
    class Other(StoredTensors):
        def read(self, name: str) -> torch.Tensor:
            return super().read(name) * (1 + 1e-5 if name.endswith(".scales") else 1)

    model = load_model(bundle / "model.onnx")
    for made, passes in ((StoredTensors, True), (Other, False)):
        check = prove_weights(model, made(rounding(source)), torch.float32, TABLES, [])
        assert check.passed == passes
        assert "is FLOAT16 [" in check.note or passes


def test_a_model_with_outliers_is_refused_in_four_bits_and_what_the_message_says_helps(tmp_path) -> None:
    save_hf(tmp_path / "source", checkpoint(CONFIG, outlier=10), torch.float32)
    code, output = run("export", tmp_path / "source", "-o", tmp_path / "int4", "--weights", "int4", "-q")
    assert code == 1
    assert "int4 weights cost more than 0.1 nats: KL " in output
    assert "Use --weights mixed or int8, or allow it with --max-kl. No bundle was written." in output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    for scheme in ("int8", "mixed"):
        code, output = run("export", tmp_path / "source", "-o", tmp_path / scheme, "--weights", scheme, "-q")
        assert code == 0, output


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_wrong_scale_is_seen_by_the_proof_and_by_the_gate(name, bundle, source, tmp_path) -> None:
    model = ir.load(bundle / "model.onnx")
    value = next(v for n, v in model.graph.initializers.items() if n.startswith(name) and n.endswith(".scales"))
    value.const_value = ir.tensor(3 * value.const_value.numpy())
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    shutil.copy(bundle / "weights.json", tmp_path)
    manifest = read_manifest(bundle)
    decoder = load_decoder(open_checkpoint(source))
    before = reference(decoder, torch.arange(160).view(5, 32))
    assert weights_cost(bundle, manifest, before).kl < 0.1
    with pytest.raises(
        VerificationError, match=r"int4 weights cost more than 0\.1 nats: KL .* Use --weights mixed or int8"
    ):
        pass_gate(tmp_path, manifest, before, list, Reporter(quiet=True))

    report = verify_bundle(tmp_path, OwnModel(open_checkpoint(source)), manifest, 4, Reporter(quiet=True))
    failed = [check.name for check in report.checks if not check.passed]
    assert "weights, bit for bit" in failed
    assert len(failed) > 1  # the arithmetic is wrong, too


@pytest.mark.parametrize(
    ("kl", "dtype", "spec", "helps"),
    [
        (
            0.2,
            "float32",
            {"scheme": "mixed", "bits": 6.0},
            "Use --weights int8, or --bits over 6, or allow it with --max-kl",
        ),
        (0.2, "float32", {"scheme": "mixed", "bits": 8.0}, "Leave --weights out, or allow it with --max-kl"),
        (0.2, "float16", {"scheme": "int8", "bits": 8.0}, "Use --dtype float32, or leave --weights out, or allow it"),
        (0.2, "float32", {"scheme": "fp8", "bits": 8.0}, "Use --weights int8, or allow it with --max-kl"),
        (0.2, "float32", {"scheme": "nvfp4", "bits": 4.0}, "Use --weights int8, or allow it with --max-kl"),
        (np.nan, "float16", {"scheme": "int8", "bits": 8.0}, "It computes NaN: use --dtype float32. No"),
        (np.nan, "float32", {"scheme": "int4", "bits": 4.0}, "It computes NaN: leave --weights out. No"),
    ],
)
def test_the_gate_recommends_what_can_help(kl, dtype, spec, helps, bundle, tmp_path, monkeypatch) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(bundle / name, tmp_path)
    manifest = read_manifest(bundle)
    cost = manifest.weights.cost.model_copy(update={"kl": kl})
    monkeypatch.setattr("headfold.export.quantization.gate.weights_cost", lambda *_: cost)
    manifest = manifest.model_copy(update={"dtype": dtype, "weights": manifest.weights.model_copy(update=spec)})
    with pytest.raises(VerificationError) as caught:
        pass_gate(tmp_path, manifest, None, list, Reporter(quiet=True))
    assert helps in str(caught.value)


@pytest.mark.parametrize(
    ("cache", "helps"),
    [
        (0.05, "Use --weights mixed or int8, or allow it with --max-kl."),
        (
            0.15,
            "Leave --kv-cache out, which alone cost 0.15 nats on the text that it was calibrated on; if that is not",
        ),
        (0.35, "enough: use --weights mixed or int8, or allow it with --max-kl."),
    ],
)
def test_the_gate_says_what_is_the_caches(cache, helps, bundle, tmp_path, monkeypatch) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(bundle / name, tmp_path)
    manifest = read_manifest(bundle)
    cost = manifest.weights.cost.model_copy(update={"kl": 0.4})
    monkeypatch.setattr("headfold.export.quantization.gate.weights_cost", lambda *_: cost)
    quantization = QuantizationSpec(dtype="int8", calibration_tokens=8, kl=cache, top1=1.0)
    both = manifest.model_copy(update={"cache": manifest.cache.model_copy(update={"quantization": quantization})})
    with pytest.raises(VerificationError, match=r"int4 weights and the int8 cache cost more than") as caught:
        pass_gate(tmp_path, both, None, list, Reporter(quiet=True))
    assert helps in str(caught.value)


@pytest.mark.parametrize(("weights", "tokens"), [("int8", 512), ("int4", 8192)])
def test_a_cache_is_not_calibrated_on_what_is_measured_on(weights, tokens, source, tmp_path, monkeypatch) -> None:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, CONFIG.vocab_size, 20_000))
    measured = list[torch.Tensor]()

    def spy(model: Running, held_out: torch.Tensor) -> Reference:
        measured.append(held_out)
        return reference(model, held_out)

    monkeypatch.setattr("headfold.export.quantization.rounding.reference", spy)
    options = "--kv-cache", "int8", "--calibration-tokens", tokens, "--weights", weights
    data = "--data", tmp_path / "text.npy", "--no-verify", "-q"
    code, output = run("export", source, "-o", tmp_path / "out", *options, *data)
    assert code == 0, output
    calibrated = json.loads((tmp_path / "out" / "calibration.json").read_text())["token_ids"]
    assert abs(np.size(calibrated) - tokens) <= 256
    held_out = measured[0].tolist()
    assert np.size(held_out) == 2048
    assert not [row for row in held_out if row in calibrated]


def test_a_perplexity_without_end_is_a_number(bundle, source) -> None:
    before = reference(load_decoder(open_checkpoint(source)), torch.arange(160).view(5, 32))
    cost = weights_cost(bundle, read_manifest(bundle), replace(before, logits=1e4 * before.logits))
    assert cost.perplexity_before == pytest.approx(np.finfo(np.float64).max)
    assert "Infinity" not in json.dumps(cost.model_dump())


@pytest.mark.parametrize(
    ("costs", "cost", "wide"),
    [  # what it costs with inputs in eight bits; with floats by all of four bits; by the first product; by two; by those of eight, too
        ([0.005], 0.005, {}),
        ([0.05, 0.045], 0.05, {}),
        ([0.05, 0.01, 0.012], 0.012, {4: 1}),
        ([0.05, 0.01, 0.04, 0.02], 0.02, {4: 2}),
        ([0.05, 0.01, 0.04, 0.03], 0.01, {4: 10}),
        ([0.5, 0.3, 0.02], 0.02, {4: 10, 8: 1}),
    ],
)
def test_inputs_stay_floats_only_where_that_helps(costs, cost, wide, bundle, source, tmp_path, monkeypatch) -> None:
    shutil.copytree(bundle, tmp_path, dirs_exist_ok=True)
    manifest = read_manifest(bundle)
    spec, left = manifest.weights, iter(costs)
    monkeypatch.setattr(
        "headfold.export.quantization.gate.weights_cost", lambda *_: spec.cost.model_copy(update={"kl": next(left)})
    )
    worst = [f"model.layers.{layer}.{name}_proj.weight" for layer in (1, 0) for name in ("mlp.down", "self_attn.o")]
    passed = pass_gate(tmp_path, manifest, None, lambda: worst + ["none"] * 4, Reporter(quiet=True))
    assert next(left, None) is None  # as many were measured
    assert (passed.cost.kl, passed.accuracy_level) == (cost, 1 if wide else 4)
    products = quantized_products(load_model(tmp_path / "model.onnx"))
    exact = [node for node in products if node.attributes["accuracy_level"].as_int() == 1]
    assert Counter(node.attributes["bits"].as_int() for node in exact) == wide
    assert all(worst[0] in str(node) for node in exact) or len(exact) > 1
    manifest = manifest.model_copy(update={"weights": passed})
    report = verify_bundle(tmp_path, OwnModel(open_checkpoint(source)), manifest, 4, Reporter(quiet=True))
    assert report.passed


def test_the_product_whose_inputs_have_outliers_takes_floats_and_the_others_do_not(tmp_path) -> None:
    """One input of three thousand times the others' size: rounded to eight bits, the other 31 of its block are zeros."""
    original = checkpoint(CONFIG)
    tensors = {name: original.read(name) for name in original}
    up, down = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("up", "down"))
    up[5] *= 3000
    down[:, 5] /= 3000
    save_hf(tmp_path / "source", MemoryCheckpoint(tmp_path, original.config, tensors), torch.float32)
    options = ("--weights", "int4", "--rounding", "nearest", "--max-kl", "9", "-q")
    code, output = run("export", tmp_path / "source", "-o", tmp_path / "int4", *options)
    assert code == 0, output
    assert read_manifest(tmp_path / "int4").weights.accuracy_level == 1
    products = quantized_products(load_model(tmp_path / "int4" / "model.onnx"))
    exact = [node for node in products if node.attributes["accuracy_level"].as_int() == 1]
    assert ["layers.1.mlp.down_proj" in str(node) for node in exact] == [True]


@pytest.mark.parametrize("part", ["int4", "int4.scales"])
def test_weights_that_no_rule_finds_are_held_to_their_record(part, mixed, source, tmp_path) -> None:
    shutil.copytree(mixed, tmp_path, dirs_exist_ok=True)
    model = ir.load(mixed / "model.onnx")
    value = next(v for n, v in model.graph.initializers.items() if n.endswith(f"down_proj.weight.{part}"))
    changed = value.const_value.numpy().copy()
    changed[0, 0] = 3 * changed[0, 0] if "scales" in part else changed[0, 0] ^ 1
    value.const_value = ir.tensor(changed)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    report = verify_bundle(tmp_path, OwnModel(open_checkpoint(source)), read_manifest(mixed), 4, Reporter(quiet=True))
    failed = {check.name: check.note for check in report.checks if not check.passed}
    assert failed == {"weights by GPTQ, relative squared error": "is not what GPTQ found"}


def test_a_checkpoint_that_was_trained_on_is_another(mixed, source) -> None:
    original, nudged = open_checkpoint(source), {}
    for name in original:
        nudged[name] = original.read(name) * (1.001 if name.endswith("layers.1.mlp.down_proj.weight") else 1)
    tuned = OwnModel(MemoryCheckpoint(source, original.config, nudged))
    report = verify_bundle(mixed, tuned, read_manifest(mixed), 4, Reporter(quiet=True))
    failed = {check.name: check.note for check in report.checks if not check.passed}
    assert failed == {"weights by GPTQ, relative squared error": "is not as far from the checkpoint's as it was"}


@pytest.mark.parametrize(("share", "passes"), [(0.1, True), (0.4, True), (0.8, False), (1.0, False)])
def test_a_weight_that_is_not_the_checkpoints_is_refused_whatever_its_record_says(share, passes, source) -> None:
    original, name = open_checkpoint(source), "model.layers.1.mlp.down_proj.weight"
    weight, other = original.read(name), torch.randn(original.shapes()[name], generator=torch.manual_seed(0))
    changed = weight + share * other * weight.norm() / other.norm()  # squared error: the square of the share
    found = RoundedTensors(original, {name: Form(4)}, {name: rounded(changed, 4)})
    assert prove_rounding(found, record_of(found, {}).tensors).passed == passes


@pytest.mark.parametrize("length", [None, 1000])
def test_weights_that_are_cut_short_or_missing_are_one_line(length, bundle, tmp_path) -> None:
    shutil.copy(bundle / "model.onnx", tmp_path)
    if length is not None:
        (tmp_path / "model.onnx.data").write_bytes((bundle / "model.onnx.data").read_bytes()[:length])
    with pytest.raises(BundleError, match=r"model\.onnx\.data does not hold .*\. Export it again"):
        load_model(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "int4", "--allow-nan"), "--allow-nan: does not go with weights of four or eight bits"),
        (("--weights", "int4", "--capacity", "1"), "--capacity 1: is too short to measure rounded weights on"),
        (("--weights", "int8", "--bits", "5"), "--bits: is for weights of either width. Add --weights mixed."),
        (("--weights", "int8", "--rounding", "gptq"), "--rounding: is for weights of four bits."),
        (("--max-kl", "0.2"), "--max-kl: is for rounded weights or a quantized cache. Add --weights int8, or"),
    ],
)
def test_what_does_not_go_together_is_one_line(options, message, source, tmp_path) -> None:
    code, output = run("export", source, "-o", tmp_path / "no", *options)
    assert code == 2
    assert message in output
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "--weights: 'int3' is not known. Choose one of int8, "),
        ({"scheme": "int4", "block_size": 48}, "--block-size: 48 is not known. Choose one of 32, 64, 128."),
        ({"scheme": "int4", "method": "best"}, "--rounding: 'best' is not known"),
        ({"scheme": "int4", "max_kl": np.nan}, "--max-kl: is nan. It must be positive"),
        ({"scheme": "int4", "max_kl": 0.0}, "--max-kl: is 0"),
        ({"scheme": "mixed", "bits": np.nan}, "--bits: is nan. It must lie between 4 and 8."),
        ({"scheme": "int8", "bits": 5.0}, "--bits: is for weights of either width"),
        ({"scheme": "int8", "block_size": 32.0}, "--block-size: 32.0 is not known"),
        (
            {"scheme": "int8", "data": ["corpus.txt"]},
            "WeightRounding.data: is ['corpus.txt']. Input should be a valid tuple.",
        ),
        ({"scheme": "int8", "max_kl": "1"}, "WeightRounding.max_kl: is '1'. Input should be a valid number."),
    ],
)
def test_what_a_caller_may_not_ask_for_is_one_line(options, message) -> None:
    with pytest.raises(ConfigError) as caught:
        WeightRounding(**options)
    assert message in str(caught.value)


def test_text_that_is_not_there_is_told_before_the_work_begins(source, tmp_path) -> None:
    data = tmp_path / "none.npy"
    code, output = run("export", source, "-o", tmp_path / "no", "--weights", "int8", "--data", data)
    assert code == 2
    assert f"{data}: is no array of numpy" in output
    assert "trace the graph" not in output


def test_a_model_without_whole_blocks_is_refused_and_what_needs_none_is_named(tmp_path) -> None:
    small = replace(CONFIG, hidden_size=48, intermediate_size=80, num_attention_heads=3, num_key_value_heads=1)
    save_hf(tmp_path / "source", checkpoint(small), torch.float32)
    code, output = run("export", tmp_path / "source", "-o", tmp_path / "no", "--weights", "int8")
    assert code == 2
    assert (
        "no weight has blocks of 32 inputs, so none can be rounded. Use --weights w8a8 or fp8, which need none"
        in output
    )
    for scheme in ("w8a8", "fp8"):
        code, output = run("export", tmp_path / "source", "-o", tmp_path / scheme, "--weights", scheme, "--max-kl", "9")
        assert code == 0, output
        assert f"{scheme} weights, the head's inputs in eight bits: KL " in output


def test_a_model_of_one_token_is_not_told_to_take_more(tmp_path) -> None:
    save_hf(tmp_path / "source", checkpoint(replace(CONFIG, max_position_embeddings=1)), torch.float32)
    code, output = run("export", tmp_path / "source", "-o", tmp_path / "no", "--weights", "int8")
    assert code == 2
    assert "is for one token, too few to measure rounded weights on. Leave --weights out." in output


def test_verify_measures_the_cost_on_text_of_ones_own(bundle, source, tmp_path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 160, 400))
    given = ("verify", tmp_path / "bundle", "--against", source, "--data", tmp_path / "text.npy")
    code, output = run(*given, "--json", "-q")
    assert code == 0, output
    cost = json.loads(output)["weights_cost"]
    assert cost["tokens"] >= 256
    assert 0 < cost["kl"] < read_manifest(bundle).weights.max_kl
    content = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    content["weights"]["max_kl"] = content["weights"]["cost"]["kl"] = cost["kl"] / 2  # as if it had been less there
    content["parity"] = None
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(content))
    code, output = run(*given, "-q")
    assert code == 1
    assert f"its weights cost {cost['kl']:.3g} nats on {tmp_path / 'text.npy'}, and its export allowed" in output


def test_verify_measures_what_a_bundle_costs_behind_prompts_that_another_reads(bundle, source, tmp_path) -> None:
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(0, 160, 400))
    assert run("export", source, "-o", tmp_path / "exact", "--no-verify", "-q")[0] == 0
    given = ("verify", bundle, "--against", source, "--data", tmp_path / "text.npy", "--json", "-q")
    costs = []
    for more in ((), ("--prefill", bundle), ("--prefill", tmp_path / "exact")):
        code, output = run(*given, *more)
        assert code == 0, output
        costs.append(json.loads(output)["weights_cost"])
    alone, itself, exact = costs
    assert itself["tokens"] == exact["tokens"] < alone["tokens"]  # the second halves, and the last tokens of the first
    assert itself["greedy_tokens"] == alone["greedy_tokens"]
    assert 0 < exact["kl"] < 0.9 * itself["kl"]  # what the prompts' weights cost is not among it
    code, output = run(*given[:4], "--prefill", bundle)
    assert (code, "Add --data." in output) == (2, True)
    other = tmp_path / "other"
    save_hf(other, checkpoint(replace(CONFIG, norm_eps=0.5)), torch.float32)
    assert run("export", other, "-o", tmp_path / "reader", "--no-verify", "-q")[0] == 0
    code, output = run(*given, "--prefill", tmp_path / "reader")
    assert (code, "its norm_eps is 0.5" in output) == (2, True)
