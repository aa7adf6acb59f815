"""What the custom ops' ONNX files share: an operator's ONNX schema from its dataclasses, and a function's body, node by node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

from onnx import AttributeProto, FunctionProto, NodeProto, helper
from onnx.defs import OpSchema

OPSET = 24  # of the default domain: the first with TensorScatter


@dataclass(frozen=True)
class Operator:
    """An operator as its schema file tells of it. An input that is None by default is optional."""

    domain: str
    op_type: str
    version: int
    inputs: type[Any]  # dataclasses, whose fields are in the operator's order
    attributes: type[Any]
    outputs: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, AttributeProto.AttributeType]:
        """What ONNX calls each attribute's kind."""
        return {field.name: _KINDS[_type_of(field.type)] for field in fields(self.attributes)}

    def schema(self, types: Mapping[str, str], constraints: Sequence[tuple[str, list[str], str]]) -> OpSchema:
        """The ONNX schema; not registered, so that no tool depends on headfold being imported.

        Args:
            types: of those inputs and outputs that are not of type "T".
            constraints: on "T" and the like, as an OpSchema has them.
        """
        single, optional = OpSchema.FormalParameterOption.Single, OpSchema.FormalParameterOption.Optional
        return OpSchema(
            self.op_type,
            self.domain,
            self.version,
            inputs=[
                OpSchema.FormalParameter(
                    field.name,
                    types.get(field.name, "T"),
                    param_option=optional if field.default is None else single,
                )
                for field in fields(self.inputs)
            ],
            outputs=[OpSchema.FormalParameter(name, types.get(name, "T")) for name in self.outputs],
            type_constraints=constraints,
            attributes=[
                OpSchema.Attribute(name, OpSchema.AttrType(kind))  # type: ignore[call-arg]  # unknown to the stub
                for name, kind in self.kinds.items()
            ],
        )


_KINDS = {int: AttributeProto.INT, float: AttributeProto.FLOAT, str: AttributeProto.STRING}


def _type_of(annotation: Any) -> type[Any]:
    """Of a field's values, which may be annotated as a few literal ones."""
    return type(get_args(annotation)[0]) if get_origin(annotation) is Literal else annotation


class Body:
    """Collects the nodes of a function that is the operator; a value is known by the name of the node's output."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.nodes: list[NodeProto] = []

    def __call__(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        refs: Mapping[str, str] | None = None,
        domain: str = "",
        **attributes: object,
    ) -> str:
        """Append a node; `refs` maps its attributes to the function's. Returns the first output."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        node = helper.make_node(op_type, inputs, names, domain=domain, **attributes)  # type: ignore[arg-type]
        for name, ref in (refs or {}).items():
            node.attribute.append(AttributeProto(name=name, ref_attr_name=ref, type=self.operator.kinds[ref]))
        self.nodes.append(node)
        return names[0]

    def ints(self, name: str, *values: int) -> str:
        """A constant vector."""
        return self("Constant", [], name, value_ints=values)

    def function(self, domains: Mapping[str, int], inputs: Sequence[str]) -> FunctionProto:
        """The function of these nodes, with so many of the operator's inputs; `domains` are those it uses, and their versions."""
        op, opsets = self.operator, [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        return helper.make_function(
            op.domain, op.op_type, list(inputs), list(op.outputs), self.nodes, opsets, list(op.kinds)
        )
