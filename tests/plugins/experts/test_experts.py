"""headfold::MixtureOfExperts: the torch op and both ONNX bodies against the numpy reference; each activation, biases, both layouts.

The quantized one: both bodies, in both widths.
"""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from headfold.plugins.attention.schema import VERSION
from headfold.plugins.experts.onnx_functions import (
    onnxruntime_body,
    onnxruntime_can,
    onnxruntime_quantized_body,
    schema,
    standard_body,
)
from headfold.plugins.experts.reference import mixture_of_experts, quantized_mixture_of_experts
from headfold.plugins.experts.schema import (
    DOMAIN,
    INPUTS,
    QUANTIZED,
    QUANTIZED_INPUTS,
    ExpertsAttributes,
    ExpertsInputs,
    QuantizedExpertsAttributes,
    QuantizedExpertsInputs,
)
from headfold.plugins.experts.torch_op import answer, mixture_of_experts_op, routed
from headfold.plugins.onnx_body import OPSET
from headfold.plugins.quantized.schema import Bits

TOLERANCE = 2e-5  # float32 sums of at most 48 products of order 1, in another order than float64's
N, H, I, E = 9, 24, 20, 5  # noqa: E741  # odd sizes; 48 columns would hide what is read with a wrong stride

Feeds = dict[str, np.ndarray]
CASES = {
    "silu": ExpertsAttributes(k=2),
    "one of them": ExpertsAttributes(k=1),
    "all of them": ExpertsAttributes(k=E),
    "alternating": ExpertsAttributes(k=2, interleaved=1),
    "gpt-oss": ExpertsAttributes(k=2, alpha=1.702, beta=1.0, limit=0.7, interleaved=1),
    "gelu": ExpertsAttributes(k=3, activation="gelu"),
    "gelu_tanh": ExpertsAttributes(k=3, activation="gelu_tanh", limit=0.5),
}


