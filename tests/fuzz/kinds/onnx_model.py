"""An ONNX file with weights beside it."""

from pathlib import Path

import numpy as np
import onnx
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from onnx import TensorProto, helper, numpy_helper
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_bytes

from sparsepass.export.pattern import check_pattern
from sparsepass.graph.equivalence import compare

_FILE, _DATA = "m.onnx", "m.onnx.data"


def write(place: Path) -> None:
    """A product, a transposed product, an Einsum and a quantized one."""
    values = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    weights = [numpy_helper.from_array(values, name) for name in ("a.weight", "b.weight", "c.weight")]
    weights.append(numpy_helper.from_array(values.astype(np.int8), "q.weight"))
    weights.append(numpy_helper.from_array(np.array(0.1, np.float32), "scale"))
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["y1"], name="/a/MatMul"),
        helper.make_node("Transpose", ["b.weight"], ["bt"], perm=[1, 0]),
        helper.make_node("Gemm", ["y1", "bt"], ["y2"], name="/b/Gemm", transB=1),
        helper.make_node("Einsum", ["y2", "c.weight"], ["y3"], name="/c/Einsum", equation="ij,jk->ik"),
        helper.make_node("DequantizeLinear", ["q.weight", "scale"], ["qw"]),
        helper.make_node("MatMul", ["y3", "qw"], ["y"], name="/q/MatMul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, place / _FILE, save_as_external_data=True, location=_DATA, size_threshold=0)


def damaged(place: Path) -> SearchStrategy[Files]:
    """The bytes of either file, or the data file taken away."""
    model, data = (damaged_bytes((place / name).read_bytes()) for name in (_FILE, _DATA))
    gone: SearchStrategy[Files] = st.just({_DATA: None})
    wrong: SearchStrategy[Files] = model.map(lambda found: {_FILE: found})
    cut: SearchStrategy[Files] = data.map(lambda found: {_DATA: found})
    return st.one_of(wrong, wrong, wrong, cut, gone)


def read(place: Path) -> object:
    """Check its pattern, and run it against itself."""
    found = check_pattern(place / _FILE)
    return found.to_dict(), compare(place / _FILE, place / _FILE, {"x": torch.ones(2, 8)})


KIND = Kind(name="onnx", sound=write, damaged=damaged, read=read)
