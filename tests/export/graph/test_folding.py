"""What transformers spells out becomes the op's own RoPE and RMSNormalization; what does not fold stays, and both are proven."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from random_transformers import save_random

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.graph.passes import attention_nodes
from headfold.export.graph.trace import export_graph
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.plugins.attention.schema import AttentionInputs

CAPACITY = 256
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def traced(directory: Path, model_type: str, **changes) -> ir.Model:
    source = open_exportable(save_random(model_type, directory / "model", **changes), "transformers")
    return export_graph(source, source.tensors(torch.float32), torch.float32, CAPACITY)


def tables(model: ir.Model) -> list[tuple[str, str] | None]:
    layers = [AttentionInputs.of_node(node.inputs) for node in attention_nodes(model)]
    return [layer.tables and (layer.tables[0].name, layer.tables[1].name) for layer in layers]


FIRST, SECOND = ("cos_cache", "sin_cache"), ("cos_cache.1", "sin_cache.1")


def test_the_graph_is_that_of_our_own_decoder(tmp_path) -> None:
    model = traced(tmp_path, "llama")
    count = Counter(node.op_type for node in model.graph)
    assert tables(model) == [FIRST] * 3
    assert count["RMSNormalization"] == 7
    assert not {"Cos", "Sin", "Neg", "Pow", "Transpose", "Split"} & set(count)
    assert count["MatMul"] + count["Gemm"] == 3 * 5 + 1  # queries, keys and values are one product
    assert "lm_head.weight" in model.graph.initializers


@pytest.mark.parametrize(
    ("model_type", "expected", "interleaved"),
    [
        pytest.param("gemma3_text", [FIRST, SECOND, FIRST], 0, marks=pytest.mark.slow),
        ("smollm3", [FIRST, SECOND, FIRST], 0),
        ("cohere2", [FIRST, SECOND, FIRST], 1),
    ],
    ids=["two bases", "a layer without RoPE", "interleaved"],
)
def test_layers_have_their_own_tables(model_type, expected, interleaved, tmp_path) -> None:
    model = traced(tmp_path, model_type)
    assert tables(model) == expected
    assert {node.attributes["rotary_interleaved"].as_int() for node in attention_nodes(model)} == {interleaved}


def test_scaled_tables_are_the_models(tmp_path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = traced(tmp_path, "llama", rope_parameters=YARN)
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path / "model"))
    cos, sin = rotary(torch.zeros(1), torch.arange(CAPACITY)[None])
    for name, expected in zip(FIRST, (cos, sin), strict=True):
        np.testing.assert_allclose(model.graph.initializers[name].const_value.numpy(), expected[0, :, :16], atol=1e-5)


def test_what_the_kernel_cannot_rotate_stays_outside(tmp_path) -> None:
    model = traced(tmp_path, "stablelm")  # a quarter of 32
    assert tables(model) == [None] * 3


def test_a_changed_table_is_caught(tmp_path) -> None:
    source = open_exportable(save_random("gemma3_text", tmp_path / "model"), "transformers")
    options, quiet = ExportOptions(verify=False), Reporter(quiet=True)
    manifest = export_bundle(source, tmp_path / "bundle", options, quiet).manifest
    model = ir.load(tmp_path / "bundle" / "model.onnx")
    value = model.graph.initializers["cos_cache.1"]
    changed = value.const_value.numpy().copy()
    changed[100:] = 0
    value.const_value = ir.tensor(changed)
    ir.save(model, tmp_path / "bundle" / "model.onnx", external_data="model.onnx.data")
    report = verify_bundle(tmp_path / "bundle", source, manifest, 4, quiet)
    assert not report.passed
    assert next(check for check in report.checks if check.name == "rotary tables").passed is False
