"""Float8MatMul: its ONNX body against the numpy reference, in every dtype of x."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from headfold.plugins.attention.schema import VERSION
from headfold.plugins.onnx_body import OPSET
from headfold.plugins.quantized.onnx_functions import float8_matmul
from headfold.plugins.quantized.reference import float8_matmul as reference
from headfold.plugins.quantized.schema import DOMAIN, FLOAT8, ROUNDED_INPUTS

K, N = 33, 24  # no blocks are needed


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_body_computes_what_the_reference_does(dtype, late) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((N, K)).astype(ml_dtypes.float8_e4m3fn)
    scales, x = rng.uniform(0.5, 2, N).astype(dtype), rng.standard_normal((2, 5, K)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stored = [
        helper.make_tensor("values", onnx.TensorProto.FLOAT8E4M3FN, values.shape, values.tobytes(), raw=True),
        onnx.numpy_helper.from_array(scales, "scales"),
    ]
    graph = helper.make_graph(
        [helper.make_node(FLOAT8, ROUNDED_INPUTS, ["out"], domain=DOMAIN)],
        "float8",
        [helper.make_tensor_value_info("x", kind, [None, None, K])],
        [helper.make_tensor_value_info("out", kind, [None, None, None])],
        stored,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[float8_matmul(late)], opset_imports=opsets, ir_version=11)
    right = reference(x, values, scales)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # Of sums of products of up to 2 x 4 times x
    step = np.finfo(dtype).eps * np.abs(x.astype(float) * 2 * 4).sum(-1).max()
    for found in (session.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]):
        np.testing.assert_allclose(found.astype(float), right.astype(float), atol=step)
