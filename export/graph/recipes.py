"""How a weight of the graph is made from tensors of the checkpoint. Every such value carries its recipe, into the file too."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEY = "headfold.recipe"  # among a value's metadata


@dataclass(frozen=True)
class WeightRecipe:
    """Some tensors of the checkpoint, end to end along their first axis, then transposed or not, then alternating or not."""

    sources: tuple[str, ...]
    transposed: bool = False  # the last two axes
    alternating: bool = (
        False  # along the second axis, the first half's rows and the second's in turn: gates and ups of experts
    )

    @property
    def name(self) -> str:
        """What the value is called: "q+k+v.T" for three tensors, joined and transposed."""
        return "+".join(self.sources) + (".T" if self.transposed else "") + (".alternating" if self.alternating else "")

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The value's shape, from those of its sources."""
        parts = [shapes[name] for name in self.sources]
        joined = (sum(part[0] for part in parts), *parts[0][1:])
        return (*joined[:-2], joined[-1], joined[-2]) if self.transposed else joined

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The value itself, contiguous; `read` gives a source."""
        parts = [read(name) for name in self.sources]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]  # which would copy it
        turned = joined.mT if self.transposed else joined
        if self.alternating:
            count, rows, *rest = turned.shape
            turned = turned.reshape(count, 2, rows // 2, *rest).transpose(1, 2).flatten(1, 2)
        return turned.contiguous()

    def joined(self, *others: "WeightRecipe") -> "WeightRecipe":
        """This and the others end to end, before they are transposed."""
        return WeightRecipe(sum((other.sources for other in others), self.sources), self.transposed)


def set_recipe(value: ir.Value, recipe: WeightRecipe) -> None:
    """Name an initializer and remember its recipe."""
    content: dict[str, object] = {"sources": recipe.sources, "transposed": recipe.transposed}
    if recipe.alternating:
        content["alternating"] = True
    value.metadata_props.clear()  # what torch says of its parameter
    value.metadata_props[_KEY] = json.dumps(content)
    value.name = recipe.name


def recipe_of(value: ir.Value) -> WeightRecipe | None:
    """The recipe of an initializer, of a traced graph or one read from a file; None for what is no weight.

    Raises:
        ValueError: the file says something that is no recipe.
    """
    text = value.metadata_props.get(_KEY)
    if text is None:
        return None
    match json.loads(text):
        case {"sources": [*sources], "transposed": bool(transposed), **rest}:
            alternating = rest.pop("alternating", False) is True
            if not rest and sources and all(isinstance(name, str) for name in sources):
                return WeightRecipe(tuple(sources), transposed, alternating)
    raise ValueError(f"{value.name} has no recipe but {text}")


def multiplies(node: ir.Node, recipe: WeightRecipe) -> bool:
    """Whether a node with a weight of this recipe as its second input is `x @ W.T`, of W [N, K] as it is stored, plus a bias or not."""
    if node.domain or node.op_type not in {"MatMul", "Gemm"} or node.attributes.get_int("transA", 0) == 1:
        return False
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return plain and recipe.transposed != (node.attributes.get_int("transB", 0) == 1)


def lacks_recipes(model: ir.Model) -> bool:
    """Whether there are weights, and the file says of none of them how it was made."""
    values = model.graph.initializers.values()
    return bool(values) and not any(_KEY in value.metadata_props for value in values)


def add_weight(model: ir.Model, recipe: WeightRecipe, shape: Sequence[int], dtype: ir.DataType | None) -> ir.Value:
    """A new initializer. It has no value before `headfold.export.graph.weights` attaches it."""
    assert dtype is not None
    value = ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype))
    set_recipe(value, recipe)
    value.const_value = ir.LazyTensor(_no_value, dtype=dtype, shape=ir.Shape(shape), name=value.name)
    model.graph.register_initializer(value)
    return value


def shared_constant(model: ir.Model, name: str, content: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    """The initializer `name`, which is no weight: one for all that want it. Its `content` is that of `dtype`, by default numpy's."""
    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(content, dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(content.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def replace_node(model: ir.Model, node: ir.Node, tape: ir.tape.Tape, result: ir.Value) -> None:
    """The tape's nodes stand in a node's place, and its result is what the node's output was."""
    old = node.outputs[0]
    result.name, result.type, result.shape = old.name, old.type, old.shape
    model.graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def remove_unread(model: ir.Model, values: Iterable[ir.Value | None]) -> None:
    """Drop those initializers that nothing reads any more."""
    for value in values:
        if value is not None and value.name is not None and not value.uses():
            model.graph.initializers.pop(value.name, None)


def _no_value() -> ir.TensorProtocol:
    raise RuntimeError("the graph has no weights yet: headfold.export.graph.weights attaches them")
