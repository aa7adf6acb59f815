"""headfold::GroupedQueryAttention as a TensorRT plugin: one IPluginV3, written once for TensorRT and TensorRT-RTX.

Inputs and outputs are the op's, in its order, but for `total_sequence_length`: a plugin has no numbers on the host, so `attention_mask`
[B, T] stands in for it, and only its shape counts. The caches are aliased: `present_*` is `past_*`, updated in place.
"""

from dataclasses import asdict, fields
from typing import Any

import numpy as np

from headfold.plugins.attention.kernel_contract import KernelSpec, max_workspace_bytes
from headfold.plugins.attention.launcher import Launcher, Pointers, Shape
from headfold.plugins.attention.schema import DOMAIN, INPUTS, NORMS, OP_TYPE, OUTPUTS, SCALES, VERSION, Attributes
from headfold.plugins.dtypes import FLOATS, QUANTIZED, from_tensorrt

NAME, PLUGIN_VERSION, NAMESPACE = OP_TYPE, str(VERSION), DOMAIN
ALIASES = {1: INPUTS.index("past_key"), 2: INPUTS.index("past_value")}  # output: the input whose memory it is
_KINDS: dict[str, Any] = {field.name: field.type for field in fields(Attributes)}  # int or float
_COS = INPUTS.index("cos_cache")
_INT64 = {INPUTS.index("past_lengths"), INPUTS.index("total_sequence_length")}
_creators: dict[str, Any] = {}  # by module name: TensorRT keeps no reference, so we do


def register(trt: Any, launcher: Launcher | None) -> None:
    """Make the plugin known to this TensorRT. Called again, it only exchanges the launcher of plugins created from then on.

    Args:
        trt: the module, from `headfold.plugins.tensorrt_library.open_tensorrt`.
        launcher: what runs the kernels; None where engines are only built.
    """
    known = _creators.get(trt.__name__)
    if known is not None:
        known.launcher = launcher
        return
    creator = _creator_class(trt)(launcher)
    if not trt.get_plugin_registry().register_creator(creator, NAMESPACE):
        raise RuntimeError(
            f"{trt.__name__} refused to register the plugin {NAMESPACE}::{NAME}: another one has its name"
        )
    _creators[trt.__name__] = creator


def registered(trt: Any) -> bool:
    """Whether `register` was called for this TensorRT."""
    return trt.__name__ in _creators


class _Behaviour:
    """What the plugin does, as the interfaces of IPluginV3 ask; `_plugin_class` adds the interfaces themselves."""

    trt: Any

    def _set_up(self, attributes: Attributes, launcher: Launcher | None) -> None:
        self.attributes, self.launcher = attributes, launcher
        self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, PLUGIN_VERSION, NAMESPACE
        self.num_outputs = len(OUTPUTS)

    def get_capability_interface(self, _: Any) -> Any:
        return self

    # Build: what it takes and gives

    def get_output_data_types(self, inputs: list[Any]) -> list[Any]:
        return [inputs[0], *(inputs[source] for source in ALIASES.values())]

    def get_output_shapes(self, inputs: list[Any], _: Any, __: Any) -> list[Any]:
        return [self.trt.DimsExprs(inputs[source]) for source in (0, *ALIASES.values())]

    def get_aliased_input(self, output: int) -> int:
        return ALIASES.get(output, -1)

    def supports_format_combination(self, position: int, tensors: list[Any], inputs: int) -> bool:
        described = tensors[position].desc
        if described.format != self.trt.TensorFormat.LINEAR:
            return False
        dtype, first = from_tensorrt(described.type), from_tensorrt(tensors[0].desc.type)
        if position == 0:
            return dtype in FLOATS
        if position in _INT64:
            return dtype == "int64"
        if position < ALIASES[1]:  # TensorRT has not told the cache's dtype yet
            return dtype == first
        cache = from_tensorrt(tensors[ALIASES[1]].desc.type)
        names = input_names(inputs, cache in QUANTIZED)
        if names is None:
            return False
        name = (*names, *OUTPUTS)[position]
        if name == "past_key" and dtype in QUANTIZED:
            return True
        if name in ("past_value", "present_key", "present_value"):
            return dtype == cache  # the caches are alike
        return dtype == ("float32" if name in SCALES else first)

    def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
        del inputs, outputs

    def get_valid_tactics(self) -> list[int]:
        return []

    def get_workspace_size(self, inputs: list[Any], _: Any) -> int:
        batch, new_tokens, _width = inputs[0].max
        spec = kernel_spec(self.attributes, [tensor.desc for tensor in inputs])
        return max_workspace_bytes(spec, batch, new_tokens, inputs[ALIASES[1]].max[2])

    def get_fields_to_serialize(self) -> Any:
        self._kept = _fields(self.trt, self.attributes)  # TensorRT reads the memory after this returns
        return self.trt.PluginFieldCollection(self._kept)

    # Run

    def set_tactic(self, _: int) -> None:
        return None

    def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
        """Hold the kernels to the node, before they run."""
        del outputs
        if self.launcher is not None and self.launcher.spec != (wanted := kernel_spec(self.attributes, inputs)):
            raise RuntimeError(f"its kernels are for another attention: {differences(self.launcher.spec, wanted)}")

    def attach_to_context(self, _: Any) -> Any:
        return self.clone()  # type: ignore[attr-defined]

    def enqueue(
        self,
        input_desc: list[Any],
        output_desc: list[Any],
        inputs: list[int],
        outputs: list[int],
        workspace: int,
        stream: int,
    ) -> None:
        del output_desc
        if self.launcher is None:
            raise RuntimeError("the plugin was registered without a launcher: it can build engines, not run them")
        names = input_names(len(inputs), from_tensorrt(input_desc[ALIASES[1]].type) in QUANTIZED)
        assert names is not None
        shapes = [tuple(d.dims) for d in input_desc]
        named = dict(zip(names, inputs, strict=True))
        launch(self.launcher, self.attributes, shapes, named, outputs, workspace, stream)


