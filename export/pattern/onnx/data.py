"""Reading ONNX files and the raw bits of the tensors stored in them."""

import math
import mmap
import os
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from sparsepass.export.pattern.bits import BitView, unpack_bits, view_bits
from sparsepass.graph.support import SparsepassError

__all__ = ["READABLE_TYPES", "SIGNED_TYPES", "OnnxData", "from_proto", "onnx_files", "read_onnx"]

Array = npt.NDArray[Any]

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
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, OSError) as error:
        raise SparsepassError(
            f"{path} cannot be read as an ONNX model ({error}): expected a complete protobuf file. It may be truncated "
            "or of another format; copy or export it again."
        ) from error
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
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, KeyError) as error:
        cause = error.__cause__ or error
        raise SparsepassError(
            f"{where} is not a valid ONNX model ({cause}): run onnx.checker.check_model on it, and export it again."
        ) from error
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
