"""The TensorRT plugin up to its launch: attributes, shapes, aliases, workspace, and what it hands to the launcher.

The parser's crash on a missing library is provoked in a process of its own.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from headfold.plugins import tensorrt_library
from headfold.plugins.attention import tensorrt_plugin
from headfold.plugins.attention.kernel_contract import KernelSpec, max_workspace_bytes
from headfold.plugins.attention.launcher import Pointers, Shape
from headfold.plugins.attention.schema import INPUTS, NORMS, OUTPUTS, Attributes
from headfold.plugins.tensorrt_library import TensorRTMissing, open_tensorrt

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
SPEC = KernelSpec(num_heads=8, kv_num_heads=2, head_dim=64, rotary_dim=32, dtype="float16", cache_dtype="float16")
ATTRIBUTES = Attributes(8, 2, scale=0.125, local_window_size=7, softcap=0.0, rotary_interleaved=1, qk_norm_epsilon=1e-5)
B, S, C, T = 3, 5, 128, 64
SHAPES = [(B, S, 512), (B, S, 128), (B, S, 128), (B, 2, C, 64), (B, 2, C, 64), (B,), (B, T), (C, 16), (C, 16)]


@dataclass
class FakeLauncher:
    spec: KernelSpec = SPEC
    launches: list[Any] = field(default_factory=list)

    def launch(self, pointers: Pointers, shape: Shape, **arguments: Any) -> None:
        self.launches.append((pointers, shape, arguments))


@pytest.fixture(scope="module")
def trt() -> Any:
    module = open_tensorrt("tensorrt-rtx")
    tensorrt_plugin.register(module, None)
    return module


def create(trt: Any, attributes: Attributes, extra: tuple[Any, ...] = ()) -> Any:
    creator = trt.get_plugin_registry().get_creator(
        tensorrt_plugin.NAME, tensorrt_plugin.PLUGIN_VERSION, tensorrt_plugin.NAMESPACE
    )
    fields = [*tensorrt_plugin._fields(trt, attributes), *extra]
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)


def described(trt: Any, shapes: list[tuple[int, ...]]) -> list[Any]:
    """Stand-ins for TensorRT's descriptions of the inputs."""
    int64 = {INPUTS.index("past_lengths"), INPUTS.index("total_sequence_length")}
    result = []
    for index, shape in enumerate(shapes):
        dtype = trt.int64 if index in int64 else trt.float16
        desc = SimpleNamespace(type=dtype, dims=shape, format=trt.TensorFormat.LINEAR)
        result.append(SimpleNamespace(desc=desc, max=shape, min=shape))
    return result


def test_attributes_come_back_from_what_it_serializes(trt) -> None:
    plugin = create(trt, ATTRIBUTES)
    again = create(trt, tensorrt_plugin.read_attributes(plugin.get_fields_to_serialize()))
    for name, value in vars(ATTRIBUTES).items():
        assert getattr(again.attributes, name) == pytest.approx(value, rel=1e-6), name  # floats are float32 on the way
    assert (plugin.plugin_name, plugin.plugin_namespace) == ("GroupedQueryAttention", "headfold")


def test_its_outputs_alias_the_caches(trt) -> None:
    plugin = create(trt, ATTRIBUTES)
    aliases = [plugin.get_aliased_input(output) for output in range(len(OUTPUTS))]
    assert aliases == [-1, INPUTS.index("past_key"), INPUTS.index("past_value")]
    types = [trt.float16] * len(INPUTS)
    assert plugin.get_output_data_types(types) == [trt.float16] * 3


@pytest.mark.parametrize(
    ("position", "dtype", "accepted"),
    [
        (0, "float16", True),
        (0, "bfloat16", True),
        (0, "float32", True),
        (0, "int8", False),
        (3, "float16", True),
        (3, "float32", False),  # the cache has the dtype of the query
        (5, "int64", True),
        (5, "int32", False),
        (9, "float16", True),
        (10, "float32", False),
    ],
)
def test_takes_one_dtype_and_int64_lengths(position, dtype, accepted, trt) -> None:
    tensors = described(trt, [*SHAPES, *SHAPES[:1], *SHAPES[3:5]])
    tensors[position].desc.type = getattr(trt, dtype)
    assert create(trt, ATTRIBUTES).supports_format_combination(position, tensors, len(INPUTS)) == accepted


def test_workspace_is_the_largest_of_any_launch_in_the_profile(trt) -> None:
    plugin = create(trt, ATTRIBUTES)
    spec = SPEC.model_copy(update={"rotary_interleaved": True})
    assert plugin.get_workspace_size(described(trt, SHAPES), []) == max_workspace_bytes(spec, B, S, C) > 0


