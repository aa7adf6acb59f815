"""What the proof must refuse and what it must not: small bundles of each family, faults to plant in them, odd but honest models."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from headfold.export.bundle.pipeline import CacheCalibration, ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.shapes import expected_shapes
from headfold.export.exportables.opening import open_exportable
from headfold.export.graph.passes import attention_nodes
from headfold.export.graph.recipes import recipe_of
from headfold.export.graph.weights import scale_name
from headfold.export.model.config import ModelConfig, RopeConfig
from headfold.export.model.rope import rope_tables
from headfold.export.parity.report import ParityReport
from headfold.export.parity.verify import verify_bundle
from headfold.export.progress import Reporter
from headfold.plugins.attention.schema import ALL_INPUTS, SCALES
from headfold.runtime.errors import HeadfoldError
from headfold.runtime.manifest import read_manifest

QUIET = Reporter(quiet=True)
CAPACITY = 128
SMALL = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=CAPACITY,
    eos_token_id=(0,),
)
FAMILIES: dict[str, ModelConfig] = {
    "llama": SMALL,
    "mistral": replace(SMALL, model_type="mistral", sliding_window=17, sliding_layers=(0, 1)),
    "qwen2": replace(SMALL, model_type="qwen2", qkv_bias=True, sliding_window=100, sliding_layers=(1,)),
    "qwen3": replace(
        SMALL, model_type="qwen3", qk_norm=True, tie_word_embeddings=True, sliding_window=17, sliding_layers=(0,)
    ),
    "headfold": replace(
        SMALL,
        model_type="headfold",
        norm="layer_norm",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        gated=False,
        hidden_act="gelu",
    ),
}
FORMATS: dict[str, ExportOptions] = {
    "float32": ExportOptions(verify=False),
    "float16": ExportOptions(dtype="float16", verify=False),
    "bfloat16": ExportOptions(dtype="bfloat16", verify=False),
    "int8 cache": ExportOptions(cache=CacheCalibration("int8", tokens=256), verify=False),
}


@dataclass(frozen=True)
class Bundle:
    """An honest one."""

    path: Path
    source: Path
    config: ModelConfig


def random_weights(config: ModelConfig, seed: int = 0, std: float = 0.2) -> dict[str, torch.Tensor]:
    """Large enough that everything matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        norm = name.endswith("norm.weight") or "layernorm.weight" in name
        weights[name] = torch.randn(shape, generator=generator) * std + (1.0 if norm else 0.0)
    return weights


def export(directory: Path, config: ModelConfig, weights: dict[str, torch.Tensor], options: ExportOptions) -> Bundle:
    """A checkpoint in transformers' format where there is one, and its bundle."""
    save_hf(directory / "checkpoint", MemoryCheckpoint(directory, config, weights), torch.float32)
    export_bundle(open_exportable(directory / "checkpoint"), directory / "bundle", options, QUIET)
    return Bundle(directory / "bundle", directory / "checkpoint", config)


def prove(bundle: Bundle, path: Path | None = None) -> ParityReport:
    """Verify what lies at `path` against the honest bundle's checkpoint."""
    return verify_bundle(path or bundle.path, open_exportable(bundle.source), read_manifest(bundle.path), 4, QUIET)


def caught(bundle: Bundle, fault: "Fault", directory: Path) -> str | None:
    """Plant a fault in a copy, as an outsider would, and verify; what the proof says of it, None for nothing."""
    model = ir.load(bundle.path / "model.onnx")
    fault(model, bundle.config)
    directory.mkdir()
    ir.save(model, directory / "model.onnx", external_data="model.onnx.data")
    for name in ("calibration.json", "tokenizer.json"):
        if (bundle.path / name).is_file():
            (directory / name).write_bytes((bundle.path / name).read_bytes())
    try:
        report = prove(bundle, directory)
    except HeadfoldError as error:
        return str(error)
    return None if report.passed else report.failure()


Fault = Callable[[ir.Model, ModelConfig], None]


def _change(value: ir.Value, change: Callable[[np.ndarray], None]) -> None:
    content = value.const_value.numpy().copy()
    change(content)
    _replace(value, content)


def _replace(value: ir.Value, content: np.ndarray) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(content), dtype=value.const_value.dtype, name=value.name)
    value.shape = ir.Shape(content.shape)


def _weight(model: ir.Model, kind: str, ndim: int | None = None) -> ir.Value:
    found = [v for name, v in model.graph.initializers.items() if kind in name and recipe_of(v) is not None]
    return next(value for value in reversed(found) if ndim is None or len(value.shape) == ndim)


