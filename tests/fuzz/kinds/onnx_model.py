"""An ONNX file with weights beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf import json_format
from hypothesis import reject, strategies as st
from hypothesis.strategies import SearchStrategy
from onnx import TensorProto, helper, numpy_helper
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_bytes, damaged_value

from sparsepass.export.pattern import check_pattern
from sparsepass.graph.equivalence import compare

_VALUES: tuple[Any, ...] = (
    *(
        "",
        "x",
        "y",
        "y1",
        "y3",
        "w",
        "a.weight",
        "s.weight",
        "times",
        "MatMul",
        "Gather",
        "Scan",
        "Loop",
        "If",
        "Identity",
        "Einsum",
    ),
    *("Squeeze", "Unsqueeze", "Transpose", "Reshape", "MatMulNBits", "com.microsoft", "ij->k", "...", "INT", "INTS", "FLOAT"),
    *("STRING", "GRAPH", "0", "1", "2", "-1", "9223372036854775807", 0, 1, 2, 3, 7, 16, -1, 2**31 - 1, 0.5, [], {}),
)
"""Names, types and numbers that stand where others belong; numbers of 64 bits are texts in JSON."""
_FILE, _DATA = "m.onnx", "m.onnx.data"


def value(name: str) -> onnx.ValueInfoProto:
    """An input or output of a body."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8])


def write(place: Path) -> None:
    """A product, a transposed product, an Einsum, one in branches, one in a scan, and a quantized one."""
    values = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    weights = [numpy_helper.from_array(values, name) for name in ("a.weight", "b.weight", "c.weight")]
    weights.append(numpy_helper.from_array(values.astype(np.int8), "q.weight"))
    weights.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
    weights += [numpy_helper.from_array(values, name) for name in ("t.weight", "e.weight")]
    weights.append(numpy_helper.from_array(np.stack([values, values]), "s.weight"))
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["y3", f"{name}.weight"], [f"y_{name}"], name=f"/{name}/MatMul")],
            name,
            [],
            [value(f"y_{name}")],
        )
        for name in ("t", "e")
    ]
    scan = helper.make_graph(
        [helper.make_node("MatMul", ["state", "one"], ["after"], name="/s/MatMul")],
        "scan",
        [value("state"), helper.make_tensor_value_info("one", TensorProto.FLOAT, [8, 8])],
        [value("after")],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["y1"], name="/a/MatMul"),
        helper.make_node("Transpose", ["b.weight"], ["bt"], perm=[1, 0]),
        helper.make_node("Gemm", ["y1", "bt"], ["y2"], name="/b/Gemm", transB=1),
        helper.make_node("Einsum", ["y2", "c.weight"], ["y3"], name="/c/Einsum", equation="ij,jk->ik"),
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Cast", ["size"], ["which"], to=TensorProto.BOOL),
        helper.make_node("If", ["which"], ["y4"], name="/i", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Scan", ["y4", "s.weight"], ["y5"], name="/s", body=scan, num_scan_inputs=1, scan_input_axes=[0]),
        helper.make_node("DequantizeLinear", ["q.weight", "scale"], ["qw"]),
        helper.make_node("MatMul", ["y5", "qw"], ["y"], name="/q/MatMul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, place / _FILE, save_as_external_data=True, location=_DATA, size_threshold=0)


def damaged(place: Path) -> SearchStrategy[Files]:
    """The bytes of either file, fields of the model, or the data file taken away."""
    model, data = (damaged_bytes((place / name).read_bytes()) for name in (_FILE, _DATA))
    document = json_format.MessageToDict(onnx.load(place / _FILE, load_external_data=False), preserving_proto_field_name=True)
    fields = damaged_value(document, _VALUES).map(_as_bytes)
    gone: SearchStrategy[Files] = st.just({_DATA: None})
    wrong: SearchStrategy[Files] = st.one_of(model, fields, fields).map(lambda found: {_FILE: found})
    cut: SearchStrategy[Files] = data.map(lambda found: {_DATA: found})
    return st.one_of(wrong, wrong, wrong, cut, gone)


def _as_bytes(document: Any) -> bytes:
    """A model of its fields; those that are of no type that fits make no case."""
    try:
        written: bytes = json_format.ParseDict(document, onnx.ModelProto()).SerializeToString()
        return written
    except (json_format.ParseError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        reject()


def read(place: Path) -> object:
    """Check its pattern, and run it against itself."""
    found = check_pattern(place / _FILE)
    return found.to_dict(), compare(place / _FILE, place / _FILE, {"x": torch.ones(2, 8)})


KIND = Kind(name="onnx", sound=write, damaged=damaged, read=read)