def _plugin_class(module: Any) -> type:
    bases: Any = (module.IPluginV3, module.IPluginV3OneCore, module.IPluginV3OneBuildV2, module.IPluginV3OneRuntime)

    class GroupedQueryAttention(_Behaviour, *bases):  # type: ignore[misc]  # they are Any
        """See module."""

        trt = module

        def __init__(self, attributes: Attributes, launcher: Launcher | None) -> None:
            for base in bases:
                base.__init__(self)
            self._set_up(attributes, launcher)

        def clone(self) -> Any:
            copy = GroupedQueryAttention(self.attributes, self.launcher)
            copy.__dict__.update(self.__dict__)
            return copy

    return GroupedQueryAttention


def _creator_class(trt: Any) -> type:
    plugin = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]  # the base is Any
        """Makes plugins from a node's attributes, or from an engine."""

        def __init__(self, launcher: Launcher | None) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.launcher = launcher
            self.name, self.plugin_version, self.plugin_namespace = NAME, PLUGIN_VERSION, NAMESPACE
            self._fields = _fields(trt, None)
            self.field_names = trt.PluginFieldCollection(self._fields)
            self._made: list[Any] = []

        def create_plugin(self, name: str, collection: Any, phase: Any) -> Any:
            del name, phase
            made = plugin(read_attributes(collection), self.launcher)
            self._made.append(made)  # TensorRT keeps no reference
            return made

    return Creator


def launch(
    launcher: Launcher,
    attributes: Attributes,
    shapes: list[tuple[int, ...]],
    named: dict[str, int],
    outputs: list[int],
    workspace: int,
    stream: int,
) -> None:
    """One launch from what TensorRT hands to `enqueue`: `shapes` of the inputs, and addresses, the inputs' by name."""
    _, present_key, present_value = outputs  # are past_key and past_value
    launcher.launch(
        Pointers(
            query=named["query"],
            key=named["key"],
            value=named["value"],
            present_key=present_key,
            present_value=present_value,
            past_lengths=named["past_lengths"],
            cos_cache=named["cos_cache"],
            sin_cache=named["sin_cache"],
            output=outputs[0],
            q_norm_weight=named.get("q_norm_weight", 0),
            k_norm_weight=named.get("k_norm_weight", 0),
            key_scale=named.get("key_scale", 0),
            value_scale=named.get("value_scale", 0),
        ),
        Shape(batch=shapes[0][0], new_tokens=shapes[0][1], capacity=shapes[ALIASES[1]][2]),
        scale=attributes.scale,
        window=attributes.local_window_size,
        epsilon=attributes.qk_norm_epsilon,
        workspace=workspace,
        stream=stream,
    )


def input_names(count: int, quantized: bool) -> tuple[str, ...] | None:
    """What a node's inputs are, by their number and whether its cache has scales; None if it can have no such number."""
    scales = SCALES if quantized else ()
    possible = ((*INPUTS, *norms, *scales) for norms in ((), NORMS))
    return next((names for names in possible if len(names) == count), None)


def kernel_spec(attributes: Attributes, inputs: list[Any]) -> KernelSpec:
    """Which kernels a node needs, by its attributes and the descriptions of its inputs."""
    dtype, cache = (from_tensorrt(inputs[position].type) for position in (0, ALIASES[1]))
    names = input_names(len(inputs), cache in QUANTIZED) or ()
    return KernelSpec.model_validate(
        {
            "num_heads": attributes.num_heads,
            "kv_num_heads": attributes.kv_num_heads,
            "head_dim": inputs[ALIASES[1]].dims[3],
            "rotary_dim": 2 * inputs[_COS].dims[1],
            "rotary_interleaved": bool(attributes.rotary_interleaved),
            "qk_norm": set(NORMS) <= set(names),
            "softcap": attributes.softcap,
            "dtype": dtype,
            "cache_dtype": cache,
        }
    )


def differences(have: KernelSpec, wanted: KernelSpec) -> str:
    """In which fields two specs differ, for a message."""
    pairs = ((name, getattr(have, name), getattr(wanted, name)) for name in KernelSpec.model_fields)
    return ", ".join(f"{name} {ours} instead of {theirs}" for name, ours, theirs in pairs if ours != theirs)


def read_attributes(collection: Any) -> Attributes:
    """The op's attributes from plugin fields; a field that TensorRT adds (name, version, namespace) is none of them."""
    given = {field.name: np.asarray(field.data).reshape(-1)[0] for field in collection if field.name in _KINDS}
    return Attributes(**{name: _KINDS[name](number) for name, number in given.items()})


def _fields(trt: Any, attributes: Attributes | None) -> list[Any]:
    """The attributes as plugin fields; without values, only their names and types."""
    values = asdict(attributes) if attributes is not None else {}
    result = []
    types = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    for name, kind in _KINDS.items():
        dtype, field_type = types[kind]
        result.append(trt.PluginField(name, np.array([values[name]] if values else [], dtype), field_type))
    return result
