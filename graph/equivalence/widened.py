"""ONNX files in bfloat16, for which onnxruntime has no kernels on the CPU: a copy that computes the same in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

_WIDER = {ir.DataType.BFLOAT16: ir.DataType.FLOAT}
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def widened_copy(path: Path, folder: Path) -> Path | None:
    """Write a copy of an ONNX file in which float32 stands for bfloat16. Every bfloat16 value is one of float32.

    Args:
        path: The file.
        folder: Where the copy goes, with its weights beside it.

    Returns:
        The copy; None, and nothing is written, if the file has no bfloat16.
    """
    model = ir.load(path)
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    changed = [_widen_values(graph) | _widen_attributes(graph) for graph in graphs]
    if not any(changed):
        return None
    copy = folder / path.name
    ir.save(model, copy, external_data=f"{path.name}.data")
    return copy


def _widen_values(graph: Any) -> bool:
    found = False
    for value in _values(graph):
        if value.dtype in _WIDER:
            found, value.dtype = True, _WIDER[value.dtype]
        if value.const_value is not None and value.const_value.dtype in _WIDER:
            found, value.const_value = True, _widened(value.const_value)
    return found


def _values(graph: Any) -> Iterator[Any]:
    nodes = list(ir.traversal.RecursiveGraphIterator(graph))
    for each in {id(one): one for one in (graph, *(node.graph for node in nodes))}.values():
        yield from each.inputs
        yield from getattr(each, "initializers", {}).values()
    for node in nodes:
        yield from node.outputs


def _widen_attributes(graph: Any) -> bool:
    found = False
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _WIDER:
                found, node.attributes[name] = True, ir.AttrTensor(name, _widened(attribute.as_tensor()))
            elif name in _TYPE_ATTRIBUTES and attribute.type is ir.AttributeType.INT:
                wider = _WIDER.get(ir.DataType(attribute.as_int()))
                if wider is not None:
                    found, node.attributes[name] = True, ir.AttrInt64(name, int(wider))
    return found


def _widened(tensor: Any) -> "ir.Tensor[Any]":
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)
