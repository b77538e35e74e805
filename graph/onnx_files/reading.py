"""Reading ONNX files that others made: what the libraries behind us trust is checked first.

1. The file is a whole protobuf of a model with a graph, not larger than protobuf allows.
2. Each stored tensor has a shape that memory could hold and as many bytes as its shape and type need, in the file or in a file
   beside it, which is there and long enough.
3. Each node has as many inputs and outputs, and attributes of the types, as its operator's schema says, where onnx knows one.
   It reads only what was computed before, so that nothing goes round in a circle.
4. No shape that a graph declares is negative or larger than memory.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparsepass.graph.support import SparsepassError, is_file_name, opened, shown

if TYPE_CHECKING:
    import onnx

_MAX_BYTES: Final = (1 << 31) - 1
_MAX_ELEMENTS: Final = 1 << 40
_ADVICE: Final = "it may be truncated, damaged or of another format: copy or export it again"


def read_proto(path: Path, *, error: type[SparsepassError] = SparsepassError) -> "onnx.ModelProto":
    """Read an ONNX file, without the data beside it.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        SparsepassError: If it cannot be read as an ONNX model, or is no valid one.
    """
    import onnx
    from google.protobuf.message import DecodeError

    where = f"{shown(path)} cannot be read as an ONNX model"
    with opened(path, error=error, advice=_ADVICE) as file:
        if os.fstat(file.fileno()).st_size > _MAX_BYTES:
            raise error(f"{where} (it is larger than 2 GiB); {_ADVICE}")
        content = file.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
        if not model.HasField("graph") or not model.ir_version:
            raise error(f"{shown(path)} holds no ONNX graph, but an empty or cut-off one; {_ADVICE}")
        fault = next(_faults(model, path.parent), None)
    except (DecodeError, UnicodeDecodeError) as cause:  # texts are decoded when they are looked at
        raise error(f"{where} ({cause}); {_ADVICE}") from cause
    if fault is not None:
        raise error(f"{where} ({fault}); {_ADVICE}")
    return model


def _faults(model: "onnx.ModelProto", folder: Path) -> Iterator[str]:
    notes = [text for entry in model.metadata_props for text in (entry.key, entry.value)]
    domains = [entry.domain for entry in model.opset_import]
    functions = [text for one in model.functions for text in (one.name, one.domain, *one.input, *one.output)]
    if not _are_texts(*notes, *domains, *functions, model.producer_name, model.producer_version, model.domain):
        yield "it holds a name that is no UTF-8"
        return
    versions = {entry.domain: entry.version for entry in model.opset_import}
    yield from _faults_of_graph(model.graph, versions, folder, frozenset())
    for function in model.functions:
        own = versions | {entry.domain: entry.version for entry in function.opset_import}
        yield from _faults_of_nodes(function.node, own, folder, set(), set(function.input))


def _faults_of_graph(
    graph: "onnx.GraphProto", versions: dict[str, int], folder: Path, outer: "Collection[str]"
) -> Iterator[str]:
    seen: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in seen or not tensor.name:
            yield f"the initializer {tensor.name!r} is there twice, or has no name"
        seen.add(tensor.name)
        yield from _faults_of_tensor(tensor, folder)
    for sparse in graph.sparse_initializer:
        seen.add(sparse.values.name)
        yield from _faults_of_tensor(sparse.values, folder)
        yield from _faults_of_tensor(sparse.indices, folder)
    for value in (*graph.input, *graph.output, *graph.value_info):
        axes = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        if not _are_texts(graph.name, value.name, *axes):
            yield f"the value {value.name!r} has a name that is no UTF-8"
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        # Exporters write -1 for a size that they do not know.
        if any(not -1 <= size <= _MAX_ELEMENTS for size in sizes):
            yield f"the value {value.name!r} has the shape {sizes}"
    seen |= {value.name for value in graph.input}
    yield from _faults_of_nodes(graph.node, versions, folder, outer, seen)
    if missing := [value.name for value in graph.output if value.name not in seen and value.name not in outer]:
        yield f"the output {missing[0]!r} is computed by no node"


def _faults_of_nodes(
    nodes: "Iterable[onnx.NodeProto]", versions: dict[str, int], folder: Path, outer: "Collection[str]", seen: set[str]
) -> Iterator[str]:
    """What is wrong with nodes in their order; what they compute is added to what was seen."""
    for node in nodes:
        if missing := [name for name in node.input if name and name not in seen and name not in outer]:
            yield f"the node {node.name!r} of type {node.op_type!r} reads {missing[0]!r}, which is not computed before it"
        yield from _faults_of_node(
            node, versions, folder, {*outer, *seen} if any(a.HasField("g") for a in node.attribute) else ()
        )
        if twice := [name for name in node.output if name and name in seen]:
            yield f"the node {node.name!r} of type {node.op_type!r} computes {twice[0]!r}, which is there already"
        seen.update(node.output)


def _faults_of_node(node: "onnx.NodeProto", versions: dict[str, int], folder: Path, known: "Collection[str]") -> Iterator[str]:
    import onnx

    what = f"the node {node.name!r} of type {node.op_type!r}"
    notes = [text for entry in node.metadata_props for text in (entry.key, entry.value)]
    names = [attribute.name for attribute in node.attribute]
    if not _are_texts(node.name, node.op_type, node.domain, *node.input, *node.output, *names, *notes):
        yield f"{what} has a name that is no UTF-8"
        return
    for attribute in node.attribute:
        if not _are_utf8(attribute.s, *attribute.strings):
            yield f"{what} has an attribute {attribute.name!r} that is no UTF-8"
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            if not _fits_body(node, graph):
                yield f"{what} has a body with {len(graph.input)} inputs and {len(graph.output)} outputs"
            yield from _faults_of_graph(graph, versions, folder, known)
        for tensor in (*([attribute.t] if attribute.HasField("t") else ()), *attribute.tensors):
            yield from _faults_of_tensor(tensor, folder)
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = versions.get(node.domain, versions.get(domain))
    if not onnx.defs.has(node.op_type, domain):
        return
    if version is None or not 0 < version < 1 << 31:
        yield f"{what} is of the domain {domain!r}, of which the file imports {'no opset' if version is None else version}"
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        yield f"{what} is not in version {version} of its opset"
        return
    if not schema.min_input <= len(node.input) <= schema.max_input:
        yield f"{what} has {len(node.input)} inputs"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        yield f"{what} has {len(node.output)} outputs"
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, expected in schema.attributes.items():
        kind: Any = expected.type
        if name in given and given[name].type != kind.value and not given[name].ref_attr_name:
            yield f"{what} has an attribute {name!r} of another type than {kind.name}"
        if expected.required and name not in given:
            yield f"{what} lacks the attribute {name!r}"
            return
    if node.op_type == "Scan" and "num_scan_inputs" in given and not domain:
        number, axes = given["num_scan_inputs"].i, given["scan_input_axes"].ints if "scan_input_axes" in given else ()
        if not 1 <= number <= len(node.input) or len(axes) not in (0, number):
            yield f"{what} has {len(node.input)} inputs, and scans {number} along {len(axes) or number} axes"


def _are_texts(*found: object) -> bool:
    """Whether texts are texts: protobuf gives those that are no UTF-8 as bytes."""
    return all(isinstance(each, str) for each in found)


def _are_utf8(*found: bytes) -> bool:
    try:
        return all(each.decode() is not None for each in found)
    except UnicodeDecodeError:
        return False


def _fits_body(node: "onnx.NodeProto", graph: "onnx.GraphProto") -> bool:
    """Whether a body has the inputs and outputs that go with its node's."""
    if node.op_type == "If":
        return len(graph.output) == len(node.output)
    if node.op_type == "Loop":
        return len(graph.input) == len(node.input) and len(graph.output) == len(node.output) + 1
    return node.op_type != "Scan" or (len(graph.input) == len(node.input) and len(graph.output) == len(node.output))


