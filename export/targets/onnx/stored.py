"""What the integers of a written ONNX file stand for, by the definitions of the operators that read them."""

from dataclasses import dataclass
from typing import final

import numpy as np
import onnx_ir as ir

from sparsepass.export.pattern import unpack_bits
from sparsepass.export.targets.onnx.artifact import Array, StoredWeight, apply_view
from sparsepass.graph.integers import integers_of
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.rounding import from_rows

_READERS = {"qdq": ("DequantizeLinear", 0), "matmulnbits": ("MatMulNBits", 1)}


@final
@dataclass(frozen=True, kw_only=True)
class StoredIntegers:
    """A weight that a file holds as integers: ``(numbers - zeros) scales``.

    Attributes:
        numbers: The integers, float32.
        scales: Of sizes that are spread over those of the integers, float32.
        zeros: The same.
        dtype: numpy's type of the scales, and of the product.
        is_folded: Whether zero points are no integers, because they hold a SLoRB branch.
    """

    numbers: Array
    scales: Array
    zeros: Array
    dtype: "np.dtype[np.generic]"
    is_folded: bool = False

    @property
    def values(self) -> Array:
        """What they stand for, float32."""
        found: Array = (self.numbers - self.zeros) * self.scales
        return found


def holds_integers(program: Program, weight: str, stored: StoredWeight, graph: ir.Graph) -> bool:
    """Whether a file holds the integers of a program's weight.

    Args:
        program: Has the weight.
        weight: Its name.
        stored: What was written.
        graph: Read back from the file.

    Exactness: values have to be bitwise those of the program's integers, rounded once to the file's type. With a branch folded
    into zero points, integers have to be the program's, and values the sum of both to within one rounding of a zero point.
    """
    found = read_integers(graph, stored)
    own, like = integers_of(program, weight), program.tensor(weight)
    if found is None or own is None:
        return False
    axis = program.quantized[weight].axis
    expected = apply_view(from_rows(own.weight_OI, axis, like).numpy(), stored.view)
    if expected.shape != found.numbers.shape:
        return False
    if not found.is_folded:
        mine, theirs = (np.ascontiguousarray(each.astype(found.dtype)) for each in (expected, found.values))
        return mine.tobytes() == theirs.tobytes()
    state, middle = program.sparse[weight].branch, 0 if own.zeros_OG is not None else 1 << own.grid.bits - 1
    if state is None:
        return False
    added = masked_weight(program, state.weight).float().numpy().repeat(state.k, axis=1)
    numbers = own.numbers_OI.short().numpy() + middle
    allowed = _eps(found.dtype) * ((np.abs(found.zeros) + found.numbers) * found.scales + np.abs(added))
    off = np.abs(found.values.astype(np.float64) - (expected.astype(np.float64) + added))
    return np.array_equal(numbers, found.numbers) and bool((off <= allowed).all())


def read_integers(graph: ir.Graph, stored: StoredWeight) -> StoredIntegers | None:
    """Read a weight back; None if the graph does not hold it in the form that was written.

    Args:
        graph: From a file.
        stored: What was written. A weight of MatMulNBits comes back as [out, in].
    """
    value, (kind, place) = graph.initializers.get(stored.initializer), _READERS[stored.form]
    nodes = [] if value is None else [use.node for use in value.uses() if use.node.op_type == kind and use.idx == place]
    if not nodes:
        return None if value is None or stored.form != "qdq" else _looked_up(value)
    given = [None if each is None or each.const_value is None else each.const_value for each in nodes[0].inputs[place:]]
    numbers, scales, zeros = (*given, None)[:3]
    if numbers is None or scales is None:
        return None
    whole = numbers.numpy().astype(np.uint8 if kind == "MatMulNBits" else np.float32)
    steps = scales.numpy().astype(np.float32)
    if kind == "DequantizeLinear":
        points = np.zeros_like(steps) if zeros is None else zeros.numpy().astype(np.float32)
        spread = [_along(each, nodes[0], whole.shape) for each in (steps, points)]
        return StoredIntegers(numbers=whole, scales=spread[0], zeros=spread[1], dtype=scales.dtype.numpy())
    num_in, bits, block = (nodes[0].attributes.get_int(name, 0) for name in ("K", "bits", "block_size"))
    codes = unpack_bits(whole.reshape(len(whole), -1), bits)[:, :num_in].astype(np.float32)
    is_folded = zeros is not None and zeros.dtype.is_floating_point()
    if zeros is None:
        points = np.full_like(steps, 1 << bits - 1)
    elif is_folded:
        points = zeros.numpy().astype(np.float32)
    else:
        points = unpack_bits(zeros.numpy().reshape(len(whole), -1), bits)[:, : steps.shape[1]].astype(np.float32)
    steps, points = (each.repeat(block, axis=1)[:, :num_in] for each in (steps, points))
    return StoredIntegers(numbers=codes, scales=steps, zeros=points, dtype=scales.dtype.numpy(), is_folded=is_folded)


def _looked_up(value: ir.Value) -> StoredIntegers | None:
    """A table whose rows are taken, and then multiplied by theirs of the scales."""
    for use in value.uses():
        casts = [each.node for each in use.node.outputs[0].uses()] if use.node.op_type == "Gather" else []
        products = [each.node for cast in casts for each in cast.outputs[0].uses() if each.node.op_type == "Mul"]
        columns = [other.producer() for product in products if (other := product.inputs[1]) is not None]
        rows = [column.inputs[0].producer() for column in columns if column is not None and column.inputs[0] is not None]
        scales = next((row.inputs[0] for row in rows if row is not None and row.inputs[1] is use.node.inputs[1]), None)
        if scales is not None and scales.const_value is not None and value.const_value is not None:
            steps = scales.const_value.numpy().astype(np.float32)[:, None]
            numbers = value.const_value.numpy().astype(np.float32)
            return StoredIntegers(
                numbers=numbers, scales=steps, zeros=np.zeros_like(steps), dtype=scales.const_value.dtype.numpy()
            )
    return None


def _along(array: Array, node: ir.Node, shape: tuple[int, ...]) -> Array:
    """Scales or zero points of a DequantizeLinear, spread over a tensor."""
    if array.ndim == 0:
        return array
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if block:
        spread: Array = array.repeat(block, axis=axis).take(range(shape[axis]), axis=axis)
        return spread
    return array.reshape([-1 if place == axis else 1 for place in range(len(shape))])


def _eps(dtype: "np.dtype[np.generic]") -> float:
    return 2.0**-10 if dtype == np.float16 else 2.0**-23