def element_of(kind: str, factor: float = 1.05) -> Fault:
    def fault(model: ir.Model, config: ModelConfig) -> None:
        def change(x: np.ndarray) -> None:
            flat = x.reshape(-1)
            at = int(np.abs(flat.astype(np.float32)).argmax())
            flat[at] = flat[at] * factor

        _change(_weight(model, kind), change)

    return fault


def unfed_row(model: ir.Model, config: ModelConfig) -> None:
    """The embedding of a token that no probe may ever feed."""

    def change(x: np.ndarray) -> None:
        x[config.vocab_size - 1] = x[config.vocab_size - 1] * 1.05

    _change(_weight(model, "embed_tokens"), change)


def swapped_caches(model: ir.Model, config: ModelConfig) -> None:
    node = attention_nodes(model)[-1]
    key, value = node.inputs[3], node.inputs[4]
    node.replace_input_with(3, value)
    node.replace_input_with(4, key)


def _tables(model: ir.Model, config: ModelConfig, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for name in ("cos_cache", "sin_cache"):
        value = model.graph.initializers[name]
        old = value.const_value.numpy()
        _replace(value, change(old).astype(old.dtype))


def other_theta(model: ir.Model, config: ModelConfig) -> None:
    other = replace(config, rope=replace(config.rope, rope_theta=config.rope.rope_theta * 1.001))
    for name, table in zip(("cos_cache", "sin_cache"), rope_tables(other, config.max_position_embeddings), strict=True):
        value = model.graph.initializers[name]
        _replace(value, table.numpy().astype(value.const_value.numpy().dtype))


def zeroed_tables(model: ir.Model, config: ModelConfig) -> None:
    _tables(model, config, lambda x: np.concatenate([x[:100], 0 * x[100:]]))


def cut_tables(model: ir.Model, config: ModelConfig) -> None:
    _tables(model, config, lambda x: x[:100])


def window_by(step: int) -> Fault:
    def fault(model: ir.Model, config: ModelConfig) -> None:
        node = attention_nodes(model)[config.sliding_layers[-1]]
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", config.sliding_window + step)

    return fault


def dropped_bias(model: ir.Model, config: ModelConfig) -> None:
    """Of the last layer's queries, keys and values."""
    bias = _weight(model, "proj.bias", 1)
    ((node, _),) = bias.uses()
    product = next(value for value in node.inputs if value is not bias)
    ir.convenience.replace_all_uses_with(node.outputs[0], product)
    model.graph.remove(node, safe=True)
    model.graph.initializers.pop(bias.name)


def zeroed_bias_node(model: ir.Model, config: ModelConfig) -> None:
    """The bias is in the file, and multiplied by nothing."""
    bias = _weight(model, "proj.bias", 1)
    ((node, index),) = bias.uses()
    product = ir.node("Sub", [bias, bias])
    node.replace_input_with(index, product.outputs[0])
    model.graph.insert_before(node, product)


def swapped_heads(model: ir.Model, config: ModelConfig) -> None:
    size = config.head_dim

    def change(x: np.ndarray) -> None:
        x[:, : 2 * size] = np.concatenate([x[:, size : 2 * size], x[:, :size]], 1)

    _change(_weight(model, "q_proj.weight", 2), change)


def swapped_layers(model: ir.Model, config: ModelConfig) -> None:
    """Two layers' weights change places, names and recipes with them: each is in the file, exactly."""
    first, second = (_weight(model, f"layers.{layer}.mlp.down_proj.weight") for layer in (0, 1))
    (a,), (b,) = first.uses(), second.uses()
    a[0].replace_input_with(a[1], second)
    b[0].replace_input_with(b[1], first)


def mask_off_by_one(model: ir.Model, config: ModelConfig) -> None:
    """The last layer believes that each sequence is one token shorter than it is."""
    node = attention_nodes(model)[-1]
    index = ALL_INPUTS.index("last_index")
    one = ir.Value(name="one", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT32))
    one.const_value = ir.tensor(np.array([1], np.int32), name="one")
    model.graph.register_initializer(one)
    less = ir.node("Sub", [node.inputs[index], one])
    model.graph.insert_before(node, less)
    node.replace_input_with(index, less.outputs[0])


def other_scale(model: ir.Model, config: ModelConfig) -> None:
    node = attention_nodes(model)[-1]
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.01)


def other_epsilon(model: ir.Model, config: ModelConfig) -> None:
    node = next(node for node in model.graph if node.op_type in {"RMSNormalization", "LayerNormalization"})
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10 * node.attributes["epsilon"].as_float())