@pytest.mark.parametrize("qk_norm", [False, True])
def test_enqueue_hands_addresses_and_sizes_to_the_launcher(qk_norm, trt) -> None:
    launcher = FakeLauncher()
    tensorrt_plugin.register(trt, launcher)
    try:
        plugin = create(trt, ATTRIBUTES).attach_to_context(None)
    finally:
        tensorrt_plugin.register(trt, None)
    shapes = SHAPES + ([(64,), (64,)] if qk_norm else [])
    names = INPUTS + (NORMS if qk_norm else ())
    addresses = {name: 1000 + index for index, name in enumerate(names)}
    inputs = [tensor.desc for tensor in described(trt, shapes)]
    outputs = [2000, addresses["past_key"], addresses["past_value"]]  # aliased
    plugin.enqueue(inputs, [], list(addresses.values()), outputs, 3000, 4000)
    ((pointers, shape, arguments),) = launcher.launches
    assert shape == Shape(batch=B, new_tokens=S, capacity=C)
    assert arguments == {"scale": 0.125, "window": 7, "epsilon": pytest.approx(1e-5), "workspace": 3000, "stream": 4000}
    assert pointers == Pointers(
        query=1000,
        key=1001,
        value=1002,
        present_key=1003,
        present_value=1004,
        past_lengths=1005,
        cos_cache=1007,
        sin_cache=1008,
        output=2000,
        q_norm_weight=1009 if qk_norm else 0,
        k_norm_weight=1010 if qk_norm else 0,
    )


def test_kernels_of_another_attention_do_not_run_it_nor_those_of_another_session(trt) -> None:
    """Two sessions of one process: each plugin keeps the launcher that was registered when it was made."""
    own = SPEC.model_copy(update={"rotary_interleaved": True})
    first, second = FakeLauncher(), FakeLauncher()
    first.spec, second.spec = own, own.model_copy(update={"softcap": 30.0, "rotary_interleaved": False})
    try:
        tensorrt_plugin.register(trt, first)
        one = create(trt, ATTRIBUTES)
        tensorrt_plugin.register(trt, second)
        other = create(trt, ATTRIBUTES)
    finally:
        tensorrt_plugin.register(trt, None)
    inputs = [tensor.desc for tensor in described(trt, SHAPES)]
    one.on_shape_change(inputs, [])
    assert one.attach_to_context(None).launcher is first
    with pytest.raises(RuntimeError, match=r"rotary_interleaved False instead of True, softcap 30.0 instead of 0.0"):
        other.attach_to_context(None).on_shape_change(inputs, [])


def test_without_a_launcher_it_says_so(trt) -> None:
    plugin = create(trt, ATTRIBUTES)
    inputs = [tensor.desc for tensor in described(trt, SHAPES)]
    with pytest.raises(RuntimeError, match="registered without a launcher"):
        plugin.enqueue(inputs, [], [0] * len(inputs), [0] * 3, 0, 0)


_PARSE = """
import onnx_ir as ir
from onnx import TensorProto as T, helper as h
trt.get_plugin_registry()
from headfold.plugins.attention import tensorrt_plugin
tensorrt_plugin.register(trt, None)
value = lambda name, kind, shape: h.make_tensor_value_info(name, kind, shape)
inputs = [value("query", T.FLOAT16, ["b", "s", 64]), value("key", T.FLOAT16, ["b", "s", 32]), value("value", T.FLOAT16, ["b", "s", 32])]
inputs += [value(name, T.FLOAT16, ["b", 2, 32, 16]) for name in ("past_key", "past_value")]
inputs += [value("past_lengths", T.INT64, ["b"]), value("mask", T.INT64, ["b", "t"])]
inputs += [value(name, T.FLOAT16, [32, 8]) for name in ("cos", "sin")]
outputs = [value("y", T.FLOAT16, ["b", "s", 64])] + [value(name, T.FLOAT16, ["b", 2, 32, 16]) for name in ("pk", "pv")]
node = h.make_node("GroupedQueryAttention", [i.name for i in inputs], ["y", "pk", "pv"], domain="headfold", name="gqa",
                   plugin_namespace="headfold", plugin_version="1", num_heads=4, kv_num_heads=2, scale=0.25)
model = h.make_model(h.make_graph([node], "g", inputs, outputs),
                     opset_imports=[h.make_opsetid("", 24), h.make_opsetid("headfold", 1)], ir_version=11)
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed", parser.parse(model.SerializeToString()), network.num_layers)
"""


def python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)


def test_parsing_a_plugin_does_not_abort_the_process() -> None:
    bare = python("import tensorrt_rtx as trt" + _PARSE)
    assert bare.returncode != 0  # the crash that the guard is against: if this passes one day, the guard can go
    assert "parsed True" not in bare.stdout
    opening = "from headfold.plugins.tensorrt_library import open_tensorrt; trt = open_tensorrt('tensorrt-rtx')"
    guarded = python(opening + _PARSE)
    assert guarded.returncode == 0, guarded.stderr
    assert "parsed True 1" in guarded.stdout


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt_rtx_libs"])
def test_a_tensorrt_that_somebody_imported_first_is_refused_not_crashed(module) -> None:
    result = python(
        f"import {module}\n"
        "from headfold.plugins.tensorrt_library import open_tensorrt, TensorRTMissing\n"
        "try:\n    open_tensorrt('tensorrt-rtx')\nexcept TensorRTMissing as error:\n    print(error)"
    )
    assert result.returncode == 0
    assert "was imported before headfold could load its parser safely" in result.stdout


def test_a_flavour_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setitem(tensorrt_library.MODULES, "tensorrt", "no_such_tensorrt")
    with pytest.raises(TensorRTMissing, match="tensorrt is not installed: pip install tensorrt"):
        open_tensorrt("tensorrt")
