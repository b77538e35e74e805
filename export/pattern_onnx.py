"""Finding the constant weights of an ONNX graph, and the axis of each along which the reduction K runs.

How an operand is followed back to the tensor that is stored for it:

1. Identity, Cast and CastLike keep values (a cast keeps zeros) and axes; Transpose permutes the axes, Squeeze and
   Unsqueeze drop and add some.
2. QuantizeLinear and DequantizeLinear (per tensor, per axis, blocked) keep axes; zero is where the stored integer
   equals the zero point.
3. A Gather along the first axis of a tensor of rank 3 or more (experts picked at run time) keeps the other axes. A
   Gather from a matrix is an embedding look-up: not a weight of the product it feeds.
4. Anything else between a constant and a product (Reshape, Mul, Concat, ...) is not followed: the use is listed as not
   checkable with that reason. Only an operand that depends on the graph's inputs is no weight at all.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from sparsepass.export.pattern_bits import BitView, unpack_bits, view_bits
from sparsepass.export.pattern_candidates import Candidate
from sparsepass.export.pattern_onnx_data import READABLE_TYPES, OnnxData, from_proto

__all__ = ["onnx_candidates"]

Array = npt.NDArray[Any]
Side = Literal["left", "right", "conv"]


@dataclass(frozen=True)
class _Operand:
    """Where an operation takes a weight: input index, its role, and the inputs of zero point, transpose flag."""

    index: int
    side: Side
    zero_point: int | None = None
    transpose: str | None = None


_MATMUL = (_Operand(0, "left"), _Operand(1, "right"))
_GEMM = (_Operand(0, "left", transpose="transA"), _Operand(1, "right", transpose="transB"))
_CONV = (_Operand(1, "conv"),)
_OPERANDS: dict[str, tuple[_Operand, ...]] = {
    "MatMul": _MATMUL,
    "Gemm": _GEMM,
    "Conv": _CONV,
    "MatMulInteger": (_Operand(0, "left", 2), _Operand(1, "right", 3)),
    "QLinearMatMul": (_Operand(0, "left", 2), _Operand(3, "right", 5)),
    "ConvInteger": (_Operand(1, "conv", 3),),
    "QLinearConv": (_Operand(3, "conv", 5),),
    # What onnxruntime's optimizer writes (domain com.microsoft).
    "FusedMatMul": _GEMM,
    "FusedGemm": _GEMM,
    "FusedConv": _CONV,
    "DynamicQuantizeMatMul": (_Operand(1, "right", 3),),
    "MatMulIntegerToFloat": (_Operand(0, "left", 4), _Operand(1, "right", 5)),
    "QGemm": (_Operand(0, "left", 2, "transA"), _Operand(3, "right", 5, "transB")),
}
# Operations whose weights no N:M rule covers: (input that holds the weight, why). They are listed, and decide nothing.
_WITHOUT_RULE: dict[str, tuple[int, str]] = {
    "ConvTranspose": (1, "no runtime has an N:M rule for ConvTranspose weights [in, out/group, ...]"),
    "DeformConv": (1, "no runtime has an N:M rule for DeformConv"),
    "LSTM": (1, "recurrent weights are not run by sparse kernels"),
    "GRU": (1, "recurrent weights are not run by sparse kernels"),
    "RNN": (1, "recurrent weights are not run by sparse kernels"),
}
# Fused operations whose weights are real matmul weights in a layout of their own.
_OPAQUE: dict[str, int] = {"Attention": 1, "QAttention": 1, "MoE": 2, "QMoE": 2, "MatMulBnb4": 1, "MatMulFpQ4": 1}
_KEEPING = {"Identity", "Cast", "CastLike"}
_QUANTIZE = {"QuantizeLinear", "TRT_FP8QuantizeLinear"}
_DEQUANTIZE = {"DequantizeLinear", "TRT_FP8DequantizeLinear"}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_DOMAINS = {"", "ai.onnx", "com.microsoft", "trt"}


class _Problem(Exception):  # noqa: N818 - control flow within this file, never seen outside
    """Why a use cannot be checked."""


@dataclass(frozen=True, kw_only=True)
class _Constant:
    """A stored tensor as an operation sees it.

    Attributes:
        tensor: The tensor.
        name: Its name.
        axes: For each axis of the operand the stored axis it is; None for one that is not stored.
        through: Operation types passed on the way.
        aliases: Value names met on the way.
        zero_point: The stored integers that mean zero, broadcast to the stored shape; None for plain zero.
        quantized_by: Zero point of a QuantizeLinear still waiting for its DequantizeLinear, as text.
    """

    tensor: ir.TensorProtocol
    name: str
    axes: tuple[int | None, ...]
    through: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    zero_point: Array | None = None
    quantized_by: bytes | None = None


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
    for number, node in enumerate(finder.nodes):
        yield from finder.uses(node, number)


class _Finder:
    """Follows operands of one graph back to what is stored."""

    def __init__(self, model: ir.Model, file: str) -> None:
        self.file = file
        self.nodes = tuple(ir.traversal.RecursiveGraphIterator(model.graph))
        self.data = OnnxData(file)
        self.constants: set[ir.Value] = set()
        for node in self.nodes:
            inputs = [value for value in node.inputs if value is not None]
            known = all(v in self.constants or _tensor(v) is not None or _lost(v) for v in inputs)
            has_graph = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
            if known and not has_graph and (inputs or node.op_type == "Constant") and node.op_type not in _RANDOM:
                self.constants.update(node.outputs)

    def uses(self, node: ir.Node, number: int) -> Iterator[Candidate]:
        if node.domain not in _DOMAINS:
            return
        name = node.name or (node.outputs[0].name if node.outputs else None) or f"{node.op_type}_{number}"
        if node.op_type == "MatMulNBits":
            yield self._nbits(node, name)
        elif node.op_type == "Einsum":
            yield from self._einsum(node, name)
        elif node.op_type in _WITHOUT_RULE:
            index, reason = _WITHOUT_RULE[node.op_type]
            if self._constant(node, index):
                yield self._uncheckable(node, name, index, reason, aside=reason)
        elif node.op_type in _OPAQUE and node.domain == "com.microsoft":
            index = _OPAQUE[node.op_type]
            if self._constant(node, index):
                yield self._uncheckable(node, name, index, f"{node.op_type} holds its weights in a layout of its own")
        elif node.op_type in _OPERANDS:
            operands = _OPERANDS[node.op_type]
            # A product of constants is a constant: the operation that takes it is the one to look at.
            if not all(self._constant(node, operand.index) for operand in operands if operand.side != "conv") or any(
                operand.side == "conv" for operand in operands
            ):
                for operand in operands:
                    yield from self._operand(node, name, operand)

    def _operand(self, node: ir.Node, name: str, operand: _Operand) -> Iterator[Candidate]:
        try:
            constant = self._follow(node.inputs[operand.index], gather=operand.side == "right")
        except _Problem as problem:
            yield self._uncheckable(node, name, operand.index, str(problem))
            return
        if constant is None:
            return
        rank = len(constant.axes)
        flipped = bool(operand.transpose and _int(node, operand.transpose, 0))
        if operand.side == "conv":
            axis = 1
        elif operand.side == "left":
            axis = rank - (2 if flipped else 1)
        else:
            axis = rank - (1 if flipped else 2)
        axis = max(axis, 0)
        try:
            if operand.zero_point is not None:
                column_axis = 0 if operand.side == "conv" else (0 if flipped else rank - 1)
                zero = self._zero_point(_input(node, operand.zero_point), constant, column_axis, 0)
                constant = _settle(constant, zero)
            elif constant.quantized_by is not None:
                raise _Problem(f"{node.op_type} takes quantized values without a zero point")
        except _Problem as problem:
            yield self._uncheckable(node, name, operand.index, str(problem))
            return
        if (operand.side == "conv" and rank < 3) or rank == 0:
            yield self._uncheckable(node, name, operand.index, f"a weight of rank {rank} has no such axis")
            return
        if any(_int(node, flag, 0) for flag in ("transBatchA", "transBatchB")):
            yield self._uncheckable(node, name, operand.index, "FusedMatMul with transBatch is not supported")
            return
        yield self._found(node, name, constant, axis)

    def _found(self, node: ir.Node, name: str, constant: _Constant, axis: int) -> Candidate:
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
            through=constant.through,
        )

    def _uncheckable(self, node: ir.Node, name: str, index: int, reason: str, *, aside: str | None = None) -> Candidate:
        names = tuple(self._names(node.inputs[index]))
        return Candidate(
            file=self.file,
            node=name,
            op=node.op_type,
            weight=names[-1] if names else "?",
            aliases=names[:-1],
            parameter=_parameter(node),
            shape=(),
            dtype="",
            axis=None,
            key=None,
            read=None,
            problem=reason,
            aside=aside,
        )

    def _names(self, value: ir.Value | None) -> Iterator[str]:
        """Names from an operand back along first constant inputs: the last one is what is stored."""
        while value is not None:
            yield value.name or "?"
            node = value.producer()
            if _tensor(value) is not None or node is None:
                return
            value = next((v for v in node.inputs if v is not None and (v in self.constants or _tensor(v))), None)

    def _constant(self, node: ir.Node, index: int) -> bool:
        value = _input(node, index)
        return value is not None and (value in self.constants or _tensor(value) is not None or _lost(value))

    def _follow(self, value: ir.Value | None, *, gather: bool = False) -> _Constant | None:
        """Follow an operand back to its stored tensor; None when it depends on the graph's inputs."""
        chain: list[ir.Node] = []
        names: list[str] = []
        while value is not None:
            tensor = _tensor(value)
            if tensor is not None:
                return self._replay(tensor, value.name or tensor.name or "?", chain, names)
            names.append(value.name or "?")
            node = value.producer()
            if node is None:
                if _lost(value):
                    raise _Problem(f"no dense tensor is stored for {value.name!r} (a sparse initializer?)")
                return None
            ours = node.domain in _DOMAINS
            if (
                (ours and (node.op_type in _KEEPING | _QUANTIZE | _DEQUANTIZE or node.op_type in ("Transpose",)))
                or (ours and node.op_type in ("Squeeze", "Unsqueeze") and (len(node.inputs) < 2 or self._constant(node, 1)))
                or (ours and node.op_type == "Gather" and gather and value not in self.constants)
            ):
                chain.append(node)
            elif value in self.constants or (node.op_type in ("Reshape", "Slice", "Flatten") and self._constant(node, 0)):
                if node.op_type == "Constant":
                    raise _Problem("a Constant node without a dense tensor")
                raise _Problem(f"the constant passes through {node.op_type} before its use; fold constants into the file first")
            else:
                return None
            value = node.inputs[0]
        return None

    def _replay(self, tensor: ir.TensorProtocol, name: str, chain: Sequence[ir.Node], names: Sequence[str]) -> _Constant | None:
        """Walk from the stored tensor to its use, keeping track of axes and zero points."""
        rank = len(tensor.shape)
        constant = _Constant(tensor=tensor, name=name, axes=tuple(range(rank)), aliases=tuple(names))
        for node in reversed(chain):
            axes = constant.axes
            if node.op_type == "Transpose":
                perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(axes))[::-1]
                axes = tuple(axes[i] for i in perm)
            elif node.op_type in ("Squeeze", "Unsqueeze"):
                axes = self._squeezed(node, constant)
            elif node.op_type == "Gather":
                if len(axes) < 3 or _int(node, "axis", 0) != 0:
                    return None
                indices = node.inputs[1]
                if indices is None or indices.shape is None:
                    raise _Problem("it is gathered with indices of unknown rank; run ONNX shape inference first")
                axes = (None,) * len(indices.shape) + axes[1:]
            elif node.op_type in _QUANTIZE:
                zero = self._zero_point(_input(node, 2), constant, _int(node, "axis", 1), _int(node, "block_size", 0))
                constant = replace(constant, quantized_by=b"" if zero is None else zero.tobytes())
            elif node.op_type in _DEQUANTIZE:
                zero = self._zero_point(_input(node, 2), constant, _int(node, "axis", 1), _int(node, "block_size", 0))
                constant = _settle(constant, zero)
            constant = replace(constant, axes=axes, through=(*constant.through, node.op_type))
        return constant

    def _squeezed(self, node: ir.Node, constant: _Constant) -> tuple[int | None, ...]:
        axes = constant.axes
        listed = _input(node, 1)
        if listed is not None:
            found = self._follow(listed)
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
        kept = iter(axes)
        return tuple(None if i in added else next(kept) for i in range(rank))

    def _zero_point(self, value: ir.Value | None, constant: _Constant, axis: int, block: int) -> Array | None:
        """The zero point broadcast against the stored tensor; None when it is zero everywhere."""
        if value is None:
            return None
        found = self._follow(value)
        if found is None:
            raise _Problem(f"the zero point {value.name!r} is not a constant")
        view = self.data.bits(found.tensor, None, found.name)
        # All bits but a float's sign: a zero point of an 8-bit float is a zero of either sign.
        zero: Array = view.bits & view.bits.dtype.type(view.magnitude_mask)
        if not zero.any():
            return None
        axes = constant.axes
        if zero.size == 1:
            return zero.reshape((1,) * len(constant.tensor.shape))
        if any(a is None for a in axes) or len(axes) != len(constant.tensor.shape):
            raise _Problem("the zero points of a gathered or squeezed tensor are not supported")
        stored = [int(a) for a in axes if a is not None]
        if zero.ndim == 1 and not block:
            spread = [1] * len(axes)
            spread[stored[axis % len(axes)]] = zero.size
            return zero.reshape(spread)
        if zero.ndim != len(axes) or not block:
            raise _Problem(f"zero points of shape {list(zero.shape)} are not supported")
        target = stored[axis % len(axes)]
        zero = zero.transpose(np.argsort(stored))
        return np.repeat(zero, block, axis=target).take(range(constant.tensor.shape.numpy()[target]), axis=target)

    def _nbits(self, node: ir.Node, name: str) -> Candidate:
        """MatMulNBits: B is [N, blocks, bytes], lowest bits first; K runs along blocks and bytes."""
        try:
            found = self._follow(_input(node, 1))
            if found is None or found.through:
                raise _Problem("its packed weight is not stored as it is used")
            if _input(node, 4) is not None:
                raise _Problem("its weight is reordered by g_idx")
            bits, block = _int(node, "bits", 4), _int(node, "block_size", 0)
            num_out, num_in = _int(node, "N", 0), _int(node, "K", 0)
            if bits not in (2, 4, 8):
                raise _Problem(f"{bits}-bit packing is not supported")
            zero: Array = np.array(1 << (bits - 1), np.uint8)
            points = _input(node, 3)
            if points is not None:
                stored = self._follow(points)
                if stored is None or stored.tensor.dtype.name != "UINT8":
                    raise _Problem("its zero points are not stored as packed integers")
                packed = self.data.read(stored.tensor, stored.name).reshape(num_out, -1)
                num_blocks = -(-num_in // block)
                zero = unpack_bits(packed, bits)[:, :num_blocks].repeat(block, axis=1)[:, :num_in]
        except _Problem as problem:
            return self._uncheckable(node, name, 1, str(problem))
        tensor = found.tensor

        def read() -> BitView:
            values = unpack_bits(self.data.read(tensor, found.name).reshape(num_out, -1), bits)[:, :num_in]
            return view_bits(values != zero, has_sign=False)

        return Candidate(
            file=self.file,
            node=name,
            op=node.op_type,
            weight=found.name,
            shape=(num_out, num_in),
            dtype=f"uint{bits}",
            axis=1,
            key=(_storage(tensor), "nbits", bits, zero.tobytes()),
            read=read,
        )

    def _einsum(self, node: ir.Node, name: str) -> Iterator[Candidate]:
        """Einsum: K is the one label that a constant operand shares with the others and that the output lacks."""
        constant = [self._constant(node, i) for i in range(len(node.inputs))]
        if all(constant):
            return
        equation = node.attributes["equation"].as_string().replace(" ", "")
        terms, _, output = equation.partition("->")
        labels = terms.split(",")
        for index, term in enumerate(labels):
            try:
                found = self._follow(node.inputs[index])
                if found is None:
                    continue
                others = "".join(labels[:index] + labels[index + 1 :])
                summed = [label for label in term if label not in output and label in others]
                if "->" not in equation or "." in term or len(summed) != 1 or len(set(term)) != len(term):
                    raise _Problem(f"Einsum {equation!r} does not reduce over exactly one axis of this operand")
            except _Problem as problem:
                yield self._uncheckable(node, name, index, str(problem))
                continue
            yield self._found(node, name, found, term.index(summed[0]))


def _settle(constant: _Constant, zero: Array | None) -> _Constant:
    """Apply the zero point of a dequantizing operation."""
    if constant.quantized_by is None:
        return replace(constant, zero_point=zero)
    if constant.quantized_by != (b"" if zero is None else zero.tobytes()):
        raise _Problem("it is quantized with one zero point and dequantized with another")
    return replace(constant, quantized_by=None)


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor stored for a value: an initializer or the output of a Constant node."""
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        attribute = node.attributes["value"]
        return attribute.as_tensor() if attribute.type == ir.AttributeType.TENSOR else None
    if node is not None and node.op_type == "Constant" and "value_ints" in node.attributes:
        return ir.tensor(list(node.attributes["value_ints"].as_ints()), dtype=ir.DataType.INT64)
    return None


def _lost(value: ir.Value) -> bool:
    """Neither computed, nor an input, nor stored: a sparse initializer, which onnx_ir does not read."""
    return value.producer() is None and not value.is_graph_input() and not value.is_initializer()


def _parameter(node: ir.Node) -> str:
    """The parameter a node multiplies by, as torch.onnx notes it; folding constants renames weights to val_17.

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


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default
