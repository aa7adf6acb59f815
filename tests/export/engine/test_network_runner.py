"""The network runner: right networks agree with PyTorch, and each kind of wrong one is caught.

The layers themselves are held to ONNX Runtime, one by one.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper, shape_inference

from headfold.export.engine.lowering import attention_nodes, lower
from headfold.export.engine.network_report import open_flavour, parse, report
from headfold.export.engine.network_runner import Network, NetworkRunner, network_candidate
from headfold.export.engine.options import BuildOptions
from headfold.export.exportables.oracle import DecoderOracle
from headfold.export.exportables.own import facts_of
from headfold.export.parity.compare import Candidate, Subject, verify_graph
from headfold.export.parity.probes import make_prompts
from headfold.export.parity.report import ParityReport
from headfold.export.parity.tolerances import Precision
from headfold.export.parity.verify import precision_of
from headfold.export.progress import Reporter
from headfold.plugins.attention import tensorrt_plugin
from headfold.plugins.attention.schema import INPUTS, TABLES
from headfold.runtime.errors import BuildError, HeadfoldError, VerificationError
from headfold.runtime.manifest import MODEL

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def trt():
    return open_flavour("tensorrt-rtx")


def verify(toy, candidate: Candidate) -> ParityReport:
    prompts, oracle = make_prompts(96, 12, None), DecoderOracle(toy.decoder)
    facts, precision = facts_of(toy.decoder.config), precision_of(toy.manifest)
    subject = Subject(toy.bundle / MODEL, facts, precision, True, 40, None, lambda: oracle, lambda _: oracle)
    return verify_graph(subject, prompts, 4, QUIET, candidate)


@pytest.mark.parametrize("attention", ["native", "plugin"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_agrees_with_pytorch(dtype, attention, tensorrt_toy) -> None:
    toy = tensorrt_toy(dtype)
    parity = verify(toy, network_candidate(toy.bundle, toy.manifest, BuildOptions(attention=attention)))
    assert parity.passed, parity.failure()
    names = {check.name for check in parity.checks}
    assert {
        "prefill",
        "decode",
        "chunked prefill",
        "ragged batch, left padding",
        "ragged batch, right padding",
    } <= names


def planted(trt, toy, attention, change_master=None, change_lowered=None) -> Candidate:
    """A network that went past no preflight and no report, with a fault in the master or in the lowered graph."""

    def start(capacity: int) -> NetworkRunner:
        def load() -> Network:
            path = toy.bundle / MODEL
            if change_master is not None:
                master = ir.load(path)
                change_master(master)
                path = path.parent / f"planted-{id(change_master)}.onnx"  # beside its weights
                ir.save(master, path)
            try:
                model = lower(path, attention, toy.manifest.cache.capacity)
                if change_lowered is not None:
                    change_lowered(model)
                return Network(parse(trt, model, path), model, ("hidden_states.0", "hidden_states.1"))
            finally:
                if change_master is not None:
                    path.unlink()

        return NetworkRunner(load)

    return Candidate(start, Precision("tensorrt", toy.manifest.dtype), "planted")


def upper_left(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Attention":
            node.resize_inputs(3)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def no_window(model: ir.Model) -> None:
    for node in attention_nodes(model):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1)


def other_pairing(model: ir.Model) -> None:
    for node in attention_nodes(model):
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def swapped_caches(model: ir.Model) -> None:
    key, value = INPUTS.index("past_key"), INPUTS.index("past_value")
    for node in attention_nodes(model):
        caches = node.inputs[key], node.inputs[value]
        node.replace_input_with(key, caches[1])
        node.replace_input_with(value, caches[0])


FAULTS: dict[str, dict[str, Callable[[ir.Model], None]]] = {
    "upper-left mask": {"change_lowered": upper_left},
    "dropped window": {"change_master": no_window},
    "wrong RoPE pairing": {"change_master": other_pairing},
    "swapped caches": {"change_master": swapped_caches},
}


@pytest.mark.parametrize(
    ("attention", "fault"),
    [
        (attention, fault)
        for attention in ("native", "plugin")
        for fault in FAULTS
        if (attention, fault) != ("plugin", "upper-left mask")
    ],
)
def test_catches_a_planted_fault(attention, fault, trt, tensorrt_toy) -> None:
    toy = tensorrt_toy("float16")
    candidate = planted(trt, toy, attention, **FAULTS[fault])
    if fault == "swapped caches":  # the memory itself gives it away
        with pytest.raises(VerificationError, match="is not the memory of"):
            verify(toy, candidate)
    else:
        assert not verify(toy, candidate).passed


def test_catches_a_plugin_whose_aliases_are_swapped(trt, tensorrt_toy, monkeypatch) -> None:
    toy = tensorrt_toy("float16")
    model = lower(toy.bundle / MODEL, "plugin", toy.manifest.cache.capacity)
    parsed = parse(trt, model, toy.bundle / MODEL)
    monkeypatch.setattr(tensorrt_plugin, "ALIASES", {1: 4, 2: 3})
    with pytest.raises(BuildError, match="caches of attention 0 are updated as"):
        report(parsed, "plugin", 2)
    runner = Candidate(
        lambda *_: NetworkRunner(lambda: Network(parsed, model)), Precision("tensorrt", "float16"), "swapped"
    )
    with pytest.raises(VerificationError, match="is not the memory of"):
        verify(toy, runner)


def test_the_report_refuses_layers_that_were_not_asked_for(trt, tensorrt_toy) -> None:
    toy = tensorrt_toy("float16")
    path = toy.bundle / MODEL
    native = parse(trt, lower(path, "native", 40), path)
    layers = report(native, "native", 2)
    assert [layer.layers for layer in layers] == [{"ROTARY_EMBEDDING": 2, "KV_CACHE_UPDATE": 2, "ATTENTION": 1}] * 2
    assert layers[1].aliased == {f"present.1.{kv}": f"past_key_values.1.{kv}" for kv in ("key", "value")}
    with pytest.raises(BuildError, match="not what --attention plugin asks for"):
        report(native, "plugin", 2)


def test_attention_that_does_not_rotate_is_reported_layer_by_layer(trt, tensorrt_toy, tmp_path) -> None:
    path = tensorrt_toy("float16").bundle / MODEL
    model = ir.load(path)
    for node in attention_nodes(model):
        for name in TABLES:
            node.replace_input_with(INPUTS.index(name), None)
    ir.save(model, tmp_path / MODEL, external_data=f"{MODEL}.data")
    lowered = lower(tmp_path / MODEL, "native", 40)
    layers = report(parse(trt, lowered, tmp_path / MODEL), "native", 2)
    assert [layer.layers for layer in layers] == [{"KV_CACHE_UPDATE": 2, "ATTENTION": 1}] * 2


def test_float16_results_are_rounded_after_every_layer(trt) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Sub", ["y", "x"], ["z"])]
    network, _ = small_network(trt, nodes, {"x": np.array([1.0009765625, 65504.0], np.float16)}, ["z"])
    z = network({"x": torch.tensor([1.0009765625, 65504.0], dtype=torch.float16)})["z"]
    assert z.dtype == torch.float16
    assert z[0] == 1.0009765625
    assert torch.isinf(z[1])  # 2 x 65504 is over float16's range, so TensorRT has infinity there too


def small_network(trt, nodes, feeds, outputs, initializers=None):
    """The nodes as a TensorRT network, and as an ONNX model."""

    def info(name: str, array: np.ndarray):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        nodes,
        "g",
        [info(name, array) for name, array in feeds.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    proto = shape_inference.infer_shapes(proto)  # TensorRT wants the outputs' types
    model = ir.from_proto(proto)
    return Network(parse(trt, model, Path("small.onnx")), model), proto


RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 8)).astype(np.float32)
INTS = np.arange(24).reshape(2, 3, 4)
TABLE = RNG.standard_normal((16, 4)).astype(np.float32)
POSITIONS = np.array([[3, 4, 5, 6], [0, 1, 2, 3]])
MASK = np.tril(np.ones((4, 6), bool), 2)[None, None]
WEIGHT = RNG.standard_normal((8, 5)).astype(np.float32)
SMALL = {  # op, inputs, attributes, initializers
    "slice": ("Slice", [X], {}, [np.array([1, -1]), np.array([4, -9]), np.array([2, 3]), np.array([1, -2])]),
    "slice one axis": ("Slice", [X], {}, [np.array([1]), np.array([3]), np.array([2])]),
    "expand": ("Expand", [X[:, :1]], {}, [np.array([2, 3, 4, 8])]),
    "gather": ("Gather", [X, np.array([[0, 2], [1, 1]])], {"axis": 1}, []),
    "gather elements": ("GatherElements", [X[0, 0], np.array([[1, 0, 3]])], {"axis": 1}, []),
    "reduce sum": ("ReduceSum", [X], {"keepdims": 0}, [np.array([1, 3])]),
    "reduce min": ("ReduceMin", [INTS], {"keepdims": 1}, [np.array([2])]),
    "integer division": ("Div", [INTS - 12, np.full_like(INTS, 5)], {}, []),
    "layer norm": ("LayerNormalization", [X], {"axis": -1, "epsilon": 1e-5}, [TABLE[0].repeat(2), TABLE[1].repeat(2)]),
    "RMS norm": ("RMSNormalization", [X], {"axis": -1, "epsilon": 1e-5}, [TABLE[0].repeat(2)]),
    "tanh gelu": ("Gelu", [X], {"approximate": "tanh"}, []),
    "gelu": ("Gelu", [X], {}, []),
    "where": ("Where", [X > 0, X, -X], {}, []),
    "gemm": ("Gemm", [X[0, 0]], {"alpha": 1.0, "beta": 1.0, "transB": 0}, [WEIGHT, WEIGHT[0]]),
    "matmul": ("MatMul", [X], {}, [WEIGHT]),
    "transpose": ("Transpose", [X], {"perm": [0, 2, 1, 3]}, []),
    "reshape": ("Reshape", [X], {}, [np.array([0, -1, 8])]),
    "clip": ("Clip", [INTS], {}, [np.array(3), np.array(9)]),
    "rotary": ("RotaryEmbedding", [X, TABLE, TABLE[::-1].copy(), POSITIONS], {}, []),
    "rotary, interleaved": ("RotaryEmbedding", [X, TABLE, TABLE[::-1].copy(), POSITIONS], {"interleaved": 1}, []),
    "rotary, partial": (
        "RotaryEmbedding",
        [X, TABLE[:, :2].copy(), TABLE[:, 2:].copy(), POSITIONS],
        {"rotary_embedding_dim": 4},
        [],
    ),
    "attention": (
        "Attention",
        [X.repeat(2, 1), X.repeat(2, 2)[:, :, :6], -X.repeat(2, 2)[:, :, 1:7], MASK],
        {"scale": 0.3},
        [],
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_layers_compute_what_onnx_runtime_computes(case, trt) -> None:
    op_type, arrays, attributes, constants = SMALL[case]
    feeds = {f"x{i}": np.ascontiguousarray(array) for i, array in enumerate(arrays)}
    initializers = {f"c{i}": array for i, array in enumerate(constants)}
    node = helper.make_node(op_type, [*feeds, *initializers], ["y"], **attributes)
    network, proto = small_network(trt, [node], feeds, ["y"], initializers)
    expected = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    actual = network({name: torch.from_numpy(array) for name, array in feeds.items()})["y"].numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-5)  # float32, sums of at most a few dozen terms


def test_updates_a_cache_in_place(trt) -> None:
    cache, update = np.zeros((2, 1, 6, 2), np.float16), np.ones((2, 1, 2, 2), np.float16)
    feeds = {"past_key_values.0.key": cache, "update": update, "index": np.array([0, 3])}
    node = helper.make_node("TensorScatter", list(feeds), ["present.0.key"], axis=-2)
    network, _ = small_network(trt, [node], feeds, ["present.0.key"])
    tensors = {name: torch.from_numpy(array.copy()) for name, array in feeds.items()}
    present = network(tensors)["present.0.key"]
    assert present.data_ptr() == tensors["past_key_values.0.key"].data_ptr()
    assert present[:, 0, :, 0].tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    tensors["index"] = torch.tensor([0, 5])
    with pytest.raises(VerificationError, match="writes tokens 5 to 7 of 6"):
        network(tensors)


def test_refuses_a_second_reader_of_a_cache_updated_in_place(trt) -> None:
    cache = np.zeros((1, 1, 6, 2), np.float16)
    feeds = {"past_key_values.0.key": cache, "update": cache[:, :, :2], "index": np.array([0])}
    nodes = [
        helper.make_node("TensorScatter", list(feeds), ["present.0.key"], axis=-2),
        helper.make_node("Relu", ["past_key_values.0.key"], ["y"]),
    ]
    with pytest.raises(VerificationError, match="is updated in place, and read by"):
        small_network(trt, nodes, feeds, ["present.0.key", "y"])


@pytest.mark.parametrize(
    ("op_type", "attributes", "message"),
    [
        ("Softmax", {"axis": -1}, "is a SOFTMAX"),
        ("ArgMax", {"axis": -1}, "is a TOPK"),
        ("Tan", {}, "does TAN"),
        ("LeakyRelu", {"alpha": 0.1}, "does LEAKY_RELU"),
    ],
)
def test_an_unknown_layer_is_an_error(op_type, attributes, message, trt) -> None:
    nodes = [helper.make_node(op_type, ["x"], ["y"], **attributes)]
    network, _ = small_network(trt, nodes, {"x": X}, ["y"])
    with pytest.raises(HeadfoldError, match=message):
        network({"x": torch.from_numpy(X)})


def test_an_input_of_another_type_or_shape_is_an_error(trt) -> None:
    network, _ = small_network(trt, [helper.make_node("Relu", ["x"], ["y"])], {"x": X}, ["y"])
    for wrong in (torch.from_numpy(X).half(), torch.from_numpy(X[:1])):
        with pytest.raises(VerificationError, match="input 'x' gave"):
            network({"x": wrong})
