"""Where an ONNX graph keeps its weights: in files beside it, never elsewhere."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsepass.graph.support import file_inside


def check_external_data(proto: Any, path: Path) -> None:
    """Refuse an ONNX graph whose tensors lie in files outside of its folder.

    Args:
        proto: The ``onnx.ModelProto``, without its external data.
        path: Its file.

    Raises:
        SparsepassError: If one does, or lies in a pipe or a device.
    """
    functions = (node for function in proto.functions for node in function.node)
    tensors = [*_of_graph(proto.graph), *_of_nodes(functions)]
    names = {each.value for tensor in tensors for each in tensor.external_data if each.key == "location"}
    for name in sorted(names):
        file_inside(path.parent, name, str(path))


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
