"""Reading ONNX files, the raw bits of the tensors stored in them, and the constants that operations make of those."""

import math
import mmap
import os
from pathlib import Path
from typing import final

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from sparsepass.export.pattern.bits import Array, BitView, unpack_bits, view_bits
from sparsepass.graph.onnx_files import check_external_data, read_proto
from sparsepass.graph.support import SparsepassError, first_line, read_by

SIGNED_TYPES = {
    "FLOAT",
    "FLOAT16",
    "BFLOAT16",
    "DOUBLE",
    "FLOAT8E4M3FN",
    "FLOAT8E5M2",
    "FLOAT4E2M1",
    "FLOAT6E2M3",
    "FLOAT6E3M2",
}
READABLE_TYPES = SIGNED_TYPES | {
    *("FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "BOOL"),
    *(f"{u}INT{bits}" for u in ("", "U") for bits in (2, 4, 8, 16, 32, 64)),
}

# What the reference evaluator raises for models it cannot run; it has no error type of its own for all of them.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Problem(Exception):  # noqa: N818 - control flow within the checker, never seen outside
    """Why a use cannot be checked."""


def onnx_files(folder: Path) -> list[Path]:
    """List the ONNX files of a folder, or else of its `onnx` subfolder (the hub's custom), sorted."""
    return sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))


def read_onnx(path: Path) -> ir.Model:
    """Read an ONNX file; external data stays on disk until a weight is looked at.

    Args:
        path: The file.

    Returns:
        The model, local functions inlined.

    Raises:
        SparsepassError: The file is not a readable ONNX model.
    """
    proto = read_proto(path)
    check_external_data(proto, path)
    return from_proto(proto, str(path), path.parent)


def from_proto(proto: onnx.ModelProto, where: str, base: Path | None) -> ir.Model:
    """Turn a ModelProto into a model, local functions inlined.

    Args:
        proto: The model.
        where: Its name, for errors.
        base: Folder of its external data; None for a model in memory.

    Returns:
        The model.

    Raises:
        SparsepassError: It is empty or not valid.
    """
    if not proto.HasField("graph") or not proto.ir_version:
        raise SparsepassError(
            f"{where} holds no ONNX graph: expected a model with ir_version and graph, found an empty or cut-off one. "
            "Copy or export it again."
        )
    advice = "it is not a valid ONNX model: run onnx.checker.check_model on it, and export it again"
    with read_by("onnx_ir", where, Exception, advice=advice):  # it has no error type of its own for all that is wrong
        model = ir.from_proto(proto)
        if base is not None:
            ir.external_data.set_base_dir(model.graph, base)
        if model.functions:
            ir_passes.InlinePass()(model)
    return model


