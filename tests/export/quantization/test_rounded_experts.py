"""Experts in few bits: proven, as small as they should be, in the file what the record says, and a fault in the file is caught."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from block_models import run
from random_transformers import random_model, save_random

from headfold.export.engine.lowering import lower_model
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.rounded import RoundedTensors
from headfold.export.exportables.rounding_record import digest
from headfold.export.graph.experts import experts_nodes
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import load_model
from headfold.export.model.rounding import Rounded, forms_of, restored, rounded
from headfold.export.model.storing import unpacked
from headfold.export.parity.exact.experts import prove_experts
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.export.quantization.products import round_weights, roundable, set_level_in_file, transposed
from headfold.plugins.experts.schema import DOMAIN, QUANTIZED, QUANTIZED_INPUTS
from headfold.runtime import load
from headfold.runtime.errors import BuildError
from headfold.runtime.manifest import MODEL, read_manifest

PROMPT = np.random.default_rng(0).integers(3, 300, 21)
SIZES: dict[str, dict[str, Any]] = {  # of whole blocks
    "mixtral": {"intermediate_size": 64, "num_hidden_layers": 2},
    "gpt_oss": {
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

FLOATS = {"mixtral": 2, "gpt_oss": 6}  # routers, and experts' biases


@dataclass(frozen=True)
class Made:
    """A bundle with rounded weights, and the model's directory."""

    model: Path
    bundle: Path

    def tensors(self) -> dict[str, dict[str, object]]:
        found = json.loads((self.bundle / "weights.json").read_text())["tensors"]
        return {name: tensor for name, tensor in found.items() if "experts" in name}

    def stored(self, name: str) -> Rounded:
        """Of an expert's matrix, as the file has it, rows in the checkpoint's order."""
        values = {name: x.const_value.numpy() for name, x in ir.load(self.bundle / MODEL).graph.initializers.items()}
        bits, end = self.tensors()[name]["bits"], ".alternating"
        parts = []
        for part in (f"{name}.int{bits}", f"{name}.int{bits}.scales"):
            found = values.get(part)
            if found is None:
                found = np.concatenate((values[part + end][:, ::2], values[part + end][:, 1::2]), 1)
            parts.append(torch.from_numpy(found.copy()))
        numbers = torch.stack([unpacked(matrix, bits) for matrix in parts[0]])
        return Rounded(bits, numbers, parts[1], transposed=bool(self.tensors()[name]["transposed"]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @cache
    def of(model_type: str, scheme: str) -> Made:
        path = tmp_path_factory.mktemp(model_type)
        save_random(model_type, path / "model", **SIZES[model_type])
        options = ["--weights", scheme, "--max-kl", "9", *(["--rounding", "nearest"] if scheme == "int4" else [])]
        code, output = run("export", path / "model", "-o", path / "out", *options)
        assert code == 0, output
        assert f"\n{FLOATS[model_type]} tensors stay floats" in output
        return Made(path / "model", path / "out")

    return of


CASES = [
    ("mixtral", "int8"),
    pytest.param("gpt_oss", "int4", marks=pytest.mark.slow),
    pytest.param("mixtral", "int4", marks=pytest.mark.slow),
    pytest.param("gpt_oss", "int8", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model_type", "scheme"), CASES)
def test_a_mixture_is_proven_and_computes_with_what_its_file_holds(model_type, scheme, made, capfd) -> None:
    out, bits = made(model_type, scheme), {"int8": 8, "int4": 4}[scheme]
    assert read_manifest(out.bundle).parity["passed"]
    assert {(x["bits"], x["method"]) for x in out.tensors().values()} == {(bits, "nearest")}
    assert len(out.tensors()) == 2 * 2
    code, output = run("verify", out.bundle, "--against", out.model, "-q")
    assert code == 0, output
    graph = ir.load(out.bundle / MODEL)
    assert [(x.domain, x.op_type) for x in graph.functions[DOMAIN, QUANTIZED, ""]] == [("com.microsoft", "QMoE")]
    assert len(experts_nodes(graph)) == 2
    model = random_model(model_type, **SIZES[model_type])
    for name, tensor in json.loads((out.bundle / "weights.json").read_text())["tensors"].items():
        parameter = model.get_parameter(name)
        if name in out.tensors():
            assert digest(out.stored(name)) == out.tensors()[name]["sha256"]
            parameter.data = restored(out.stored(name)).contiguous()
        else:  # embedding, head, and products, whose own tests look at the file
            parameter.data = restored(rounded(parameter, tensor["bits"], torch.float16))
    set_level_in_file(out.bundle / MODEL, 1)
    capfd.readouterr()
    opened = load(out.bundle, check=False)
    assert capfd.readouterr() == ("", "")  # ONNX Runtime warns where it cannot round the inputs of eight bits
    logits = opened.backend.prefill(opened.backend.new_cache(1, 32), 0, PROMPT)
    np.testing.assert_allclose(logits, model(torch.tensor(PROMPT)[None]).logits[0, -1], atol=1e-4)
    set_level_in_file(out.bundle / MODEL, 4)


@pytest.mark.parametrize(("model_type", "scheme"), CASES)
def test_experts_take_no_more_room_than_their_bits(model_type, scheme, made) -> None:
    out, bits = made(model_type, scheme), {"int8": 8, "int4": 4}[scheme]
    values = ir.load(out.bundle / MODEL).graph.initializers
    found = {name: x for name, x in values.items() if "experts" in name and "bias" not in name}
    numbers = sum(
        x.numel()
        for name, x in random_model(model_type, **SIZES[model_type]).named_parameters()
        if name in out.tensors()
    )
    assert sum(x.const_value.nbytes for x in found.values()) == numbers * bits // 8 + numbers // 32 * 4


def test_a_wrong_scale_in_the_file_is_caught(made, tmp_path) -> None:
    out = made("mixtral", "int8")
    shutil.copytree(out.bundle, tmp_path / "bundle")
    scales = experts_nodes(load_model(out.bundle / MODEL))[1].inputs[QUANTIZED_INPUTS.index("down_scales")]
    with (tmp_path / "bundle" / f"{MODEL}.data").open("r+b") as file:
        file.seek(scales.const_value.offset + 4 * 100)
        number = np.frombuffer(file.read(4), np.float32)
        file.seek(-4, 1)
        file.write((number * np.float32(1.01)).tobytes())
    source, manifest = open_exportable(out.model, "transformers"), read_manifest(out.bundle)
    report = verify_bundle(tmp_path / "bundle", source, manifest, 4, Reporter(quiet=True))
    wrong = next(check for check in report.checks if not check.passed)
    assert (wrong.name, wrong.note) == ("weights, bit for bit", "1 of 1,152 numbers differ")
    assert wrong.worst == scales.name


@pytest.mark.slow
def test_another_layers_scales_are_named(tmp_path) -> None:
    save_random("qwen3_moe", tmp_path / "model", moe_intermediate_size=64, num_hidden_layers=2)
    source = open_exportable(tmp_path / "model", "transformers")
    tensors = source.tensors(torch.float32)
    model, again = (export_graph(source, tensors, torch.float32, 64) for _ in range(2))
    groups = roundable(model)
    layer = tuple(f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
    assert [groups[name] for name in layer] == [layer] * 2
    assert not any(".mlp.gate." in name for name in groups)
    round_weights(
        model,
        RoundedTensors(tensors, forms_of(dict.fromkeys(groups, 4), tensors.shapes(), transposed=transposed(model))),
    )
    assert prove_experts(model, again).passed
    first, second, *_ = experts_nodes(model)
    place = QUANTIZED_INPUTS.index("gate_up_scales")
    second.replace_input_with(place, first.inputs[place])
    found = prove_experts(model, again)
    assert not found.passed
    assert "gate_up_scales is model.layers.0" in found.note
    with pytest.raises(BuildError, match="a mixture of experts"):
        lower_model(model, tmp_path, "native", 64)


def test_a_router_behind_rows_of_two_widths_is_the_same(tmp_path) -> None:
    sizes = {"moe_intermediate_size": 64, "num_hidden_layers": 1}
    source, name = open_exportable(save_random("qwen3_moe", tmp_path / "model", **sizes)), "model.embed_tokens.weight"
    tensors = source.tensors(torch.float32)
    graph, again = (export_graph(source, tensors, torch.float32, 64, False, None, False) for _ in range(2))
    forms = forms_of({name: 4}, tensors.shapes(), wide_rows={name: 64})
    round_weights(graph, RoundedTensors(tensors, forms))
    assert prove_experts(graph, again).passed
    least = next(node for node in graph.graph if node.op_type == "Min")
    less = next(node for node, _ in least.inputs[0].uses() if node.op_type == "Less")
    less.replace_input_with(0, least.outputs[0])
    check = prove_experts(graph, again)
    assert (check.passed, check.worst, check.note) == (False, "experts 0", "are chosen in another way")


@pytest.mark.slow
def test_mixed_gives_the_experts_of_a_layer_one_width(tmp_path) -> None:
    save_random("qwen3_moe", tmp_path / "model", moe_intermediate_size=64, num_hidden_layers=2)
    options = ("--weights", "mixed", "--bits", "6", "--max-kl", "9")
    code, output = run("export", tmp_path / "model", "-o", tmp_path / "out", *options)
    assert code == 0, output
    assert "experts of four bits are the nearest numbers" in output
    tensors = Made(tmp_path / "model", tmp_path / "out").tensors()
    for layer in range(2):
        assert len({x["bits"] for name, x in tensors.items() if f"layers.{layer}." in name}) == 1
    assert read_manifest(tmp_path / "out").weights.bits <= 6


def test_experts_the_checkpoint_has_transposed_are_rounded_along_their_inputs() -> None:
    weight = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))  # [E, K, N]
    found = rounded(weight, 8, transposed=True)
    assert found.values.shape == (3, 96, 64)
    for expert in range(3):
        alone = rounded(weight[expert].T, 8)
        assert torch.equal(found.values[expert], alone.values)
        assert torch.equal(restored(found)[expert], restored(alone).T)
