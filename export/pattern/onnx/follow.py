"""Following an operand of an ONNX operation back to the tensor that is stored for it.

1. Identity, Cast and CastLike keep values (a cast keeps zeros) and axes; Transpose permutes the axes, Squeeze and
   Unsqueeze drop and add some.
2. QuantizeLinear and DequantizeLinear (per tensor, per axis, blocked) keep axes; zero is where the stored integer
   equals the zero point.
3. A Gather along the first axis of a tensor of rank 3 or more (experts picked at run time) keeps the other axes. A
   Gather from a matrix is an embedding look-up: not a weight of the product it feeds.
4. The body of a Scan sees a stored tensor without the axis it is scanned along; the bodies of Loop and Scan see a
   carried value that they hand on unchanged as it came.
5. Through anything else (Reshape, Mul, Concat, a product of constants, ...) the constant is computed, with onnx's
   reference evaluator. What cannot be computed is a `Problem`. Only an operand that depends on the graph's inputs is no
   weight at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import onnx_ir as ir

from sparsepass.export.pattern.bits import Array
from sparsepass.export.pattern.onnx.data import ConstantValues, OnnxData, Problem, is_lost, stored
from sparsepass.export.pattern.onnx.ops import DOMAINS

_KEEPING = {"Identity", "Cast", "CastLike"}
_QUANTIZE = {"QuantizeLinear", "TRT_FP8QuantizeLinear"}
_DEQUANTIZE = {"DequantizeLinear", "TRT_FP8DequantizeLinear"}
_FOLLOWED = _KEEPING | _QUANTIZE | _DEQUANTIZE | {"Transpose"}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
# Of a constant and a run-time shape or range they make a rearranged constant: never a weight that can be followed.
_REARRANGING = {"Reshape", "Slice", "Flatten"}


@final
@dataclass(frozen=True, kw_only=True)
class Constant:
    """A stored tensor as an operation sees it.

    Attributes:
        tensor: The tensor; where it had to be computed, a lazy one.
        name: Its name.
        axes: For each axis of the operand the stored axis it is; None for one that is not stored.
        through: Operation types passed on the way.
        computed: Operation types that the value was computed through; empty for a stored tensor.
        aliases: Value names met on the way.
        zero_point: The stored integers that mean zero, broadcast to the stored shape; None for plain zero.
        quantized_by: Zero point of a QuantizeLinear still waiting for its DequantizeLinear, as bytes.
    """

    tensor: ir.TensorProtocol
    name: str
    axes: tuple[int | None, ...]
    through: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    zero_point: Array | None = None
    quantized_by: bytes | None = None


@dataclass(frozen=True)
class _Sliced:
    """A step into the body of a Scan: this axis of the stored tensor is scanned along."""

    axis: int
    op_type: str = "Scan"


@final
class Follower:
    """Follows operands of one model back to what is stored.

    Args:
        model: The model, local functions inlined.
        data: Reads its tensors.

    Attributes:
        nodes: All operations, those of subgraphs included.
        data: See above.
        constants: Values that do not depend on the graph's inputs, but for those that are stored.
        values: Computes constants.
    """

    def __init__(self, model: ir.Model, data: OnnxData) -> None:
        self.nodes = tuple(ir.traversal.RecursiveGraphIterator(model.graph))
        self.data = data
        self.constants: set[ir.Value] = set()
        self._bound: dict[ir.Value, tuple[ir.Value, int | None]] = {}
        num_known = -1
        # What an If yields is known after its branches only: go over the nodes until nothing new turns up.
        while num_known < len(self.constants) + len(self._bound):
            num_known = len(self.constants) + len(self._bound)
            for node in self.nodes:
                self._learn(node)
        self.values = ConstantValues(data, model)

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value does not depend on the graph's inputs."""
        return value is not None and (value in self.constants or stored(value) is not None or is_lost(value))

    def names(self, value: ir.Value | None) -> Iterator[str]:
        """Names on the way back from an operand, by the first constant input of each node; the last is the stored tensor's."""
        while value is not None:
            yield value.name or "?"
            node = value.producer()
            if stored(value) is not None:
                return
            if node is None:
                value = self._bound[value][0] if value in self._bound else None
                continue
            value = next((v for v in node.inputs if self.is_constant(v)), None)

    def follow(self, value: ir.Value | None, *, gather: bool = False) -> Constant | None:
        """Follow an operand back.

        Args:
            value: The operand.
            gather: A Gather of experts may lie on the way.

        Returns:
            The constant; None when it depends on the graph's inputs.

        Raises:
            Problem: It is constant and cannot be followed.
        """
        chain: list[ir.Node | _Sliced] = []
        names: list[str] = []
        while value is not None:
            tensor = stored(value)
            if tensor is not None:
                return self._replay(tensor, value.name or tensor.name or "?", chain, names)
            names.append(value.name or "?")
            node = value.producer()
            if node is None and value in self._bound:
                value, axis = self._bound[value]
                chain += [] if axis is None else [_Sliced(axis)]
                continue
            if node is None:
                if is_lost(value):
                    raise Problem(f"no dense tensor is stored for {value.name!r} (a sparse initializer?)")
                return None
            if not self._is_followed(node, value, gather=gather):
                if value in self.constants:
                    return self._computed(value, node, chain, names)
                if node.op_type in _REARRANGING and self.is_constant(node.inputs[0]):
                    raise Problem(
                        f"the constant passes through {node.op_type} with a shape or range known at run time only; export "
                        "the model with that size fixed"
                    )
                return None
            chain.append(node)
            value = node.inputs[0]
        return None

    def zero_point(self, value: ir.Value | None, constant: Constant, axis: int, block: int) -> Array | None:
        """Read a zero point and broadcast it against the stored tensor.

        Args:
            value: The zero point; None if there is none.
            constant: What it belongs to.
            axis: The axis of the operand that a one-dimensional zero point runs along.
            block: Entries of that axis that share one, or 0.

        Returns:
            The zero point; None when it is zero everywhere.

        Raises:
            Problem: It is not constant, or of a shape that is not supported.
        """
        if value is None:
            return None
        found = self.follow(value)
        if found is None:
            raise Problem(f"the zero point {value.name!r} is not a constant")
        view = self.data.bits(found.tensor, None, found.name)
        # All bits but a float's sign: a zero point of an 8-bit float is a zero of either sign.
        zero: Array = view.bits & view.bits.dtype.type(view.magnitude_mask)
        if not zero.any():
            return None
        axes = constant.axes
        if zero.size == 1:
            return zero.reshape((1,) * len(constant.tensor.shape))
        if any(a is None for a in axes) or len(axes) != len(constant.tensor.shape):
            raise Problem("the zero points of a gathered, scanned or squeezed tensor are not supported")
        kept = [int(a) for a in axes if a is not None]
        if zero.ndim == 1 and not block:
            spread = [1] * len(axes)
            spread[kept[axis % len(axes)]] = zero.size
            return zero.reshape(spread)
        if zero.ndim != len(axes) or not block:
            raise Problem(f"zero points of shape {list(zero.shape)} are not supported")
        target = kept[axis % len(axes)]
        zero = zero.transpose(np.argsort(kept))
        return np.repeat(zero, block, axis=target).take(range(constant.tensor.shape.numpy()[target]), axis=target)

    def _learn(self, node: ir.Node) -> None:
        """Note which outputs of a node are constant, and which outer value each input of its bodies is."""
        graphs = [g for a in node.attributes.values() for g in _graphs(a)]
        if not graphs:
            inputs = [value for value in node.inputs if value is not None]
            if (inputs or node.op_type == "Constant") and node.op_type not in _RANDOM and all(map(self.is_constant, inputs)):
                self.constants.update(node.outputs)
        elif node.op_type == "If":
            for i, output in enumerate(node.outputs):
                if all(self.is_constant(graph.outputs[i]) for graph in graphs):
                    self.constants.add(output)
        elif node.op_type in ("Loop", "Scan") and node.domain in ("", "ai.onnx"):
            self._bind(node, graphs[0])

    def _bind(self, node: ir.Node, body: ir.Graph) -> None:
        is_scan = node.op_type == "Scan"
        num_scanned = int_of(node, "num_scan_inputs", 0) if is_scan else 0
        # A Loop's body also begins with the iteration and the condition, and ends (before its outputs) with the condition.
        inner, outer = list(body.inputs), list(node.inputs)
        first, last = (0, len(inner) - num_scanned) if is_scan else (2, len(inner))
        carried = list(zip(inner, outer, strict=True))[first:last]
        for number, (inside, outside) in enumerate(carried):
            handed_on = body.outputs[number if is_scan else number + 1]
            while (
                (source := handed_on.producer()) is not None and source.op_type == "Identity" and source.inputs[0] is not None
            ):
                handed_on = source.inputs[0]
            if handed_on is inside and self.is_constant(outside):
                self._bound[inside] = (outside, None)  # type: ignore[assignment]
                self.constants.add(inside)
        if num_scanned:
            given = list(node.attributes["scan_input_axes"].as_ints()) if "scan_input_axes" in node.attributes else []
            pairs = zip(inner[-num_scanned:], outer[-num_scanned:], given or [0] * num_scanned, strict=True)
            for inside, outside, axis in pairs:
                if self.is_constant(outside):
                    self._bound[inside] = (outside, axis)  # type: ignore[assignment]
                    self.constants.add(inside)

    def _is_followed(self, node: ir.Node, value: ir.Value, *, gather: bool) -> bool:
        if node.domain not in DOMAINS:
            return False
        if node.op_type in ("Squeeze", "Unsqueeze"):
            return len(node.inputs) < 2 or self.is_constant(node.inputs[1])
        return node.op_type in _FOLLOWED or (node.op_type == "Gather" and gather and value not in self.constants)

    def _computed(
        self, value: ir.Value, node: ir.Node, chain: Sequence[ir.Node | _Sliced], names: Sequence[str]
    ) -> Constant | None:
        """A constant that other operations make of what is stored."""
        if node.op_type == "Constant":
            raise Problem("a Constant node without a dense tensor")
        if node.op_type == "If":
            raise Problem("an If picks the weight at run time; export the model without it")
        try:
            tensor = self.values.lazy(value)
        except Problem as error:
            raise Problem(
                f"the constant passes through {node.op_type} before its use, and that cannot be computed here ({error}); "
                "fold constants into the file first"
            ) from error
        path = tuple(self.names(value))
        found = self._replay(tensor, path[-1], chain, (*names, *path[:-1]))
        return found and replace(found, computed=self.values.operations(value))

    def _replay(
        self, tensor: ir.TensorProtocol, name: str, chain: Sequence[ir.Node | _Sliced], names: Sequence[str]
    ) -> Constant | None:
        """Walk from the stored tensor to its use, keeping track of axes and zero points."""
        rank = len(tensor.shape)
        constant = Constant(tensor=tensor, name=name, axes=tuple(range(rank)), aliases=tuple(names))
        for node in reversed(chain):
            axes = constant.axes
            if not axes and _moves_axes(node):
                raise Problem("it is a single number, and its axes are moved")
            if isinstance(node, _Sliced):
                axes = axes[: node.axis % len(axes)] + axes[node.axis % len(axes) + 1 :]
            elif node.op_type == "Transpose":
                perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(axes))[::-1]
                if sorted(perm) != list(range(len(axes))):
                    raise Problem(f"it has {len(axes)} axes and is transposed by {list(perm)}")
                axes = tuple(axes[i] for i in perm)
            elif node.op_type in ("Squeeze", "Unsqueeze"):
                axes = self._squeezed(node, constant)
            elif node.op_type == "Gather":
                if len(axes) < 3 or int_of(node, "axis", 0) != 0:
                    return None
                indices = node.inputs[1]
                if indices is None or indices.shape is None:
                    raise Problem("it is gathered with indices of unknown rank; run ONNX shape inference first")
                axes = (None,) * len(indices.shape) + axes[1:]
            elif node.op_type in _QUANTIZE | _DEQUANTIZE:
                block = int_of(node, "block_size", 0)
                zero = self.zero_point(input_of(node, 2), constant, int_of(node, "axis", 1), block)
                if node.op_type in _QUANTIZE:
                    constant = replace(constant, quantized_by=b"" if zero is None else zero.tobytes())
                else:
                    constant = settle(constant, zero)
            constant = replace(constant, axes=axes, through=(*constant.through, node.op_type))
        return constant

    def _squeezed(self, node: ir.Node, constant: Constant) -> tuple[int | None, ...]:
        axes = constant.axes
        listed = input_of(node, 1)
        if listed is not None:
            found = self.follow(listed)
            assert found is not None, "the caller has checked that the axes are constant"
            chosen = [int(i) for i in self.data.bits(found.tensor, None, found.name).bits.astype(np.int64).reshape(-1)]
        elif "axes" in node.attributes:
            chosen = list(node.attributes["axes"].as_ints())
        else:
            shape = constant.tensor.shape.numpy()
            chosen = [i for i, axis in enumerate(axes) if axis is None or shape[axis] == 1]
        if node.op_type == "Squeeze":
            dropped = {i % len(axes) for i in chosen}
            return tuple(axis for i, axis in enumerate(axes) if i not in dropped)
        rank = len(axes) + len(chosen)
        added = {i % rank for i in chosen}
        if len(added) < len(chosen):
            raise Problem(f"an axis is added twice ({chosen})")
        kept = iter(axes)
        return tuple(None if i in added else next(kept) for i in range(rank))


def _moves_axes(node: "ir.Node | _Sliced") -> bool:
    """Whether an operation needs its operand to have axes."""
    return isinstance(node, _Sliced) or node.op_type in ("Squeeze", "Gather")


def settle(constant: Constant, zero: Array | None) -> Constant:
    """Apply the zero point of an operation that dequantizes.

    Raises:
        Problem: The constant was quantized with another.
    """
    if constant.quantized_by is None:
        return replace(constant, zero_point=zero)
    if constant.quantized_by != (b"" if zero is None else zero.tobytes()):
        raise Problem("it is quantized with one zero point and dequantized with another")
    return replace(constant, quantized_by=None)


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def int_of(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node.

    Raises:
        Problem: If it is something else.
    """
    if name not in node.attributes:
        return default
    attribute = node.attributes[name]
    if attribute.type != ir.AttributeType.INT:
        raise Problem(f"its attribute {name} is no integer")
    return int(attribute.as_int())


def _graphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()