def ignored_padding(model: ir.Model, config: ModelConfig) -> None:
    """Every column of the mask is taken for a token: right alone, and wrong in a batch."""
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    ones = ir.Value(name="ones", shape=ir.Shape([1, 1]), type=ir.TensorType(ir.DataType.INT64))
    ones.const_value = ir.tensor(np.ones((1, 1), np.int64), name="ones")
    model.graph.register_initializer(ones)
    node = ir.node("Max", [mask, ones])
    for user, index in mask.uses():
        user.replace_input_with(index, node.outputs[0])
    node.replace_input_with(0, mask)
    model.graph.insert_before(model.graph[0], node)


def smaller_scales(model: ir.Model, config: ModelConfig) -> None:
    for part in SCALES:
        value = model.graph.initializers[scale_name(config.num_hidden_layers - 1, part)]
        _replace(value, value.const_value.numpy() * np.float32(0.9))


FAULTS: dict[str, Fault] = {
    "one element of a product": element_of("down_proj"),
    "one element of queries, keys, values": element_of("v_proj"),
    "one element of the embedding": element_of("embed_tokens"),
    "one element of a norm": element_of("layernorm.weight", 1.01),
    "embedding never fed": unfed_row,
    "swapped caches": swapped_caches,
    "theta": other_theta,
    "window + 1": window_by(1),
    "window - 1": window_by(-1),
    "dropped bias": dropped_bias,
    "bias that does nothing": zeroed_bias_node,
    "swapped head rows": swapped_heads,
    "swapped layers": swapped_layers,
    "mask off by one": mask_off_by_one,
    "scale": other_scale,
    "epsilon": other_epsilon,
    "padding": ignored_padding,
    "tables zeroed": zeroed_tables,
    "tables cut": cut_tables,
    "cache scales": smaller_scales,
}


def applies(fault: str, family: str, kind: str) -> bool:
    """Whether there is such a thing to break."""
    config = FAMILIES[family]
    if fault.startswith("window"):
        return bool(config.sliding_layers)
    if "bias" in fault:
        return config.qkv_bias
    return kind == "int8 cache" if fault == "cache scales" else True


def honest_model(seed: int) -> tuple[ModelConfig, dict[str, torch.Tensor], ExportOptions]:
    """A random configuration with weights that are anything but tame: tensors x 1e-3 to 1e2, outlier rows, tiny and huge norms."""
    rng = np.random.default_rng(seed)
    groups, kv, size = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2])), int(rng.choice([16, 32]))
    layers = int(rng.integers(1, 5))
    family = str(rng.choice(["llama", "mistral", "qwen2", "qwen3", "headfold"]))
    window = int(rng.choice([1, 5, 17, 100]))
    sliding: dict[str, object] = {}
    if family == "mistral":
        sliding = {"sliding_window": window, "sliding_layers": tuple(range(layers))}
    elif family != "llama" and rng.random() < 0.5:
        sliding = {"sliding_window": window, "sliding_layers": tuple(i for i in range(layers) if rng.random() < 0.7)}
        sliding = sliding if sliding["sliding_layers"] else {}
    ropes = [
        RopeConfig(rope_theta=float(rng.choice([1e3, 1e4, 1e6]))),
        RopeConfig(rope_type="linear", factor=4.0),
        RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=32),
        RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ]
    own = family == "headfold"
    config = ModelConfig(
        model_type=family,
        vocab_size=int(rng.integers(50, 200)),
        hidden_size=int(rng.choice([32, 48, 72])),
        intermediate_size=int(rng.choice([40, 96])),
        num_hidden_layers=layers,
        num_attention_heads=groups * kv,
        num_key_value_heads=kv,
        head_dim=size,
        max_position_embeddings=int(rng.choice([20, 130, 600])),
        norm=str(rng.choice(["rms_norm", "layer_norm"])) if own else "rms_norm",
        norm_eps=float(rng.choice([1e-5, 1e-6])),
        hidden_act=str(rng.choice(["silu", "gelu", "relu", "gelu_pytorch_tanh"])) if own else "silu",
        gated=bool(rng.random() < 0.7) if own else True,
        rope=ropes[int(rng.integers(len(ropes)))],
        qkv_bias=family == "qwen2" or (own and rng.random() < 0.5),
        qk_norm=family == "qwen3",
        tie_word_embeddings=bool(rng.random() < 0.4),
        eos_token_id=(0,),
        **sliding,
    )
    weights = random_weights(config, seed, std=float(rng.choice([0.02, 0.2])))
    wild = bool(rng.random() < 0.6)
    for tensor in weights.values():
        if wild:
            tensor *= float(10 ** rng.uniform(-3, 2)) if rng.random() < 0.3 else 1.0
            if tensor.ndim == 2 and rng.random() < 0.3:
                tensor[int(rng.integers(len(tensor)))] *= 50.0
    kinds = ["float32", "float32", "bfloat16", "int8 cache"] if wild else list(FORMATS)
    return config, weights, FORMATS[str(rng.choice(kinds))]
