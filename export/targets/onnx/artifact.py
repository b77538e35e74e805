"""What an ONNX export wrote: files, graphs, and where each weight of the program went."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from sparsepass.graph.support import SparsepassError

MODEL_FILE, ENCODER_FILE, DECODER_FILE = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"

Kind = Literal["forward", "decoder-with-past", "encoder-decoder-with-past"]
Role = Literal["model", "encoder", "decoder"]
Stored = Literal["floats", "qdq", "matmulnbits"]
Step = tuple[str, tuple[int, ...]]
Array = npt.NDArray[Any]


@final
@dataclass(frozen=True, kw_only=True)
class OnnxValue:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        dtype: Element type as ONNX writes it, in lower case ("float", "float16", "int64").
        axes: A name for each axis that may vary, a length for each that may not.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One initializer that holds a weight of the program, or a part of it.

    Attributes:
        file: File of the graph.
        initializer: Its name there.
        shape: Shape as stored.
        op: Operation that reads it ("MatMul", "Gemm", "Conv", "Gather", ...), "" if none does.
        axis: Axis as stored along which that operation reduces; None if it reduces nothing (an embedding, a norm).
        view: How the weight became the initializer: ("transpose", axes), ("split", (axis, part, start, stop)),
            ("squeeze", axes), ("unsqueeze", axes), in this order; empty if it is stored as in the program.
        form: What the initializer holds: floats, or integers (or fp8) for a DequantizeLinear or a MatMulNBits.
        reason: Why a quantized weight is not in the form that was asked for; "" if it is.
    """

    file: str
    initializer: str
    shape: tuple[int, ...]
    op: str
    axis: int | None
    view: tuple[Step, ...] = ()
    form: Stored = "floats"
    reason: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """One graph in one file.

    Attributes:
        file: File name.
        role: What it is for.
        inputs: Its inputs in order.
        outputs: Its outputs in order.
        num_nodes: Number of operations.
    """

    file: str
    role: Role
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    num_nodes: int


@final
@dataclass(frozen=True, kw_only=True)
class OnnxArtifact:
    """What `lower_onnx` wrote.

    Attributes:
        kind: One plain graph, a decoder with its cache, or encoder and decoder.
        dtype: Element type of the weights.
        opset: Operator set of the file.
        files: File name -> size in bytes.
        graphs: The graphs.
        weights: Weight name in the program -> the initializers that hold it.
        expected_sparse: File -> initializer -> pattern: exactly those that must be N:M sparse.
        notes: What a reader should know: why a plain graph was written, what is stored twice, and the like.
    """

    kind: Kind
    dtype: str
    opset: int
    files: Mapping[str, int]
    graphs: tuple[OnnxGraph, ...]
    weights: Mapping[str, tuple[StoredWeight, ...]]
    expected_sparse: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def graph(self, role: Role) -> OnnxGraph:
        """The graph of that role.

        Raises:
            SparsepassError: If there is none.
        """
        for graph in self.graphs:
            if graph.role == role:
                return graph
        raise SparsepassError(f"this export has no {role} graph; it has {', '.join(g.role for g in self.graphs)}")

    def to_dict(self) -> dict[str, Any]:
        """The whole record as JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "OnnxArtifact":
        """Undo `to_dict`, also after a way through JSON, which turns tuples into lists.

        Raises:
            SparsepassError: If the document is something else.
        """
        try:
            return TypeAdapter(OnnxArtifact).validate_python(document)
        except ValidationError as error:
            raise SparsepassError(f"this is no record of an ONNX export ({error}); export the model again") from error


def apply_view(array: Array, view: tuple[Step, ...]) -> Array:
    """Turn a weight of the program into the array that an initializer holds.

    Args:
        array: The weight as the program stores it.
        view: The steps of `StoredWeight.view`.

    Returns:
        The array as stored; it may share memory with the argument.

    >>> apply_view(np.zeros((4, 2, 3)), (("transpose", (0, 2, 1)), ("split", (0, 1, 1, 2)), ("squeeze", (0,)))).shape
    (3, 2)
    """
    for kind, numbers in view:
        if kind == "transpose":
            array = array.transpose(numbers)
        elif kind == "split":
            axis, _, start, stop = numbers
            array = array[(slice(None),) * axis + (slice(start, stop),)]
        elif kind == "squeeze":
            array = array.squeeze(axis=numbers)
        else:
            assert kind == "unsqueeze"
            array = np.expand_dims(array, numbers)
    return array