def problem(biases: bool, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    shapes = {
        "hidden_states": (N, H),
        "router_logits": (N, E),
        "gate_up_weight": (E, 2 * I, H),
        "down_weight": (E, H, I),
    }
    if biases:
        shapes |= {"gate_up_bias": (E, 2 * I), "down_bias": (E, H)}
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    feeds["gate_up_weight"] *= H**-0.5
    feeds["down_weight"] *= I**-0.5
    return feeds


def expected(feeds: Feeds, attributes: ExpertsAttributes) -> np.ndarray:
    return mixture_of_experts(ExpertsInputs(**feeds), attributes)


def quantized_problem(biases: bool, bits: Bits) -> Feeds:
    """Of sizes that have blocks of 32: of one, and of two."""
    rng = np.random.default_rng(bits)
    sizes = {"gate_up": (2 * 64, 32), "down": (32, 64)}
    feeds = {
        "hidden_states": rng.standard_normal((N, 32), dtype=np.float32),
        "router_logits": rng.standard_normal((N, E), dtype=np.float32),
    }
    for name, (rows, columns) in sizes.items():
        blocks = columns // 32
        feeds[f"{name}_weight"] = rng.integers(0, 256, (E, rows, columns * bits // 8), dtype=np.uint8)
        largest = columns**-0.5 * rng.uniform(-2, 2, (E, rows, blocks))  # of four bits scales have a sign
        feeds[f"{name}_scales"] = (largest / (1 << (bits - 1))).astype(np.float32)
        if biases:
            feeds[f"{name}_bias"] = rng.standard_normal((E, rows), dtype=np.float32)
    return feeds


def model(function: onnx.FunctionProto, attributes: ExpertsAttributes, feeds: Feeds) -> onnx.ModelProto:
    """Weights are in it, as ONNX Runtime's kernel of few bits wants them; other feeds are inputs."""
    quantized, dtype = function.name == QUANTIZED, feeds["hidden_states"].dtype
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    held = [numpy_helper.from_array(x, name) for name, x in feeds.items() if quantized and name not in INPUTS[:2]]
    given = {name: x for name, x in feeds.items() if name not in {x.name for x in held}}
    inputs = [helper.make_tensor_value_info(name, kind, [None] * x.ndim) for name, x in given.items()]
    names = [name if name in feeds else "" for name in (QUANTIZED_INPUTS if quantized else INPUTS)]
    node = helper.make_node(function.name, names, ["output"], domain=DOMAIN, **vars(attributes))
    output = helper.make_tensor_value_info("output", kind, [None, feeds["hidden_states"].shape[1]])
    graph = helper.make_graph([node], "experts", inputs, [output], held)
    opsets = [("", OPSET), (DOMAIN, VERSION), ("com.microsoft", 1)]
    imports = [helper.make_opsetid(*pair) for pair in opsets]
    return helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=11)


def run(function: onnx.FunctionProto, attributes: ExpertsAttributes, feeds: Feeds) -> np.ndarray:
    proto = model(function, attributes, feeds)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {x.name: feeds[x.name] for x in session.get_inputs()})[0]


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("case", CASES)
def test_everybody_computes_what_the_reference_does(case: str, biases: bool) -> None:
    attributes, feeds = CASES[case], problem(biases)
    right = expected(feeds, attributes)
    inputs = ExpertsInputs(**{name: torch.from_numpy(x) for name, x in feeds.items()})
    np.testing.assert_allclose(answer(inputs, attributes), right, atol=TOLERANCE)
    np.testing.assert_allclose(run(standard_body(attributes, biases), attributes, feeds), right, atol=TOLERANCE)
    if onnxruntime_can(attributes):
        np.testing.assert_allclose(run(onnxruntime_body(), attributes, feeds), right, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["silu", "gpt-oss", "gelu"])
def test_the_standard_body_is_one_for_every_onnx_tool(case: str) -> None:
    attributes, feeds = CASES[case], problem(biases=True)
    proto = model(standard_body(attributes, True), attributes, feeds)
    onnx.checker.check_model(proto, full_check=True)
    (actual,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(actual, expected(feeds, attributes), atol=TOLERANCE)


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_of_few_bits_compute_what_the_reference_does(bits: Bits, biases: bool) -> None:
    feeds = quantized_problem(biases, bits)
    attributes = QuantizedExpertsAttributes(2, "silu", 1.702, 1.0, 7.0, interleaved=1, bits=bits, accuracy_level=1)
    right = quantized_mixture_of_experts(QuantizedExpertsInputs(**feeds), attributes)
    for function in (standard_body(attributes, biases), onnxruntime_quantized_body(exact=True)):
        np.testing.assert_allclose(run(function, attributes, feeds), right, atol=TOLERANCE)
    # of eight bits ONNX Runtime's kernel rounds what multiplies them: by half of 1/127 of a block's largest number, in both products
    bound = TOLERANCE if bits == 4 else 0.05 * np.abs(right).max()
    np.testing.assert_allclose(run(onnxruntime_quantized_body(), attributes, feeds), right, atol=bound)
    half = {name: x if x.dtype == np.uint8 else x.astype(np.float16) for name, x in feeds.items()}
    for function in (standard_body(attributes, biases), *map(onnxruntime_quantized_body, (False, True))):
        np.testing.assert_allclose(run(function, attributes, half), right, atol=0.05 * np.abs(right).max())


def test_the_standard_body_of_few_bits_is_one_for_every_onnx_tool() -> None:
    feeds = quantized_problem(biases=True, bits=4)
    attributes = QuantizedExpertsAttributes(2, interleaved=1, bits=4)
    proto = model(standard_body(attributes, True), attributes, feeds)
    onnx.checker.check_model(proto, full_check=True)
    (actual,) = ReferenceEvaluator(proto).run(None, {name: feeds[name] for name in INPUTS[:2]})
    right = quantized_mixture_of_experts(QuantizedExpertsInputs(**feeds), attributes)
    np.testing.assert_allclose(actual, right, atol=TOLERANCE)


def test_float16() -> None:
    attributes = CASES["gpt-oss"]
    feeds = {name: x.astype(np.float16) for name, x in problem(biases=True).items()}
    right = expected(feeds, attributes)
    for function in (standard_body(attributes, True), onnxruntime_body()):
        # a few roundings of numbers below 4, each by at most 2^-10
        np.testing.assert_allclose(run(function, attributes, feeds), right, atol=2**-8)


def test_experts_that_nobody_chose_and_single_tokens() -> None:
    attributes, feeds = CASES["gpt-oss"], problem(biases=True)
    feeds["router_logits"][:, 3] = 100.0
    feeds["router_logits"][:, 4] = -100.0
    for count in (N, 1):
        few = feeds | {name: feeds[name][:count] for name in ("hidden_states", "router_logits")}
        right = expected(few, attributes)
        for function in (standard_body(attributes, True), onnxruntime_body()):
            np.testing.assert_allclose(run(function, attributes, few), right, atol=TOLERANCE)


@pytest.mark.parametrize("weights", [[0.3, 0.1], [2.5, 1.5], [1.0, 0.0], [0.0, 0.0]])
def test_any_routing_goes_in_as_logits(weights: list[float]) -> None:
    attributes, feeds = CASES["silu"], problem(biases=False)
    chosen = torch.tensor([[n % E, (n + 2) % E] for n in range(N)])
    logits, total = routed(chosen, torch.tensor([weights] * N), E)
    y = expected(feeds | {"router_logits": logits.numpy()}, attributes) * total.numpy()
    right = np.zeros_like(y)
    for n in range(N):
        for place, weight in enumerate(weights):
            alone = feeds | {"router_logits": np.eye(E, dtype=np.float32)[[int(chosen[n, place])] * N]}
            right[n] += weight * expected(alone, ExpertsAttributes(k=1))[n]
    np.testing.assert_allclose(y, right, atol=TOLERANCE)


def test_the_torch_op_has_a_fake_and_gradients() -> None:
    feeds = problem(biases=True)
    tensors = {name: torch.from_numpy(feeds[name]) for name in INPUTS}
    torch.library.opcheck(
        mixture_of_experts_op, tuple(tensors.values()), vars(CASES["gpt-oss"]), test_utils="test_schema"
    )
    torch.library.opcheck(
        mixture_of_experts_op, tuple(tensors.values()), vars(CASES["gpt-oss"]), test_utils="test_faketensor"
    )
    doubles = {name: x.double().requires_grad_() for name, x in tensors.items()}

    def f(*values: torch.Tensor) -> torch.Tensor:
        return answer(ExpertsInputs(**dict(zip(INPUTS, values, strict=True))), CASES["silu"])

    f(*doubles.values()).sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in doubles.values())


def test_the_bodies_are_valid_functions_of_the_schema() -> None:
    assert [x.name for x in schema().inputs] == list(INPUTS)
    for function in (onnxruntime_body(), standard_body(CASES["silu"], False), standard_body(CASES["gelu"], True)):
        assert list(function.input) == list(INPUTS)
        assert set(function.attribute) == set(vars(CASES["silu"]))
