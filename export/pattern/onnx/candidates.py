"""Finding the constant weights of an ONNX graph, and the axis of each along which the reduction K runs.

Every operation of the graph, of its subgraphs and of its local functions is looked at:

1. A product (`PRODUCTS`) with a constant operand is a use of a weight: `Follower` leads back to what is stored for it.
   A product of constants only is a constant: the operation that takes it is the one to look at.
2. Packed weights (MatMulNBits, MatMulBnb4 of onnxruntime) are [out, in], so K is axis 1. They are unpacked when they are read.
3. Operations that hold weights in a layout of their own, operations of an unknown domain with a constant matrix among
   their inputs, and whatever cannot be followed are listed as not checkable, with the reason.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from sparsepass.export.pattern.bits import Array, BitView, unpack_bits, view_bits
from sparsepass.export.pattern.candidates import Candidate
from sparsepass.export.pattern.onnx.data import READABLE_TYPES, SIGNED_TYPES, OnnxData, Problem, from_proto
from sparsepass.export.pattern.onnx.folded import FOLDED_SAID, folded_zeros
from sparsepass.export.pattern.onnx.follow import Constant, Follower, input_of, int_of, settle
from sparsepass.export.pattern.onnx.ops import DOMAINS, OPAQUE, PRODUCTS, WITHOUT_RULE, Operand, is_known

# Types that weights of an unknown operation can have; indices and masks have others.
_WEIGHT_TYPES = SIGNED_TYPES | {f"{u}INT{bits}" for u in ("", "U") for bits in (2, 4, 8)}
_FLOAT_PRODUCTS = {op for op, operands in PRODUCTS.items() if all(o.zero_point is None for o in operands)} | {"Einsum"}
_PACKED = ("MatMulNBits", "MatMulBnb4")
_NF4 = 1


def onnx_candidates(model: ir.Model | onnx.ModelProto, *, file: str = "") -> Iterator[Candidate]:
    """Find every constant weight of the products of a model, subgraphs included.

    Args:
        model: The model; it is not changed.
        file: Name to file the candidates under.

    Yields:
        One candidate per operation and constant operand, in graph order.

    Raises:
        SparsepassError: The model cannot be understood.
    """
    if isinstance(model, onnx.ModelProto):
        model = from_proto(model, file or "the given ModelProto", None)
    elif model.functions:
        model = model.clone()
        ir_passes.InlinePass()(model)
    finder = _Finder(model, file)
    for number, node in enumerate(finder.follower.nodes):
        yield from finder.uses(node, number)


class _Finder:
    """Finds the uses of weights in one graph."""

    def __init__(self, model: ir.Model, file: str) -> None:
        self.file = file
        self.data = OnnxData(file)
        self.metadata = model.metadata_props
        self.follower = Follower(model, self.data)

    def uses(self, node: ir.Node, number: int) -> Iterator[Candidate]:
        name = node.name or (node.outputs[0].name if node.outputs else None) or f"{node.op_type}_{number}"
        opaque = OPAQUE.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
        if opaque is not None:
            indices, reason = opaque
            for index in indices:
                if self._is_constant(node, index):
                    yield self._uncheckable(node, name, index, f"{node.op_type} {reason}")
        elif not is_known(node.domain, node.op_type):
            yield from self._unknown(node, name)
        elif node.domain not in DOMAINS:
            return
        elif node.op_type in _PACKED:
            yield from self._checked(node, name, 1, partial(self._packed, node, name))
        elif node.op_type == "Einsum":
            yield from self._einsum(node, name)
        elif node.op_type in WITHOUT_RULE:
            index, reason = WITHOUT_RULE[node.op_type]
            if self._is_constant(node, index):
                yield self._uncheckable(node, name, index, reason, aside=reason)
        elif node.op_type in PRODUCTS:
            operands = PRODUCTS[node.op_type]
            taken = {0, *(operand.index for operand in operands)}
            if not all(self._is_constant(node, index) for index in taken):
                for operand in operands:
                    yield from self._checked(node, name, operand.index, partial(self._operand, node, name, operand))

    def _checked(self, node: ir.Node, name: str, index: int, find: Callable[[], Candidate | None]) -> Iterator[Candidate]:
        """What is found for an operand; if a `Problem` comes up, that it cannot be checked."""
        try:
            found = find()
        except Problem as problem:
            found = self._uncheckable(node, name, index, str(problem))
        if found is not None:
            yield found

    def _is_constant(self, node: ir.Node, index: int) -> bool:
        return self.follower.is_constant(input_of(node, index))

    def _operand(self, node: ir.Node, name: str, operand: Operand) -> Candidate | None:
        constant = self.follower.follow(input_of(node, operand.index), gather=operand.side == "right")
        if constant is None:
            return None
        rank = len(constant.axes)
        flipped = bool(operand.transpose and int_of(node, operand.transpose, 0))
        if operand.side == "conv":
            axis = 1
        elif operand.side == "left":
            axis = rank - (2 if flipped else 1)
        else:
            axis = rank - (1 if flipped else 2)
        axis = max(axis, 0)
        if operand.zero_point is not None:
            column_axis = 0 if operand.side == "conv" or flipped else rank - 1
            zero = self.follower.zero_point(input_of(node, operand.zero_point), constant, column_axis, 0)
            constant = settle(constant, zero)
        elif constant.quantized_by is not None:
            raise Problem(f"{node.op_type} takes quantized values without a zero point")
        if (operand.side == "conv" and rank < 3) or rank == 0:
            raise Problem(f"a weight of rank {rank} has no such axis")
        if any(int_of(node, flag, 0) for flag in ("transBatchA", "transBatchB")):
            raise Problem("FusedMatMul with transBatch is not supported")
        return self._found(node, name, constant, axis, operand.index)

    def _found(self, node: ir.Node, name: str, constant: Constant, axis: int, index: int) -> Candidate:
        tensor, stored = constant.tensor, constant.axes[axis]
        shape = tuple(tensor.shape.numpy())
        problem = None
        if tensor.dtype.name not in READABLE_TYPES:
            problem = f"{tensor.dtype.name.lower()} is not a weight type this check knows"
        elif stored is None:
            problem = "K runs along an axis that is not stored"
        zero = constant.zero_point
        return Candidate(
            file=self.file,
            node=name,
            op=node.op_type,
            weight=constant.name,
            aliases=constant.aliases,
            parameter=_parameter(node),
            shape=shape,
            dtype=tensor.dtype.name.lower(),
            axis=stored,
            key=(_storage(tensor), None if zero is None else (zero.shape, zero.tobytes())),
            read=None if problem else lambda: self.data.bits(tensor, zero, constant.name),
            problem=problem,
            # Rotary frequencies, depthwise convolution.
            aside="K = 1: nothing is reduced" if stored is None or shape[stored] == 1 else None,
            computed=constant.computed,
            multiplied=None if problem else self._multiplied(node, constant, axis, index),
        )

    def _multiplied(
        self, node: ir.Node, constant: Constant, axis: int, index: int
    ) -> Callable[[], tuple[BitView, int] | None] | None:
        """A reader of the values that the product multiplies, if a cast or quantization lies between; see `Candidate`."""
        value = node.inputs[index]
        rounds = any(op in ("Cast", "CastLike", "QuantizeLinear") for op in constant.through)
        if value is None or not rounds or not self.follower.is_constant(value):
            return None

        def read() -> tuple[BitView, int] | None:
            try:
                found = self.follower.values.compute(value)
            except Problem:
                return None
            name = ir.DataType.from_numpy(found.dtype).name
            if name not in READABLE_TYPES or constant.quantized_by is not None or node.op_type not in _FLOAT_PRODUCTS:
                return None
            return view_bits(found, has_sign=name in SIGNED_TYPES), axis

        return read

    def _packed(self, node: ir.Node, name: str) -> Candidate:
        packed = _read_packed(node, self.follower, self.metadata)
        return Candidate(
            file=self.file,
            node=name,
            op=node.op_type,
            weight=packed.constant.name,
            aliases=packed.constant.aliases,
            parameter=_parameter(node),
            shape=packed.shape,
            dtype=packed.dtype,
            axis=1,
            key=(_storage(packed.constant.tensor), packed.dtype, packed.zero.tobytes()),
            read=lambda: packed.read(self.follower),
            remark=FOLDED_SAID if packed.is_folded else "",
        )

    def _unknown(self, node: ir.Node, name: str) -> Iterator[Candidate]:
        """An operation nobody here knows: each constant matrix among its inputs may be a weight."""
        if all(self.follower.is_constant(value) for value in node.inputs if value is not None):
            return
        for index, value in enumerate(node.inputs):
            if not self.follower.is_constant(value):
                continue
            what = f"{node.domain or 'ai.onnx'}::{node.op_type}"
            reason = (
                f"what {what} does with this constant is not known; check the model from before it was put in, or name it "
                "with --ignore if it is no matmul weight"
            )
            try:
                constant = self.follower.follow(value)
            except Problem as problem:
                yield self._uncheckable(node, name, index, f"{problem}; {reason}")
                continue
            if constant is None or constant.tensor.dtype.name not in _WEIGHT_TYPES:
                continue
            if sum(size > 1 for size in constant.tensor.shape.numpy()) > 1:
                yield self._uncheckable(node, name, index, reason)

    def _uncheckable(self, node: ir.Node, name: str, index: int, reason: str, *, aside: str | None = None) -> Candidate:
        names = tuple(self.follower.names(node.inputs[index]))
        return Candidate(
            file=self.file,
            node=name,
            op=node.op_type,
            weight=names[-1] if names else "?",
            aliases=names[:-1],
            parameter=_parameter(node),
            problem=reason,
            aside=aside,
        )

    def _einsum(self, node: ir.Node, name: str) -> Iterator[Candidate]:
        """Einsum: K is the one label that a constant operand shares with the others and that the output lacks."""
        constant = [self.follower.is_constant(node.inputs[i]) for i in range(len(node.inputs))]
        if all(constant):
            return
        equation = node.attributes["equation"].as_string().replace(" ", "")
        terms, _, output = equation.partition("->")
        labels = terms.split(",")

        def find(index: int, term: str) -> Candidate | None:
            if len(labels) != len(node.inputs):
                raise Problem(f"Einsum {equation!r} has {len(labels)} operands, and the node {len(node.inputs)}")
            found = self.follower.follow(node.inputs[index])
            if found is None:
                return None
            others = "".join(labels[:index] + labels[index + 1 :])
            summed = [label for label in term if label not in output and label in others]
            if "->" not in equation or "." in term or len(summed) != 1 or len(set(term)) != len(term):
                raise Problem(f"Einsum {equation!r} does not reduce over exactly one axis of this operand")
            return self._found(node, name, found, term.index(summed[0]), index)

        for index, term in enumerate(labels[: len(node.inputs)]):
            yield from self._checked(node, name, index, partial(find, index, term))


def _parameter(node: ir.Node) -> str:
    """The parameter that a node multiplies by, as torch.onnx notes it: folding gives weights names such as val_17.

    Of `%linear : ...(args = (%mul_4, %p_model_layers_0_q_proj_weight), ...)` in scope `model.layers.0.q_proj` the
    parameter is what follows the scope.
    """
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    taken = re.findall(r"%p_(\w+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
    for scope in reversed(scopes):
        prefix = scope.replace(".", "_").lower() + "_"
        found = [name.removeprefix(prefix) for name in taken if scope and name.startswith(prefix)]
        if found:
            return f"{scope}.{next((name for name in found if 'weight' in name), found[0])}"
    return ""


def _storage(tensor: ir.TensorProtocol) -> object:
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)


@dataclass(frozen=True, kw_only=True)
class _PackedBits:
    """A packed weight, found and not yet read.

    Attributes:
        constant: The stored tensor.
        shape: Shape of the unpacked weight, [out, in].
        dtype: Its type, in lower case.
        zero: The integers that mean zero: one, or [out, in].
        mask: Bits of a packed integer that count.
        is_high_first: Of two values in a byte, the first is in the high half.
        num_bits: Bits of a packed integer.
        is_folded: Whether its zero points hold a SLoRB branch, and `zero` is from the file's metadata.
    """

    constant: Constant
    shape: tuple[int, int]
    dtype: str
    zero: Array
    mask: int
    is_high_first: bool
    num_bits: int
    is_folded: bool = False

    def read(self, follower: Follower) -> BitView:
        """Unpack it. The bits are 1 where a value is not zero, else 0."""
        num_out, num_in = self.shape
        packed = follower.data.read(self.constant.tensor, self.constant.name)
        if self.is_high_first:
            values = unpack_bits((packed << 4) | (packed >> 4), self.num_bits).reshape(-1)[: num_out * num_in]
            values = values.reshape(num_out, num_in)
        else:
            values = unpack_bits(packed.reshape(num_out, -1), self.num_bits)[:, :num_in]
        return view_bits((values & np.uint8(self.mask)) != self.zero, has_sign=False)


def _read_packed(node: ir.Node, follower: Follower, metadata: Mapping[str, str]) -> _PackedBits:
    """Find the weight of a MatMulNBits or MatMulBnb4.

    MatMulNBits: B is [out, blocks, bytes], lowest bits first; zero is the block's zero point, or half the range. Zero points
    that hold a SLoRB branch are no integers; the file's metadata says what zero is without it.
    MatMulBnb4: B is flat, high half first; zero is code 7 of NF4, and codes 0 and 8 of FP4.

    Raises:
        Problem: It cannot be checked.
    """
    found = follower.follow(input_of(node, 1))
    if found is None:
        raise Problem("its packed weight is not a constant")
    if any(op != "Identity" for op in found.through) or found.computed:
        raise Problem("its packed weight is not stored as it is used")
    num_out, num_in = int_of(node, "N", 0), int_of(node, "K", 0)
    bits = 4 if node.op_type == "MatMulBnb4" else int_of(node, "bits", 4)
    num_bytes = math.prod(found.tensor.shape.numpy())
    is_cut = min(num_out, num_in) < 1 or num_out * num_in * bits > 8 * num_bytes
    if is_cut or (node.op_type == "MatMulNBits" and num_bytes % num_out):
        raise Problem(f"its packed weight has {num_bytes} bytes, and is to be [{num_out}, {num_in}] of {bits} bits")
    if found.tensor.dtype.name != "UINT8":
        raise Problem(f"its packed weight is stored as {found.tensor.dtype.name}")
    if node.op_type == "MatMulBnb4":
        if not int_of(node, "transB", 1):
            raise Problem("a weight that is not transposed is not supported")
        is_nf4 = int_of(node, "quant_type", _NF4) == _NF4
        return _PackedBits(
            constant=found,
            shape=(num_out, num_in),
            dtype="nf4" if is_nf4 else "fp4",
            zero=np.array(7 if is_nf4 else 0, np.uint8),
            mask=15 if is_nf4 else 7,
            is_high_first=True,
            num_bits=4,
        )
    if input_of(node, 4) is not None:
        raise Problem("its weight is reordered by g_idx")
    block = int_of(node, "block_size", 0)
    if bits not in (2, 4, 8) or block < 1:
        raise Problem(f"{bits}-bit packing in blocks of {block} is not supported")
    if int_of(node, "weight_prepacked", 0):
        raise Problem("its weight is prepacked for one processor")
    zero: Array = np.array(1 << (bits - 1), np.uint8)
    points, num_blocks = input_of(node, 3), -(-num_in // block)
    stored = follower.follow(points) if points is not None else None
    folded = None
    if stored is not None and stored.tensor.dtype.is_floating_point():
        folded = folded_zeros(metadata, found.name, num_out, num_blocks, bits)
    if folded is not None:
        zero = folded if not folded.ndim else folded.repeat(block, axis=1)[:, :num_in]
    elif points is not None:
        if stored is None or stored.tensor.dtype.name != "UINT8":
            raise Problem("its zero points are not stored as packed integers")
        packed = follower.data.read(stored.tensor, stored.name)
        if packed.size != num_out * -(-num_blocks * bits // 8):
            raise Problem(f"its zero points have {packed.size} bytes, for {num_out} rows of {num_blocks} blocks")
        packed = packed.reshape(num_out, -1)
        zero = unpack_bits(packed, bits)[:, :num_blocks].repeat(block, axis=1)[:, :num_in]
    return _PackedBits(
        constant=found,
        shape=(num_out, num_in),
        dtype=f"uint{bits}",
        zero=zero,
        mask=(1 << bits) - 1,
        is_high_first=False,
        num_bits=bits,
        is_folded=folded is not None,
    )