@final
class OnnxData:
    """Reads the tensors of one file; data files are mapped once, when first needed.

    Args:
        file: Name to give in errors.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._maps: dict[str, mmap.mmap] = {}

    def bits(self, tensor: ir.TensorProtocol, zero: Array | None, name: str) -> BitView:
        """Return a tensor's bits.

        Args:
            tensor: The tensor.
            zero: The integers that mean zero, broadcast to its shape; None for plain zero.
            name: Its name, for errors.

        Returns:
            The bits, or with `zero` 1 where the value is not zero.

        Raises:
            SparsepassError: The data is not there or cut off.
        """
        data = self.read(tensor, name)
        dtype = tensor.dtype
        view = view_bits(data, has_sign=dtype.name in SIGNED_TYPES, num_bits=min(dtype.bitwidth, 8 * data.dtype.itemsize))
        if zero is None:
            return view
        values = view.bits & view.bits.dtype.type((1 << dtype.bitwidth) - 1)
        return view_bits(values != zero, has_sign=False)

    def read(self, tensor: ir.TensorProtocol, name: str) -> Array:
        """Return a tensor's values; those of external data as unsigned integers of the same width.

        Args:
            tensor: The tensor.
            name: Its name, for errors.

        Returns:
            The values; sub-byte types unpacked, one to a byte.

        Raises:
            SparsepassError: The data is not there or cut off.
        """
        if not isinstance(tensor, ir.ExternalTensor):
            try:
                return tensor.numpy()
            except (ValueError, TypeError, AssertionError) as error:
                num_values = math.prod(tensor.shape.numpy())
                raise SparsepassError(
                    f"weight {name!r} of {self.file or 'the model'} cannot be read ({error}): expected {num_values} "
                    f"values of type {tensor.dtype.name}. The file may be damaged; export it again."
                ) from error
        shape = tuple(tensor.shape.numpy())
        offset, num_bytes = tensor.offset or 0, tensor.nbytes
        if num_bytes == 0:
            return np.zeros(shape, np.uint8)
        data = self._map(tensor, name)
        if (tensor.length is not None and tensor.length < num_bytes) or offset + num_bytes > len(data):
            raise SparsepassError(
                f"external data of weight {name!r} is cut off: {tensor.path} holds {len(data)} bytes, and the weight "
                f"needs {num_bytes} from byte {offset} on. Copy the data file again, or export the model again."
            )
        if tensor.dtype.bitwidth in (2, 4):
            packed = np.frombuffer(data, np.uint8, num_bytes, offset)
            return unpack_bits(packed, tensor.dtype.bitwidth)[: math.prod(shape)].reshape(shape)
        if tensor.dtype.bitwidth < 8:
            return tensor.numpy()
        itemsize = tensor.dtype.bitwidth // 8
        return np.frombuffer(data, f"<u{itemsize}", math.prod(shape), offset).reshape(shape)

    def values(self, tensor: ir.TensorProtocol, name: str) -> Array:
        """Return a tensor's values in its own type.

        Args:
            tensor: The tensor.
            name: Its name, for errors.

        Returns:
            The values; types that numpy lacks are those of ml_dtypes.

        Raises:
            SparsepassError: The data is not there or cut off.
        """
        data = self.read(tensor, name)
        kind = tensor.dtype.numpy()
        if data.dtype == kind:
            return data
        # Unpacked 4-bit integers are a byte each, and a signed one has to have its sign in all of it.
        if tensor.dtype.bitwidth < 8:
            return tensor.numpy()
        return data.view(kind)

    def _map(self, tensor: ir.ExternalTensor, name: str) -> mmap.mmap:
        # Read here rather than by onnx_ir: it maps the file once per tensor and refuses the linked files of the hub.
        path = tensor.path
        base, location = os.fspath(tensor.base_dir), os.fspath(tensor.location)
        if base and (os.path.isabs(location) or os.path.normpath(location).startswith("..")):
            raise SparsepassError(
                f"external data of weight {name!r} lies outside the model's folder ({location!r}): expected a path "
                "relative to the ONNX file. Do not trust this file; export the model again."
            )
        if path not in self._maps:
            try:
                with open(path, "rb") as stream:
                    self._maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise SparsepassError(
                    f"external data file {path!r} of weight {name!r} cannot be read ({error}): expected it beside the "
                    "ONNX file. Copy it there; for a ModelProto in memory, give the path of its file instead."
                ) from error
        return self._maps[path]


@final
class ConstantValues:
    """Computes the constants that operations make of stored tensors, with onnx's reference evaluator.

    A Reshape, a product of constants and the like have to be computed to know what is multiplied. Results are not kept: a
    large one is computed again when its bits are counted.

    Args:
        data: Reads its stored tensors.
        model: The model.
    """

    def __init__(self, data: OnnxData, model: ir.Model) -> None:
        self._data = data
        self._opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        self._ir_version = model.ir_version
        self._lazy: dict[ir.Value, ir.LazyTensor] = {}

    def lazy(self, value: ir.Value) -> ir.LazyTensor:
        """A tensor that is computed when it is read; one and the same for one value.

        Raises:
            Problem: It cannot be computed.
        """
        if value not in self._lazy:
            # Computed once to learn its type and shape, and to know that it can be.
            found = self.compute(value)
            self._lazy[value] = ir.LazyTensor(
                lambda: ir.tensor(self.compute(value)),
                dtype=ir.DataType.from_numpy(found.dtype),
                shape=ir.Shape(found.shape),
                name=value.name,
            )
        return self._lazy[value]

    def compute(self, value: ir.Value) -> Array:
        """Compute a constant value.

        Raises:
            Problem: It cannot be computed.
        """
        from onnx.reference import ReferenceEvaluator

        nodes, leaves = self._part(value)
        names = {leaf: f"leaf_{i}" for i, leaf in enumerate(leaves)}
        for i, node in enumerate(nodes):
            names |= {output: f"value_{i}_{j}" for j, output in enumerate(node.outputs)}
        protos = []
        for node in nodes:
            proto = ir.to_proto(node)
            proto.input[:] = [names[v] if v is not None else "" for v in node.inputs]
            proto.output[:] = [names[v] for v in node.outputs]
            protos.append(proto)
        info = [onnx.helper.make_value_info(names[leaf], onnx.TypeProto()) for leaf in leaves]
        result = onnx.helper.make_value_info(names[value], onnx.TypeProto())
        graph = onnx.helper.make_graph(protos, "constants", info, [result])
        model = onnx.helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        feeds = {names[leaf]: self._data.values(tensor, leaf.name or "?") for leaf, tensor in leaves.items()}
        try:
            with np.errstate(all="ignore"):
                found = next(iter(ReferenceEvaluator(model).run(None, feeds)))
        except _FAILURES as error:
            raise Problem(f"{type(error).__name__}: {first_line(error)}") from error
        if not isinstance(found, np.ndarray | np.generic):
            raise Problem("it is no tensor")
        return np.asarray(found)

    def operations(self, value: ir.Value) -> tuple[str, ...]:
        """The operation types that a value is computed through, in order, each once."""
        return tuple(dict.fromkeys(node.op_type for node in self._part(value)[0]))

    def _part(self, value: ir.Value) -> tuple[list[ir.Node], dict[ir.Value, ir.TensorProtocol]]:
        """The nodes that make a value, producers first, and the stored tensors they start from."""
        leaves: dict[ir.Value, ir.TensorProtocol] = {}
        seen: dict[ir.Node, int] = {}
        ordered: list[ir.Node] = []
        stack: list[tuple[ir.Value, bool]] = [(value, False)]
        while stack:
            current, is_ready = stack.pop()
            node = current.producer()
            tensor = stored(current)
            if tensor is not None:
                leaves[current] = tensor
            elif node is None:
                raise Problem(f"{current.name!r} is a slice of a scanned tensor or a sparse initializer")
            elif is_ready:
                ordered.append(node)
            elif node not in seen:
                seen[node] = len(seen)
                stack.append((current, True))
                stack.extend((v, False) for v in node.inputs if v is not None)
        return ordered, leaves


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor stored for a value: an initializer or the output of a Constant node."""
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, attribute in node.attributes.items():
        if name == "value" and attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor()
        if name in ("value_ints", "value_int"):
            return ir.tensor(np.array(attribute.value, np.int64))
        if name in ("value_floats", "value_float"):
            return ir.tensor(np.array(attribute.value, np.float32))
    return None


def is_lost(value: ir.Value) -> bool:
    """Neither computed, nor an input, nor stored: a sparse initializer, which onnx_ir does not read."""
    return value.producer() is None and not value.is_graph_input() and not value.is_initializer()