def _faults_of_tensor(tensor: "onnx.TensorProto", folder: Path) -> Iterator[str]:
    import onnx

    what = f"the tensor {tensor.name!r}"
    beside = [text for entry in tensor.external_data for text in (entry.key, entry.value)]
    if not _are_texts(tensor.name, *beside):
        yield f"{what} has a name that is no UTF-8"
        return
    shape = list(tensor.dims)
    if any(size < 0 for size in shape) or math.prod(max(1, size) for size in shape) > _MAX_ELEMENTS:
        yield f"{what} has the shape {shape}"
        return
    if tensor.data_type in _UNSIZED:
        return
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        yield f"{what} has the type {tensor.data_type}"
        return
    expected = -(-math.prod(shape) * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        yield from _faults_of_external(tensor, expected, what, folder)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
        yield f"{what} of shape {shape} has {len(tensor.raw_data)} bytes and needs {expected}"


def _faults_of_external(tensor: "onnx.TensorProto", expected: int, what: str, folder: Path) -> Iterator[str]:
    """What is wrong with the place of data in a file beside the model. Which folder it may lie in is not told here."""
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    told = dict(entries)
    if len(told) < len(entries) or not told.get("location"):
        yield f"{what} lies in a file beside, and the file is not told, or twice"
        return
    numbers = [told.get("offset", "0"), told.get("length", str(expected))]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        yield f"{what} lies at offset {numbers[0]!r} with length {numbers[1]!r}"
        return
    offset, length = map(int, numbers)
    file = folder / told["location"]
    size = file.stat().st_size if is_file_name(told["location"]) and file.is_file() else None
    if size is not None and (length != expected or offset + length > size):
        yield (
            f"external data of weight {tensor.name!r} is cut off: {shown(file)} holds {size} bytes, and the weight needs "
            f"{expected} from byte {offset} on, where {length} are told"
        )


_BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8,
    18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Number of an element type of ONNX -> its bits."""
_UNSIZED: Final = (8, 27, 28)
"""Texts, and types of six bits, which are packed in more ways than one."""
