"""The lowered graphs against the master: same inputs, outputs and numbers; one mask for all layers; no op that TensorRT misreads."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from headfold.export.engine.kernels import kernel_spec
from headfold.export.engine.lowering import attention_nodes, lower, spell_out_argmax
from headfold.export.engine.preflight import preflight
from headfold.plugins.attention.schema import ALL_INPUTS, DOMAIN, INPUTS, SINK, TABLES
from headfold.plugins.experts import schema as experts
from headfold.runtime.errors import BuildError, BundleError
from headfold.runtime.manifest import MODEL

CAPACITY = 24  # less than the bundle's


@pytest.fixture(scope="module")
def master(tensorrt_toy) -> Path:
    return tensorrt_toy("float16").bundle / MODEL


@pytest.mark.parametrize("attention", ["native", "plugin"])
def test_inputs_and_outputs_stay_but_the_capacity_is_static(attention, master) -> None:
    original, lowered = ir.load(master), lower(master, attention, CAPACITY)
    for kind in ("inputs", "outputs"):
        before, after = getattr(original.graph, kind), getattr(lowered.graph, kind)
        assert [value.name for value in before] == [value.name for value in after]
        assert [value.dtype for value in before] == [value.dtype for value in after]
        for value in after:
            if value.name.startswith(("past", "present")):
                assert value.shape[2] == CAPACITY


def test_native_has_standard_ops_only_and_computes_its_mask_once_per_window(master) -> None:
    model = lower(master, "native", CAPACITY)
    assert not model.functions
    assert set(model.opset_imports) == {""}
    assert {node.domain for node in model.graph} == {""}
    counts = Counter(node.op_type for node in model.graph)
    assert counts["Attention"] == 2
    assert counts["TensorScatter"] == 4
    assert counts["RotaryEmbedding"] == 4
    assert counts["ArgMax"] == 0
    assert counts["And"] == 2  # one mask with the window of layer 1, one without
    masks = [node.inputs[3].name for node in model.graph if node.op_type == "Attention"]
    assert len(set(masks)) == 2
    assert all("softcap" not in node.attributes for node in model.graph)


def test_plugin_keeps_the_op_and_gives_it_the_mask_for_its_shape(master) -> None:
    model = lower(master, "plugin", CAPACITY)
    nodes = attention_nodes(model)
    assert len(nodes) == 2
    for node in nodes:
        assert node.inputs[INPUTS.index("total_sequence_length")].name == "attention_mask"
        assert node.attributes["plugin_namespace"].as_string() == "headfold"
        assert node.attributes["plugin_version"].as_string() == "1"
    assert [node.attributes["local_window_size"].as_int() for node in nodes] == [-1, 5]


def test_native_computes_what_the_master_computes(master, tmp_path) -> None:
    lowered = lower(master, "native", CAPACITY)
    ir.save(lowered, tmp_path / "model.onnx", external_data="lowered.data")
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 96, (1, 7)), np.array([[0, 0, 1, 1, 1, 1, 1]])
    cache = np.zeros((1, 2, CAPACITY, 16), np.float16)
    results = []
    for path in (master, tmp_path / "model.onnx"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        caches = {node.name: cache for node in session.get_inputs() if node.name.startswith("past")}
        results.append(session.run(None, {"input_ids": ids, "attention_mask": mask} | caches)[0])
    np.testing.assert_allclose(results[0][0, 2:], results[1][0, 2:], atol=5e-3)  # float16's eps is 1e-3; two layers


@pytest.mark.parametrize("keepdims", [0, 1])
def test_spelled_out_argmax_finds_the_first_of_equal_elements(keepdims) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["x"], ["index"], name="argmax", axis=1, keepdims=keepdims),
            helper.make_node("Identity", ["index"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))
    spell_out_argmax(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [-3, -2, -2, -5]])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x.argmax(1, keepdims=bool(keepdims)))


def test_a_graph_without_the_op_is_refused(tmp_path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    ir.save(ir.from_proto(helper.make_model(graph)), tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="has no headfold::GroupedQueryAttention node"):
        lower(tmp_path / "model.onnx", "native", CAPACITY)


def without_rotation(path: Path, master: Path) -> Path:
    model = ir.load(master)
    for node in attention_nodes(model):
        for name in TABLES:
            node.replace_input_with(INPUTS.index(name), None)
    ir.save(model, path)
    return path


def test_a_model_that_rotates_elsewhere_gets_tables_of_no_turn(master, tmp_path) -> None:
    lowered = lower(without_rotation(tmp_path / MODEL, master), "plugin", CAPACITY)
    for node in attention_nodes(lowered):
        cos, sin = (node.inputs[INPUTS.index(name)].const_value.numpy() for name in TABLES)
        assert cos.shape == sin.shape == (CAPACITY, 1)
        assert cos.dtype == np.float16
        assert (cos == 1).all()
        assert (sin == 0).all()
    preflight(lowered, "plugin", master)
    assert kernel_spec(lowered).rotary_dim == 2


@pytest.mark.parametrize("attention", ["native", "plugin"])
@pytest.mark.parametrize("what", ["attention sinks", "a mixture of experts"])
def test_what_headfold_has_not_in_tensorrt_is_named(what, attention, master, tmp_path) -> None:
    model = ir.load(master)
    first = attention_nodes(model)[0]
    if what == "attention sinks":
        first.resize_inputs(ALL_INPUTS.index(SINK) + 1)
        first.replace_input_with(ALL_INPUTS.index(SINK), first.inputs[0])
    else:
        model.graph.append(ir.Node(DOMAIN, experts.OP_TYPE, [first.inputs[0]]))
    ir.save(model, tmp_path / MODEL)
    with pytest.raises(BuildError, match=f"the model has {what}, which headfold has not in TensorRT"):
        lower(tmp_path / MODEL, attention, CAPACITY)
