"""Conditions on the sizes of inputs, inside an ONNX graph: beyond them the graph fails, and the failing node's name says why.

A runtime knows nothing of the conditions that a graph was traced under, and would compute something else beyond them.
"""

import ast
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

_ARITHMETIC: dict[type, str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_COMPARISONS: dict[type, str] = {
    ast.Eq: "Equal", ast.Lt: "Less", ast.LtE: "LessOrEqual", ast.Gt: "Greater", ast.GtE: "GreaterOrEqual",
}  # fmt: skip
_NUMBERS = ("INT64", "INT32", "FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


def add_guards(model: ir.Model, limits: Sequence[str]) -> tuple[str, ...]:
    """Make a graph fail where the sizes of its inputs are beyond limits.

    For each limit one Reshape of a single zero has a wrong shape where the limit is broken. The zero is added to every input
    that holds numbers, so that nothing is computed before.

    Args:
        model: Changed in place.
        limits: Such as ``"input_ids[1] <= 8"``; see `sparsepass.graph.lengths`.

    Returns:
        The limits that cannot be said in operators of ONNX (divisions by a size); the graph does not watch them.
    """
    guards = _Guards(model.graph)
    left = tuple(limit for limit in limits if not guards.watch(limit))
    guards.finish()
    return left


class _Guards:
    """Builds the nodes of the guards of one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.nodes: list[ir.Node] = []
        self.zeros: list[ir.Value] = []
        self.numbers: dict[int, ir.Value] = {}

    def watch(self, limit: str) -> bool:
        """Add the guard of one limit; False, and nothing added, if it cannot be said."""
        number = len(self.nodes)
        try:
            holds = self._value(ast.parse(limit, mode="eval").body)
        except _UnsaidError:
            del self.nodes[number:]
            return False
        broken = self._node("Cast", [self._node("Not", [holds])], to=ir.DataType.INT64)
        shape = self._node("Add", [broken, self._number(1)])
        self.zeros.append(self._node("Reshape", [self._number(0), shape], name=f"this graph holds only for {limit}"))
        return True

    def finish(self) -> None:
        """Put the nodes in front of all others, and the guarded inputs in the place of the inputs."""
        if not self.zeros:
            return
        zero = self.zeros[0]
        for other in self.zeros[1:]:
            zero = self._node("Add", [zero, other])
        guarded = []
        for value in self.inputs.values():
            if value.dtype is not None and value.dtype.name in _NUMBERS:
                uses = [(usage.node, usage.idx) for usage in value.uses() if usage.node not in self.nodes]
                same = self._node("Add", [value, self._node("CastLike", [zero, value])])
                same.shape, same.type = value.shape, value.type
                guarded.append((uses, same))
        used = {value for node in self.nodes for value in node.inputs}
        self.graph.initializers.update({str(value.name): value for value in self.numbers.values() if value in used})
        self.graph.insert_before(self.graph[0], self.nodes)
        for uses, same in guarded:
            for node, index in uses:
                node.replace_input_with(index, same)

    def _node(self, kind: str, inputs: Sequence[ir.Value], name: str | None = None, **attributes: int) -> ir.Value:
        label = name or f"guard_{len(self.nodes)}"
        node = ir.node(kind, inputs, attributes, name=label)
        node.outputs[0].name = f"guard_{len(self.nodes)}_{kind}"
        self.nodes.append(node)
        return node.outputs[0]

    def _number(self, number: int) -> ir.Value:
        if number not in self.numbers:
            name, kind = f"guard_number_{number}", ir.TensorType(ir.DataType.INT64)
            tensor = ir.tensor(np.array([number], np.int64), name=name)
            self.numbers[number] = ir.Value(name=name, shape=ir.Shape([1]), type=kind, const_value=tensor)
        return self.numbers[number]

    def _value(self, node: ast.expr) -> ir.Value:
        """The value of a condition, or of a number in it, [1]."""
        match node:
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                return self._number(number)
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int() as axis)) if name in self.inputs:
                return self._node("Shape", [self.inputs[name]], start=axis, end=axis + 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._node(_ARITHMETIC[type(op)], [self._value(left), self._value(right)])
            case ast.BinOp(left=left, op=ast.FloorDiv() | ast.Mod() as op, right=ast.Constant(value=int() as number)) if number:
                value, divisor = self._value(left), self._number(number)
                rest = self._node("Mod", [value, divisor])
                if isinstance(op, ast.Mod):
                    return rest
                return self._node("Div", [self._node("Sub", [value, rest]), divisor])
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._node("Neg", [self._value(operand)])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._node("Not", [self._value(operand)])
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                sides = [self._value(left), self._value(right)]
                if isinstance(op, ast.NotEq):
                    return self._node("Not", [self._node("Equal", sides)])
                if type(op) in _COMPARISONS:
                    return self._node(_COMPARISONS[type(op)], sides)
            case ast.BoolOp(op=op, values=[first, *others]):
                found = self._value(first)
                for other in others:
                    found = self._node("And" if isinstance(op, ast.And) else "Or", [found, self._value(other)])
                return found
            case ast.Call(func=ast.Name(id="max" | "min" as name), args=arguments, keywords=[]):
                return self._node(name.capitalize(), [self._value(each) for each in arguments])
        raise _UnsaidError


class _UnsaidError(Exception):
    """A condition that the operators here do not say."""
