"""Quantized weights in an ONNX graph: the program's own numbers, in the place of floating-point values on their grids.

1. ``qdq``: integers, scales and zero points, and a DequantizeLinear (for each row, or in blocks) in front of what reads them.
   Of a table of 8-bit integers that is looked up, rows are taken first, and multiplied by their scales then: behind a
   DequantizeLinear the whole table would become floating-point for each token.
   Numbers of fp8 (FLOAT8E4M3FN) too.
2. ``matmulnbits``: onnxruntime's MatMulNBits in the place of each product that reads a matrix. What is no such product, or no
   integers, is qdq.
3. What neither can hold stays floating-point, on its grid. The record says of each weight what it became, and why.
4. A SLoRB branch with a fixed projection adds one number S to all weights of a block, and ``(q - z) s + S`` is
   ``(q - (z - S/s)) s``. So it goes into the zero points of MatMulNBits, which may be floating-point.

Tensor shapes: N rows, K columns, B blocks of a row.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sparsepass.export.pattern import folded_note
from sparsepass.export.targets.onnx.artifact import Array, Step, StoredWeight, apply_view
from sparsepass.export.targets.onnx.options import BLOCKS, Integers, least_opset
from sparsepass.graph.integers import integers_of
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.records import QuantizedState
from sparsepass.graph.rounding import RoundingGrid, from_rows
from sparsepass.graph.support import SparsepassError

_MICROSOFT: Final = "com.microsoft"
_ROW_BLOCK: Final = 128
"""Columns of a block where all of a row share a scale: MatMulNBits knows blocks only, so the scale is repeated."""
_NUM_NAMED: Final = 3


class _NoFormError(Exception):
    """Why a weight cannot be written in a form."""


@final
@dataclass(frozen=True, kw_only=True)
class _Laid:
    """A weight's numbers as an initializer holds them.

    Attributes:
        numbers: The integers, int16 (int8 or uint8 of a whole weight); of fp8 in ml_dtypes' type.
        scales: Like them, but with one entry for each group along the axis; a size of 1 is shared. float32.
        zeros: The integers that stand for 0, like the scales, int16; None where that is 0.
        axis: The one along which groups run.
        grid: Of the program's weight.
    """

    numbers: Array
    scales: Array
    zeros: Array | None
    axis: int
    grid: RoundingGrid


def write_integers(
    model: ir.Model, stored: Sequence[tuple[str, StoredWeight]], program: Program, request: Integers
) -> Iterator[tuple[str, StoredWeight]]:
    """Put integers in the place of the quantized weights of a graph.

    Args:
        model: Changed in place.
        stored: Weight of the program, and what the graph holds of it.
        program: Has the integers, and the branches that are folded; not changed.
        request: How they are to be written.

    Yields:
        The same, as the graph holds them then.

    Raises:
        SparsepassError: If a branch is to be folded into a weight that cannot be written as MatMulNBits.
    """
    writer = _IntegerWriter(model, program, request)
    for weight, one in stored:
        is_written = request.form != "dense" and weight in program.quantized and one.op
        yield weight, writer.write(weight, one) if is_written else one
    model.metadata_props.update(folded_note(writer.folded))


def told_of_integers(weights: Mapping[str, Iterable[StoredWeight]], quantized: Mapping[str, QuantizedState]) -> tuple[str, ...]:
    """What a reader should know of numbers that were written: how many in which form, and why others are not.

    Args:
        weights: Weight of the program -> what the file holds of it.
        quantized: The grid of each.
    """
    found = [(name, one) for name, stored in weights.items() for one in stored]
    forms = {"matmulnbits": "MatMulNBits", "qdq": "DequantizeLinear"}
    notes = []
    for kind, said in {"int": "integers", "fp8": "fp8"}.items():
        mine = [one.form for name, one in found if one.form in forms and quantized[name].format == kind]
        if mine:
            counts = ", ".join(f"{mine.count(form)} weights by {forms[form]}" for form in forms if form in mine)
            notes.append(f"{said}: {counts}")
    if any(one.form == "qdq" and quantized[name].format == "int" for name, one in found):
        notes.append(
            "behind a DequantizeLinear onnxruntime rounds activations to 8 bits, unless session.qdq_matmulnbits_accuracy_level "
            "is set to 0, as it was for verification"
        )
    for reason in dict.fromkeys(one.reason for _, one in found if one.reason):
        named = list(dict.fromkeys(name for name, one in found if one.reason == reason))
        more = f" and {len(named) - _NUM_NAMED} more" if len(named) > _NUM_NAMED else ""
        notes.append(f"{', '.join(named[:_NUM_NAMED])}{more}: {reason}")
    return tuple(notes)


@final
class _IntegerWriter:
    """Writes the integers of one graph.

    Attributes:
        folded: Weight with a folded branch -> the integers that stand for 0 without it: one, or packed ones.
    """

    def __init__(self, model: ir.Model, program: Program, request: Integers) -> None:
        self.model, self.graph, self.program, self.request = model, model.graph, program, request
        self.places = {node: place for place, node in enumerate(self.graph)}
        self.folded: dict[str, int | Array] = {}
        self.known: tuple[str, _Laid | None] = ("", None)

    def write(self, weight: str, stored: StoredWeight) -> StoredWeight:
        """Write one weight; returns what the graph holds of it then."""
        value = self.graph.initializers[stored.initializer]
        sparse, reason = self.program.sparse.get(weight), ""
        branch = sparse.branch if sparse is not None and self.request.fold_slorb else None
        try:
            if self.known[0] != weight:
                self.known = weight, _lay_out(self.program, weight)  # once for all experts of a weight
            assert self.known[1] is not None
            laid = _viewed(self.known[1], stored.view)
            _check_scales(laid, value)
            if self.request.form == "matmulnbits":
                try:
                    added = None if branch is None else masked_weight(self.program, branch.weight).float().numpy()
                    return self._multiply(value, laid, stored, added)
                except _NoFormError as error:
                    reason = f"no MatMulNBits, because {error}"
            if branch is None:
                return replace(self._dequantize(value, laid, stored), reason=reason)
        except _NoFormError as error:
            reason = "; ".join(filter(None, (reason, f"floating-point values on their grid, because {error}")))
        if branch is not None:
            raise SparsepassError(f"the SLoRB branch of {weight} cannot be folded: {reason}; leave fold_slorb out")
        return replace(stored, reason=reason)

    def _dequantize(self, value: ir.Value, laid: _Laid, stored: StoredWeight) -> StoredWeight:
        """A DequantizeLinear in front of everything that reads the weight."""
        scales, zeros, axis = laid.scales, laid.zeros, laid.axis
        scales = np.where(scales == 0, np.float32(1), scales)  # TensorRT takes no 0; a group of zeros is one by any scale
        varying = [place for place, size in enumerate(scales.shape) if size > 1]
        attributes: dict[str, int] = {}
        # One block that fills each row: TensorRT takes integers of 4 bits in blocks only.
        is_one_block = laid.grid.bits == 4 and laid.grid.group_size == laid.numbers.shape[axis] and scales.ndim == 2
        is_blocked = axis in varying or len(varying) > 1 or is_one_block
        if is_blocked:
            attributes = {"axis": axis, "block_size": laid.grid.group_size or laid.numbers.shape[axis]}
        elif varying:
            attributes = {"axis": varying[0]}
        if self.request.opset < least_opset(laid.grid, is_blocked=is_blocked):
            numbers = "fp8" if laid.grid.format == "fp8" else f"integers of {laid.grid.bits} bits"
            raise _NoFormError(f"opset {self.request.opset} has no {numbers} with such scales")
        if not is_blocked:
            shape = (-1,) if varying else ()
            scales, zeros = scales.reshape(shape), None if zeros is None else zeros.reshape(shape)
        kind = ir.DataType[laid.grid.kind.upper()] if laid.grid.format == "int" else ir.DataType.FLOAT8E4M3FN
        name = stored.initializer
        inputs = self._in_place(value, laid.numbers.astype(kind.numpy()), kind, scales, zeros)
        has_rows = laid.grid.bits == 8 and zeros is None and attributes == {"axis": 0} and axis == 1
        for use in list(value.uses()):
            if has_rows and _is_look_up(use.node, use.idx):
                self._look_up(use.node, *inputs)
        if not value.uses():
            return replace(stored, form="qdq")
        node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}_dequantize")
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{name}_dequantized", value.shape, value.type
        readers = sorted(((self.places.get(use.node, -1), use.node) for use in value.uses()), key=lambda each: each[0])
        first = readers[0][1] if readers[0][0] >= 0 else self.graph[0]  # others are in a graph inside a node
        ir.convenience.replace_all_uses_with(value, result)
        self.graph.insert_before(first, [node])
        return replace(stored, form="qdq")

    def _look_up(self, gather: ir.Node, numbers: ir.Value, scales: ir.Value) -> None:
        """Rows of integers and their scales, multiplied, in the place of rows of a table."""
        ids, old = gather.inputs[1], gather.outputs[0]
        assert scales.dtype is not None
        axis = self._constant("look_up_axis", np.array([-1], np.int64))
        rows, steps = (ir.node("Gather", [each, ids], {"axis": 0}, name=f"{each.name}_rows") for each in (numbers, scales))
        column = ir.node("Unsqueeze", [steps.outputs[0], axis], name=f"{scales.name}_column")
        cast = ir.node("Cast", [rows.outputs[0]], {"to": scales.dtype}, name=f"{numbers.name}_cast")
        product = ir.node("Mul", [cast.outputs[0], column.outputs[0]], name=gather.name)
        nodes = [rows, steps, column, cast, product]
        for node in nodes[:-1]:
            node.outputs[0].name = f"{old.name}_{node.name}"
        self._put(gather, nodes)

    def _constant(self, name: str, array: Array) -> ir.Value:
        """An initializer; the one of that name if there is one."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            self.graph.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.graph.initializers[name]

    def _put(self, old: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Put nodes in the place of another; the last one's output is its output."""
        before, after = old.outputs[0], nodes[-1].outputs[0]
        after.shape, after.type, name = before.shape, before.type, before.name
        graph = old.graph
        assert graph is not None
        graph.insert_before(old, nodes)
        self.places |= dict.fromkeys(nodes, self.places.get(old, -1))
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        graph.remove(old, safe=True)
        after.name = name

    def _multiply(self, value: ir.Value, laid: _Laid, stored: StoredWeight, added: Array | None) -> StoredWeight:
        """A MatMulNBits in the place of every product that reads the weight."""
        numbers, scales, zeros = laid.numbers, laid.scales, laid.zeros
        if laid.grid.format != "int":
            raise _NoFormError(f"it takes integers, and these are {laid.grid.kind}")
        if numbers.ndim != 2:
            raise _NoFormError(f"its weight has {numbers.ndim} axes")
        uses = [(usage.node, _is_product(usage.node, usage.idx, laid.axis)) for usage in value.uses()]
        if others := sorted({node.op_type for node, is_product in uses if not is_product}):
            raise _NoFormError(f"{', '.join(others)} reads it, and MatMulNBits is a MatMul by a matrix of constants")
        block = laid.grid.group_size or _ROW_BLOCK
        if block not in BLOCKS:
            raise _NoFormError(f"it takes blocks of {', '.join(map(str, BLOCKS))}, not of {block}")
        view = stored.view
        if laid.axis == 0:
            numbers, scales, zeros = numbers.T, scales.T, None if zeros is None else zeros.T
            view = (*view, ("transpose", (1, 0)))
        num_out, num_in = numbers.shape
        num_blocks = -(-num_in // block)
        scales = np.broadcast_to(scales, (num_out, num_blocks)) if scales.shape[1] == 1 else scales
        zeros = np.broadcast_to(zeros, scales.shape) if zeros is not None and zeros.shape[1] == 1 else zeros
        half = 1 << laid.grid.bits - 1
        codes = numbers + (half if zeros is None else 0)
        filled = np.zeros((num_out, num_blocks * block), np.uint8)
        filled[:, :num_in] = codes
        packed_zeros: Array | None = None if zeros is None else _pack(zeros.astype(np.uint8), laid.grid.bits)
        given = packed_zeros
        if added is not None:
            scales, given = _folded(scales, half if zeros is None else zeros, added, value)
            self.folded[stored.initializer] = half if packed_zeros is None else packed_zeros
        packed = _pack(filled, laid.grid.bits).reshape(num_out, num_blocks, -1)
        inputs = self._in_place(value, packed, ir.DataType.UINT8, scales, given)
        attributes = {"K": num_in, "N": num_out, "bits": laid.grid.bits, "block_size": block}
        for product, _ in uses:
            self._replace_product(product, inputs, attributes)
        self.graph.opset_imports.setdefault(_MICROSOFT, 1)
        shape = (num_out, num_blocks, packed.shape[2])
        return replace(stored, form="matmulnbits", op="MatMulNBits", axis=1, shape=shape, view=view)

    def _replace_product(self, product: ir.Node, inputs: Sequence[ir.Value], attributes: Mapping[str, int]) -> None:
        bias = product.inputs[2] if len(product.inputs) > 2 else None
        node = ir.node("MatMulNBits", [product.inputs[0], *inputs], attributes, domain=_MICROSOFT, name=product.name)
        nodes, old = [node], product.outputs[0]
        if bias is not None:
            node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = f"{old.name}_product", old.shape, old.type
            nodes.append(ir.node("Add", [node.outputs[0], bias], name=f"{product.name}_bias"))
        self._put(product, nodes)

    def _in_place(
        self, value: ir.Value, numbers: Array, kind: ir.DataType, scales: Array, zeros: Array | None
    ) -> list[ir.Value]:
        """Initializers instead of a weight's: its integers under its name, scales and zero points beside them."""
        name, dtype = value.name, value.dtype
        assert name is not None
        assert dtype is not None
        self.graph.initializers.pop(name)
        made = [(name, numbers, kind), (f"{name}_scale", scales.astype(dtype.numpy()), dtype)]
        if zeros is not None:
            of = kind if np.issubdtype(zeros.dtype, np.integer) else dtype
            made.append((f"{name}_zero_point", zeros.astype(of.numpy()), of))
        found = []
        for label, array, element in made:
            tensor = ir.Tensor(np.asarray(array, order="C"), dtype=element, name=label)
            new = ir.Value(name=label, shape=ir.Shape(array.shape), type=ir.TensorType(element), const_value=tensor)
            assert label not in self.graph.initializers, label
            self.graph.initializers[label] = new
            found.append(new)
        return found


def _lay_out(program: Program, weight: str) -> _Laid:
    """A weight's integers, laid out as the program has it."""
    found, state, like = integers_of(program, weight), program.quantized[weight], program.tensor(weight)
    assert found is not None
    parts = [each for each in (found.scales_OG, found.zeros_OG) if each is not None]
    scales, *zeros = (_grouped(each, state.axis, like, state.group_size).float().numpy() for each in parts)
    numbers = from_rows(found.numbers_OI, state.axis, like)
    return _Laid(
        numbers=numbers.numpy() if state.format == "int" else numbers.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn),
        scales=scales,
        zeros=zeros[0].astype(np.int16) if zeros else None,
        axis=state.axis,
        grid=state.grid,
    )


def _viewed(whole: _Laid, view: tuple[Step, ...]) -> _Laid:
    """The part of a weight that an initializer holds, as it holds it."""
    numbers = apply_view(whole.numbers, view)
    return replace(
        whole,
        numbers=numbers.astype(np.int16) if whole.grid.format == "int" else numbers,
        scales=apply_view(whole.scales, view),
        zeros=None if whole.zeros is None else apply_view(whole.zeros, view),
        axis=_axis_behind(whole.axis, view),
    )


def _grouped(per_group: Tensor, axis: int, like: Tensor, group_size: int) -> Tensor:
    """What a weight has for each group of a row, with the weight's axes: groups where the axis of sums is."""
    if per_group.dim() == like.dim():
        return per_group.movedim(-1, axis)
    positions, is_whole = like.movedim(axis, -1).shape[1:-1], per_group.shape[-1] == 1
    if not is_whole and math.prod(positions) > 1 and like.shape[axis] % group_size:
        raise _NoFormError("its groups span several positions of the kernel")
    spread = (*(1 for _ in positions), 1) if is_whole else (*positions, -1)
    return per_group.reshape(per_group.shape[0], *spread).movedim(-1, axis)


def _axis_behind(axis: int, view: tuple[Step, ...]) -> int:
    """Where an axis of a weight is in the initializer."""
    for kind, numbers in view:
        if kind == "transpose":
            axis = numbers.index(axis)
        elif kind == "split" and numbers[0] == axis:
            raise _NoFormError("it is cut along the axis of its groups")
        elif kind == "squeeze":
            axis -= sum(number < axis for number in numbers)
        elif kind == "unsqueeze":
            for number in sorted(numbers):
                axis += number <= axis
    return axis


def _check_scales(laid: _Laid, value: ir.Value) -> None:
    assert value.dtype is not None
    if not np.array_equal(laid.scales.astype(value.dtype.numpy()).astype(np.float32), laid.scales):
        raise _NoFormError(f"a scale of bfloat16 does not fit {value.dtype.name.lower()}")


def _is_look_up(node: ir.Node, index: int) -> bool:
    return node.op_type == "Gather" and index == 0 and not node.attributes.get_int("axis", 0)


def _is_product(node: ir.Node, index: int, axis: int) -> bool:
    """Whether a node does nothing but multiply by a matrix that it sums over along an axis, and add a bias."""
    if index != 1 or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "MatMul":
        return axis == 0
    given = node.attributes
    flipped = given.get_int("transB", 0)
    if node.op_type != "Gemm" or flipped != axis or given.get_int("transA", 0) != 0:
        return False
    return given.get_float("alpha", 1.0) == given.get_float("beta", 1.0) == 1.0


def _pack(numbers: Array, bits: int) -> Array:
    """Integers of 8 or 4 bits in bytes, along the last axis: of two in a byte the first is in the low half."""
    if bits == 8:
        return numbers
    even = np.pad(numbers, [*[(0, 0)] * (numbers.ndim - 1), (0, numbers.shape[-1] % 2)])
    packed: Array = even[..., ::2] | even[..., 1::2] << 4
    return packed


def _folded(scales_NB: Array, zeros: int | Array, added: Array, value: ir.Value) -> tuple[Array, Array]:
    """Scales, and zero points that hold a branch, float32: ``z - S/s``.

    A group of zeros has a scale of 0. It gets the size of S, and zero points one step away.
    """
    sums_NB = added.repeat(scales_NB.shape[1] // added.shape[1], axis=1)
    scales_NB = np.where(scales_NB == 0, np.abs(sums_NB), scales_NB)
    steps_NB = np.divide(sums_NB, scales_NB, out=np.zeros_like(scales_NB), where=scales_NB != 0)
    found = zeros - steps_NB
    assert value.dtype is not None
    with np.errstate(over="ignore"):
        if not np.isfinite(found.astype(value.dtype.numpy())).all():
            raise _NoFormError(f"a zero point with its branch does not fit {value.dtype.name.lower()}")
    return scales_NB, found
