"""The exported graph against the decoder it was traced from: every kind of model, both bodies, both padding sides."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from headfold.export.checkpoints.opening import load_decoder
from headfold.export.exportables.own import OwnModel
from headfold.export.graph.bodies import use_onnxruntime_body, use_standard_body
from headfold.export.graph.joining import pack_inputs, unpack_inputs
from headfold.export.graph.passes import attention_nodes, expose_hidden_states
from headfold.export.graph.trace import export_graph
from headfold.export.graph.weights import attach_weights, load_model, save_model
from headfold.export.model.config import FEED_FORWARDS, RopeConfig
from headfold.runtime import CheckpointError

CAPACITY = 32
TOLERANCE = {  # absolute, for logits of order 1
    torch.float32: 1e-5,  # sums of a hundred products in another order
    torch.float16: 2e-2,  # eps 1e-3, over three layers that each round every intermediate result
}
WIDE = {"head_dim": 32, "rope": RopeConfig(partial_rotary_factor=0.5)}  # onnxruntime rotates multiples of 16 dimensions

VARIANTS = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 6},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "q/k/v biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "q/k norm": {"qk_norm": True},
    "window in one layer": {"sliding_window": 3, "sliding_layers": (1,)},
    "LayerNorm": {"norm": "layer_norm"},
    "partial RoPE": WIDE,
    **{name: {"hidden_act": act, "gated": gated} for name, (act, gated) in FEED_FORWARDS.items()},
}


def save(checkpoint, directory: Path, dtype=torch.float32, all_logits=True, standard=False, hidden=False) -> Path:
    source = OwnModel(checkpoint)
    model = export_graph(source, checkpoint, dtype, CAPACITY, all_logits)
    attach_weights(model, checkpoint, source.tables(dtype, CAPACITY), allow_nan=False)
    if standard:
        use_standard_body(model)
    if hidden:
        expose_hidden_states(model)
    path = directory / "model.onnx"
    save_model(model, path, lambda name, size: None)
    return path


def empty_cache(config, batch: int, dtype=np.float32) -> dict[str, np.ndarray]:
    shape = (batch, config.num_key_value_heads, CAPACITY, config.head_dim)
    layers = range(config.num_hidden_layers)
    return {f"past_key_values.{i}.{part}": np.zeros(shape, dtype) for i in layers for part in ("key", "value")}


def present(session: ort.InferenceSession, outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
    named = dict(zip([o.name for o in session.get_outputs()], outputs, strict=True))
    return {name.replace("present", "past_key_values"): x for name, x in named.items() if name.startswith("present")}


def open_session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_and_decode_equal_the_decoder(variant, config, memory_checkpoint, tmp_path) -> None:
    config = replace(config, num_hidden_layers=2, **VARIANTS[variant])
    checkpoint = memory_checkpoint(config)
    path = save(checkpoint, tmp_path)
    swapped = ir.load(path)
    use_standard_body(swapped)
    ir.save(swapped, tmp_path / "standard.onnx")  # beside the same weights
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)))
    expected = load_decoder(checkpoint)(ids).logits.numpy()
    for file in (path, tmp_path / "standard.onnx"):
        onnx.checker.check_model(file, full_check=True)
        session = open_session(file)
        feeds = {"input_ids": ids[:, :8].numpy(), "attention_mask": np.ones((2, 8), np.int64)}
        outputs = session.run(None, feeds | empty_cache(config, 2))
        np.testing.assert_allclose(outputs[0], expected[:, :8], atol=TOLERANCE[torch.float32])
        feeds = {"input_ids": ids[:, 8:].numpy(), "attention_mask": np.ones((2, 9), np.int64)}
        decoded = session.run(None, feeds | present(session, outputs))[0]
        np.testing.assert_allclose(decoded, expected[:, 8:], atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("all_logits", [False, True])
def test_padding_on_either_side_changes_nothing(all_logits, config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(config)
    session = open_session(save(checkpoint, tmp_path, all_logits=all_logits))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 7))
    mask = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7])
    outputs = session.run(None, {"input_ids": ids, "attention_mask": mask} | empty_cache(config, 3))
    following = np.array([[5], [6], [7]])
    feeds = {"input_ids": following, "attention_mask": np.concatenate([mask, [[1]] * 3], 1)} | present(session, outputs)
    decoded = session.run(None, feeds)[0]
    for row in range(3):
        alone = ids[row][mask[row] == 1]
        with_next = np.concatenate([alone, following[row]])
        expected = load_decoder(checkpoint)(torch.from_numpy(with_next)[None]).logits[0].numpy()
        actual = outputs[0][row][mask[row] == 1] if all_logits else outputs[0][row]
        np.testing.assert_allclose(
            actual, expected[:-1] if all_logits else expected[-2:-1], atol=TOLERANCE[torch.float32]
        )
        np.testing.assert_allclose(decoded[row], expected[-1:], atol=TOLERANCE[torch.float32])


def test_float16_stays_within_its_tolerance(config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(config)
    session = open_session(save(checkpoint, tmp_path, dtype=torch.float16))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(config, 1, np.float16)
    actual = session.run(None, feeds)[0]
    assert actual.dtype == np.float16
    expected = load_decoder(checkpoint)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE[torch.float16])


@pytest.mark.parametrize(
    "sizes",
    [
        {"head_dim": 24},
        {"rope": RopeConfig(partial_rotary_factor=0.5)},  # 8 of 16
        {"head_dim": 40, "rope": RopeConfig(partial_rotary_factor=0.4)},  # 16 of 40
    ],
    ids=["heads of 24", "8 of 16 rotated", "16 of 40 rotated"],
)
def test_sizes_that_onnxruntimes_kernel_has_not_get_the_standard_body(
    sizes, config, memory_checkpoint, tmp_path
) -> None:
    checkpoint = memory_checkpoint(replace(config, num_hidden_layers=1, **sizes))
    path = save(checkpoint, tmp_path)
    assert {opset.domain for opset in onnx.load(path, load_external_data=False).opset_import} == {"", "headfold"}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(checkpoint.config, 2)
    actual = open_session(path).run(None, feeds)[0]
    expected = load_decoder(checkpoint)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE[torch.float32])


def test_onnx_reference_runs_the_standard_body(config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(replace(config, num_hidden_layers=1))
    path = save(checkpoint, tmp_path, standard=True)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 5))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(checkpoint.config, 2)
    actual = ReferenceEvaluator(onnx.load(path)).run(None, feeds)[0]
    expected = load_decoder(checkpoint)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_hidden_states_can_be_exposed(config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(config)
    session = open_session(save(checkpoint, tmp_path, hidden=True))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 6))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(config, 1)
    names = [f"hidden_states.{i}" for i in range(config.num_hidden_layers)]
    actual = session.run(names, feeds)
    expected = load_decoder(checkpoint)(torch.from_numpy(ids)).hidden_states
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e.numpy(), atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_projects_queries_keys_and_values(bias, config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(replace(config, qkv_bias=bias))
    model = ir.load(save(checkpoint, tmp_path))
    nodes = attention_nodes(model)
    assert len(nodes) == config.num_hidden_layers
    for layer, node in enumerate(nodes):
        assert list(node.inputs[1:3]) == [None, None]  # packed
        product = node.inputs[0].producer()
        if bias:
            assert product.op_type == "Add"
            product = next(value.producer() for value in product.inputs if value.producer() is not None)
        assert product.op_type == "MatMul"
        stored = product.inputs[1].const_value.numpy()  # [hidden, (Hq + 2 Hkv) D]
        parts = [checkpoint.read(f"model.layers.{layer}.self_attn.{name}_proj.weight").numpy() for name in "qkv"]
        np.testing.assert_array_equal(stored, np.concatenate(parts).T)


def test_norms_of_heads_want_queries_and_keys_apart(config, memory_checkpoint, tmp_path) -> None:
    model = ir.load(save(memory_checkpoint(replace(config, qk_norm=True)), tmp_path))
    for node in attention_nodes(model):
        (split,) = {value.producer() for value in node.inputs[:3]}
        assert split.op_type == "Split"


def test_packed_inputs_are_taken_apart_again(config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(config)
    path = save(checkpoint, tmp_path)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 5))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(config, 2)
    packed = open_session(path).run(None, feeds)
    model = load_model(path)
    unpack_inputs(model)
    use_onnxruntime_body(model)
    widths = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    for node in attention_nodes(model):
        assert [value.shape[2] for value in node.inputs[:3]] == widths
    apart = tmp_path / "apart.onnx"
    save_model(model, apart, lambda name, size: None)
    for actual, expected in zip(open_session(apart).run(None, feeds), packed, strict=True):
        np.testing.assert_array_equal(actual, expected)
    pack_inputs(model)
    assert all(list(node.inputs[1:3]) == [None, None] for node in attention_nodes(model))
    assert not any(node.op_type == "Split" for node in model.graph)


def test_standard_body_has_no_contrib_ops_left(config, memory_checkpoint, tmp_path) -> None:
    model = onnx.load(save(memory_checkpoint(config), tmp_path, standard=True), load_external_data=False)
    nodes = [node for function in model.functions for node in function.node] + list(model.graph.node)
    assert {node.domain for node in nodes} == {"", "headfold"}
    assert {opset.domain for opset in model.opset_import} == {"", "headfold"}


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, "tensor model.norm.weight holds NaN or infinity"),
        (1e6, torch.float16, r"model.norm.weight has values up to 1e\+06, more than float16 holds"),
    ],
)
def test_weights_that_are_not_finite_are_an_error(value, dtype, message, config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(config)
    checkpoint.tensors["model.norm.weight"][0] = value
    with pytest.raises(CheckpointError, match=message):
        save(checkpoint, tmp_path, dtype=dtype)
