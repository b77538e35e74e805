"""Small ONNX graphs, one for each way a weight can stand in a file."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.families import BY_NAME

from sparsepass.export.pattern import PatternEntry, check_pattern
from sparsepass.export.stages.exporting import export
from sparsepass.graph.support.errors import SparsepassError

OPSET = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def sparse(*shape: int, axis: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    """2:4 along `axis`, at random places, and hardly by chance along any other."""
    rng = np.random.default_rng(seed)
    values = np.moveaxis(rng.uniform(0.5, 2.0, shape), axis, -1)
    order = np.argsort(rng.random((*values.shape[:-1], values.shape[-1] // 4, 4)), axis=-1)
    values = values * (order < 2).reshape(values.shape)
    return np.moveaxis(values, -1, axis).astype(dtype).copy()


def dense(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(1).uniform(0.5, 2.0, shape).astype(dtype)


def node(op: str, inputs: Sequence[str], output: str = "y", /, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], f"n_{output}", **attributes)


def model(nodes: Sequence[onnx.NodeProto], **weights: Any) -> onnx.ModelProto:
    """A model whose undefined inputs are graph inputs of unknown rank."""
    tensors = [w if isinstance(w, onnx.TensorProto) else numpy_helper.from_array(w, k) for k, w in weights.items()]
    made = {name for n in nodes for name in n.output} | set(weights)
    free = sorted({name for n in nodes for name in n.input if name} - made)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in free]
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, None) for n in nodes]
    return helper.make_model(helper.make_graph(list(nodes), "g", inputs, outputs, tensors), opset_imports=OPSET)


def entries(nodes: Sequence[onnx.NodeProto], /, **weights: Any) -> tuple[PatternEntry, ...]:
    return check_pattern(model(nodes, **weights)).entries


def only(nodes: Sequence[onnx.NodeProto], /, **weights: Any) -> PatternEntry:
    found = entries(nodes, **weights)
    assert len(found) == 1, found
    return found[0]


# ---- axes of the products


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "shape", "axis"),
    [
        ("MatMul", ["x", "w"], {}, (8, 12), 0),
        ("MatMul", ["w", "x"], {}, (12, 8), 1),
        ("MatMul", ["x", "w"], {}, (2, 8, 12), 1),
        ("MatMul", ["w", "x"], {}, (2, 12, 8), 2),
        ("MatMul", ["x", "w"], {}, (3, 2, 8, 12), 2),
        ("MatMul", ["x", "w"], {}, (8,), 0),
        ("Gemm", ["x", "w"], {}, (8, 12), 0),
        ("Gemm", ["x", "w"], {"transB": 1}, (12, 8), 1),
        ("Gemm", ["w", "x"], {}, (12, 8), 1),
        ("Gemm", ["w", "x"], {"transA": 1}, (8, 12), 0),
        ("Gemm", ["x", "w"], {"transA": 1, "transB": 1}, (12, 8), 1),
        ("Conv", ["x", "w"], {}, (12, 8, 3, 3), 1),
        ("Conv", ["x", "w"], {}, (12, 8, 1, 1), 1),
        ("Conv", ["x", "w"], {}, (12, 8, 3), 1),
        ("Conv", ["x", "w"], {"group": 2}, (12, 8, 3), 1),
        ("Einsum", ["x", "w"], {"equation": "bti,oi->bto"}, (12, 8), 1),
        ("Einsum", ["x", "w"], {"equation": "bi, eio -> beo"}, (2, 8, 12), 1),
    ],
)
def test_the_axis_of_k(op: str, inputs: list[str], attributes: dict[str, Any], shape: tuple[int, ...], axis: int) -> None:
    found = only([node(op, inputs, **attributes)], w=sparse(*shape, axis=axis))
    assert (found.verdict, found.axis, found.weight, found.op) == ("conforms", axis, "w", op)
    assert found.num_groups == math.prod(shape) // 4
    assert only([node(op, inputs, **attributes)], w=dense(*shape)).verdict == "violates"


@pytest.mark.parametrize("op", ["FusedMatMul", "FusedGemm", "FusedConv"])
def test_operations_of_the_onnxruntime_optimizer(op: str) -> None:
    conv = op == "FusedConv"
    attributes = {} if conv else {"transB": 1}
    shape = (12, 8, 3) if conv else (12, 8)
    found = only([node(op, ["x", "w"], domain="com.microsoft", **attributes)], w=sparse(*shape, axis=1))
    assert (found.verdict, found.axis) == ("conforms", 1)


def test_transposed_batches_are_not_checkable() -> None:
    nodes = [node("FusedMatMul", ["x", "w"], domain="com.microsoft", transBatchB=1)]
    assert only(nodes, w=sparse(2, 8, 12, axis=1)).verdict == "not checkable"


def test_constant_matrices_of_unknown_operations_are_listed() -> None:
    found = only(
        [node("MyLinear", ["x", "w", "b", "ids"], domain="my.domain")], w=dense(8, 8), b=dense(8), ids=np.ones((2, 2), int)
    )
    assert (found.verdict, found.weight, found.required) == ("not checkable", "w", True)
    assert found.reason.startswith("what my.domain::MyLinear does with this constant is not known")
    assert entries([node("MyNorm", ["x", "b"], domain="my.domain")], b=dense(8)) == ()
    assert entries([node("BiasGelu", ["x", "w"], domain="com.microsoft")], w=dense(8, 8)) == ()


# ---- what is wrong with a weight


def test_wrong_axis_is_named() -> None:
    found = only([node("MatMul", ["x", "w"])], w=sparse(8, 12, axis=1))
    assert (found.verdict, found.axis, found.conforming_axes) == ("violates", 0, (1,))
    assert found.reason == "2:4 lies on axis 1, but K is axis 0: wrong axis"


def test_one_flipped_entry_is_found_at_its_place() -> None:
    weight = sparse(16, 12, axis=0)
    weight[4 + int(np.flatnonzero(weight[4:8, 7] == 0)[0]), 7] = 1e-30
    found = only([node("MatMul", ["x", "w"])], w=weight)
    assert (found.verdict, found.num_violations, found.first_violation) == ("violates", 1, (4, 7))
    assert found.reason == "1 of 48 groups of 4 have more than 2 nonzeros, the first at [4, 7]"


def test_dense_is_called_dense() -> None:
    found = only([node("Gemm", ["x", "w"], transB=1)], w=dense(8, 8))
    assert found.reason == "dense: every group of 4 has more than 2 nonzeros"


def test_a_merged_adapter_is_caught() -> None:
    weight = sparse(16, 16, axis=1)
    weight += np.outer(np.linspace(0.1, 1, 16), np.linspace(0.1, 1, 16)).astype(np.float32)
    assert only([node("Gemm", ["x", "w"], transB=1)], w=weight).verdict == "violates"


def test_permuted_input_channels_are_caught() -> None:
    weight = sparse(64, 16, axis=1)[:, np.random.default_rng(0).permutation(16)]
    assert only([node("Gemm", ["x", "w"], transB=1)], w=weight).verdict == "violates"


def test_negative_zeros_conform_and_are_counted() -> None:
    weight = sparse(8, 12, axis=0)
    weight[weight == 0] = -0.0
    report = check_pattern(model([node("MatMul", ["x", "w"])], w=weight))
    assert report.conforms
    assert report.num_negative_zeros == report.entries[0].num_negative_zeros == 48
    assert report.entries[0].reason == "48 zeros are -0.0, which some packers refuse"


def test_k_that_is_no_multiple_of_m_is_not_eligible() -> None:
    report = check_pattern(model([node("MatMul", ["x", "w"])], w=dense(30, 8)))
    assert report.entries[0].verdict == "not eligible"
    assert report.entries[0].reason == "not eligible: K=30 is not a multiple of 4"
    assert not report.conforms


@pytest.mark.parametrize(("pattern", "holds"), [("2:4", True), ("4:8", True), ("1:4", False), ("1:2", False), ("3:4", True)])
def test_other_patterns(pattern: str, holds: bool) -> None:
    weight = np.zeros((8, 4), np.float32)
    weight[[0, 1, 4, 5]] = 1.0
    report = check_pattern(model([node("MatMul", ["x", "w"])], w=weight), pattern)
    assert report.conforms is holds
    assert report.pattern == report.entries[0].pattern == pattern


# ---- how weights are stored


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_float_types(dtype: Any) -> None:
    weight = sparse(8, 12, axis=0, dtype=dtype)
    weight[0, weight[0] == 0] = -0.0
    found = only([node("MatMul", ["x", "w"])], w=weight)
    assert (found.verdict, found.num_nonzeros) == ("conforms", 48)
    assert found.num_negative_zeros > 0
    assert only([node("MatMul", ["x", "w"])], w=sparse(8, 12, axis=1, dtype=dtype)).conforming_axes == (1,)


def test_bf16_whose_low_byte_is_zero_is_not_zero() -> None:
    # 1.0 is 0x3f80 in bf16, 2.0 is 0x4000: polygraphy looks at the bytes in an interleaving of its own.
    weight = np.ones((8, 4), ml_dtypes.bfloat16) * ml_dtypes.bfloat16(2)
    assert only([node("MatMul", ["x", "w"])], w=weight).num_violations == 8


def test_values_kept_in_typed_fields() -> None:
    weight = sparse(8, 4, axis=0)
    typed = helper.make_tensor("w", TensorProto.FLOAT, [8, 4], weight.reshape(-1).tolist())
    assert only([node("MatMul", ["x", "w"])], w=typed).verdict == "conforms"
    half = helper.make_tensor("w", TensorProto.BFLOAT16, [8, 4], weight.reshape(-1).tolist())
    assert only([node("MatMul", ["x", "w"])], w=half).verdict == "conforms"


def test_constant_node() -> None:
    value = numpy_helper.from_array(sparse(8, 4, axis=0), "c")
    found = only([node("Constant", [], "c", value=value), node("MatMul", ["x", "c"])])
    assert (found.verdict, found.weight) == ("conforms", "c")


def test_shared_weight_on_two_axes_is_judged_for_each() -> None:
    nodes = [
        node("Gather", ["w", "ids"], "e"),
        node("MatMul", ["e", "w"], "a"),
        node("Gemm", ["a", "w"], "b", transB=1),
    ]
    first, second = entries(nodes, w=sparse(8, 8, axis=0))
    assert (first.axis, first.verdict, second.axis, second.verdict) == (0, "conforms", 1, "violates")
    assert "lies on axis 0, but K is axis 1" in second.reason


def test_gathered_embedding_is_not_a_matmul_weight() -> None:
    assert entries([node("Gather", ["w", "ids"], "e"), node("MatMul", ["e", "x"])], w=dense(8, 8)) == ()
    assert entries([node("Gather", ["w", "ids"], "e"), node("MatMul", ["x", "e"])], w=dense(8, 8)) == ()


def test_tied_head_is_judged_as_the_head_only() -> None:
    nodes = [node("Gather", ["w", "ids"], "e"), node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["e", "t"])]
    found = only(nodes, w=dense(12, 8))
    assert (found.op, found.axis, found.verdict) == ("MatMul", 1, "violates")


def test_experts_picked_at_run_time() -> None:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["k"])
    proto = model([node("Gather", ["w", "ids"], "e", axis=0), node("MatMul", ["x", "e"])], w=sparse(4, 8, 12, axis=1))
    unknown = check_pattern(proto).entries[0]
    assert (unknown.verdict, unknown.reason.split(";")[0]) == (
        "not checkable",
        "it is gathered with indices of unknown rank",
    )
    next(i for i in proto.graph.input if i.name == "ids").CopyFrom(ids)
    found = check_pattern(proto).entries[0]
    assert (found.verdict, found.axis) == ("conforms", 1)


def test_products_of_activations_have_no_weight() -> None:
    nodes = [node("Transpose", ["k"], "t", perm=[0, 2, 1]), node("MatMul", ["q", "t"])]
    assert entries(nodes) == ()
    assert not check_pattern(model(nodes)).conforms
    assert "no weight found" in check_pattern(model(nodes)).summary()


def test_products_of_constants_are_computed_for_who_takes_them() -> None:
    left = dense(8, 2)
    left[[2, 3, 5, 6]] = 0
    found = only([node("MatMul", ["a", "b"], "ab"), node("MatMul", ["x", "ab"])], a=left, b=dense(2, 12))
    assert (found.verdict, found.weight, found.shape, found.computed) == ("conforms", "a", (8, 12), ("MatMul",))
    assert found.reason == "computed by MatMul"


def test_rotary_frequencies_reduce_nothing() -> None:
    report = check_pattern(model([node("MatMul", ["freqs", "positions"])], freqs=dense(1, 8, 1)), expected_dense=[])
    assert report.conforms
    assert (report.entries[0].verdict, report.entries[0].reason) == ("left out", "K = 1: nothing is reduced")


def test_depthwise_convolution_reduces_nothing() -> None:
    found = only([node("Conv", ["x", "w"], group=8)], w=dense(8, 1, 3))
    assert (found.verdict, found.required) == ("left out", False)


# ---- the way from the stored tensor to its use


def test_transpose_chains_lead_back_to_the_stored_axis() -> None:
    # A three-cycle, where a permutation and its inverse differ.
    weight = sparse(12, 8, 5, axis=1)
    nodes = [node("Transpose", ["w"], "t", perm=[2, 0, 1]), node("Transpose", ["t"], "u", perm=[0, 2, 1])]
    found = only([*nodes, node("MatMul", ["x", "u"])], w=weight)
    assert (found.verdict, found.axis) == ("conforms", 1)
    for perm in ([1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0]):
        stored = perm[1]
        shape = [5, 5, 5]
        shape[stored] = 8
        chain = [node("Transpose", ["w"], "t", perm=perm), node("MatMul", ["x", "t"])]
        found = only(chain, w=sparse(*shape, axis=stored))
        assert (found.verdict, found.axis) == ("conforms", stored), perm


def test_transpose_without_perm_reverses_the_axes() -> None:
    found = only([node("Transpose", ["w"], "t"), node("MatMul", ["x", "t"])], w=sparse(12, 8, axis=1))
    assert (found.verdict, found.axis) == ("conforms", 1)
    found = only([node("Transpose", ["w"], "t"), node("MatMul", ["x", "t"])], w=sparse(5, 8, 3, axis=1))
    assert (found.verdict, found.axis) == ("conforms", 1)


def test_identity_and_cast() -> None:
    nodes = [
        node("Identity", ["w"], "i"),
        node("Cast", ["i"], "c", to=TensorProto.FLOAT),
        node("Transpose", ["c"], "t", perm=[1, 0]),
        node("Identity", ["t"], "j"),
        node("MatMul", ["x", "j"]),
    ]
    found = only(nodes, w=sparse(12, 8, axis=1, dtype=np.float16))
    assert (found.verdict, found.axis, found.weight, found.dtype) == ("conforms", 1, "w", "float16")


def test_squeeze_and_unsqueeze() -> None:
    nodes = [
        node("Unsqueeze", ["w", "axes"], "u"),
        node("Squeeze", ["u", "axes"], "s"),
        node("Unsqueeze", ["s", "axes"], "v"),
        node("MatMul", ["x", "v"]),
    ]
    found = only(nodes, w=sparse(8, 12, axis=0), axes=np.array([0], np.int64))
    assert (found.verdict, found.axis) == ("conforms", 0)
    added = only([node("Unsqueeze", ["w", "axes"], "u"), node("MatMul", ["u", "x"])], w=dense(8), axes=np.array([-1]))
    assert (added.verdict, added.required) == ("not checkable", False)


@pytest.mark.parametrize("op", ["Reshape", "Mul", "Add", "Concat", "Split", "Slice"])
def test_constants_that_other_operations_make_are_computed(op: str) -> None:
    """Each is right only if the operation is really applied: the stored tensor conforms where the result does not, or so."""
    weight = sparse(8, 12, axis=0)
    doubled = np.concatenate([weight, sparse(8, 12, axis=1)], axis=1)
    cases: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
        "Reshape": (weight.reshape(4, 24), {"o": np.array([8, 12])}, {}, "conforms"),
        "Mul": (dense(8, 12), {"o": (weight != 0).astype(np.float32)}, {}, "conforms"),
        "Add": (weight, {"o": dense(8, 12)}, {}, "violates"),
        "Concat": (weight[:6], {"o": weight[6:]}, {"axis": 0}, "conforms"),
        "Split": (doubled, {"o": np.array([12, 12])}, {"axis": 1}, "conforms"),
        "Slice": (doubled, {"o": np.array([0]), "p": np.array([12]), "q": np.array([1])}, {}, "conforms"),
    }
    stored, others, attributes, verdict = cases[op]
    making = helper.make_node(op, ["w", *others], ["r", "s"] if op == "Split" else ["r"], **attributes)
    found = only([making, node("MatMul", ["x", "r"])], w=stored, **others)
    assert (found.verdict, found.weight, found.axis, found.shape, found.computed) == (verdict, "w", 0, (8, 12), (op,))


def test_a_constant_that_cannot_be_computed_is_named() -> None:
    nodes = [node("Unpack", ["w"], "r", domain="my.domain"), node("MatMul", ["x", "r"])]
    report = check_pattern(model(nodes, w=sparse(8, 12, axis=0)))
    found = report.entries[0]
    assert (found.verdict, found.weight, report.conforms) == ("not checkable", "w", False)
    assert "passes through Unpack before its use, and that cannot be computed here" in found.reason


def test_reshape_to_a_computed_shape_is_named_too() -> None:
    nodes = [node("Shape", ["x"], "s"), node("Reshape", ["w", "s"], "r"), node("MatMul", ["x", "r"])]
    assert "passes through Reshape" in only(nodes, w=sparse(8, 12, axis=0)).reason


def test_conv_transpose_is_listed_and_decides_nothing() -> None:
    nodes = [node("ConvTranspose", ["x", "w"], "c"), node("MatMul", ["c", "v"])]
    report = check_pattern(model(nodes, w=dense(8, 8, 3), v=sparse(8, 4, axis=0)))
    assert report.conforms
    assert (report.entries[0].verdict, report.entries[0].required) == ("not checkable", False)


@pytest.mark.parametrize(("domain", "op", "index"), [("com.microsoft", "MoE", 2), ("com.microsoft.nchwc", "Conv", 1)])
def test_opaque_fused_operations_are_not_checkable(domain: str, op: str, index: int) -> None:
    inputs = ["x", "router", "w"][: index + 1]
    inputs[index] = "w"
    report = check_pattern(model([node(op, inputs, domain=domain)], w=sparse(8, 24, axis=0)))
    assert (report.entries[0].verdict, report.entries[0].op, report.conforms) == ("not checkable", op, False)


def test_initializers_that_are_also_graph_inputs() -> None:
    proto = model([node("MatMul", ["x", "w"])], w=sparse(8, 4, axis=0))
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 4]))
    assert check_pattern(proto).conforms


def test_sparse_initializers_are_not_overlooked() -> None:
    proto = model([node("MatMul", ["x", "w"])], w=sparse(8, 4, axis=0))
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [1], [0]), [8, 4])
    )
    del proto.graph.initializer[:]
    report = check_pattern(proto)
    assert (report.entries[0].verdict, report.conforms) == ("not checkable", False)
    assert "sparse initializer" in report.entries[0].reason


def test_subgraphs_and_outer_weights() -> None:
    then_branch = helper.make_graph(
        [node("MatMul", ["x", "w"], "a")], "then", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    else_branch = helper.make_graph(
        [node("MatMul", ["x", "v"], "b")],
        "else",
        [],
        [helper.make_tensor_value_info("b", 1, None)],
        [numpy_helper.from_array(dense(8, 4), "v")],
    )
    proto = model([node("If", ["c"], then_branch=then_branch, else_branch=else_branch)], w=sparse(8, 4, axis=0))
    proto.graph.input.append(helper.make_tensor_value_info("x", 1, None))
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.BOOL
    found = {e.weight: e.verdict for e in check_pattern(proto).entries}
    assert found == {"w": "conforms", "v": "violates"}


def test_local_functions_are_looked_into(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Linear",
        ["a", "b"],
        ["c"],
        [node("Transpose", ["b"], "t"), node("MatMul", ["a", "t"], "c")],
        OPSET[:1],
    )
    proto = model([helper.make_node("Linear", ["x", "w"], ["y"], "call", domain="local")], w=sparse(12, 8, axis=1))
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    memory = ir.from_proto(proto)
    for source in (proto, tmp_path / "m.onnx", memory):
        found = check_pattern(source).entries
        assert [(e.verdict, e.axis, e.weight) for e in found] == [("conforms", 1, "w")]
    assert memory.functions, "the caller's model is not changed"


def test_parameters_renamed_by_torch_onnx_are_known_by_their_own_name() -> None:
    scopes = "['', 'Model.layers', 'Model.layers.0', 'Model.layers.0.q_proj', 'linear']"
    taken = "%linear : [num_users=1] = call_function[target=aten.linear.default](args = (%mul, %p_{}), kwargs = {{}})"
    proto = model(
        [node("MatMul", ["x", "val_1"], "a"), node("MatMul", ["a", "val_2"], "b")], val_1=dense(8, 8), val_2=dense(8, 8)
    )
    for made, name in zip(proto.graph.node, ("weight", "slorb_weight"), strict=True):
        noted = {"name_scopes": scopes, "fx_node": taken.format(f"model_layers_0_q_proj_{name}")}
        made.metadata_props.extend(
            onnx.StringStringEntryProto(key=f"pkg.torch.onnx.{key}", value=value) for key, value in noted.items()
        )
    report = check_pattern(proto, expected_sparse=["Model.layers.0.q_proj.weight"])
    assert [e.parameter for e in report.entries] == [
        "Model.layers.0.q_proj.weight",
        "Model.layers.0.q_proj.slorb_weight",
    ]
    assert [e.verdict for e in report.entries] == ["violates", "left out"]
    assert "val_1 (Model.layers.0.q_proj.weight)" in str(report)


# ---- quantized weights


def quantized(weight: Any, zero: Any) -> Any:
    """Integers whose zeros are at the zero point."""
    return np.where(weight == 0, zero, np.asarray(zero) + 1 + (weight * 3).astype(np.int64)).astype(np.uint8)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("zero_point", [None, 0, 7, "per column"])
def test_int8_behind_dequantize(zero_point: Any, transposed: bool) -> None:
    weight = sparse(8, 12, axis=0)
    zero = np.arange(3, 15) if zero_point == "per column" else np.array(zero_point or 0)
    stored = quantized(weight, zero)
    scale = np.full(zero.shape, 0.1, np.float32)
    inputs = ["w", "s"] if zero_point is None else ["w", "s", "z"]
    weights = {"w": stored.T.copy() if transposed else stored, "s": scale, "z": zero.astype(np.uint8)}
    nodes = [node("Transpose", ["w"], "t", perm=[1, 0])] if transposed else []
    dequantize = node("DequantizeLinear", (["t"] if transposed else ["w"]) + inputs[1:], "d", axis=1)
    found = only([*nodes, dequantize, node("MatMul", ["x", "d"])], **weights)
    assert (found.verdict, found.axis, found.dtype) == ("conforms", int(transposed), "uint8")
    assert found.num_nonzeros == 48
    flipped = stored.copy()
    flipped[0, stored[0] == zero] += 1
    weights["w"] = flipped.T.copy() if transposed else flipped
    assert only([*nodes, dequantize, node("MatMul", ["x", "d"])], **weights).verdict == "violates"


def test_plain_zeros_are_not_zeros_where_the_zero_point_is_not_zero() -> None:
    nodes = [node("DequantizeLinear", ["w", "s", "z"], "d"), node("MatMul", ["x", "d"])]
    weights = {"s": np.float32(0.1), "z": np.array(5, np.uint8)}
    assert only(nodes, w=sparse(8, 4, axis=0, dtype=np.uint8) * 9, **weights).verdict == "violates"


@pytest.mark.parametrize("bits", [4, 8])
def test_blocked_dequantize(bits: int) -> None:
    zero = np.random.default_rng(3).integers(1, 6, (2, 12))
    stored = quantized(sparse(8, 12, axis=0), zero.repeat(4, axis=0)).astype(ml_dtypes.uint4 if bits == 4 else np.uint8)
    nodes = [node("DequantizeLinear", ["w", "s", "z"], "d", axis=0, block_size=4), node("MatMul", ["x", "d"])]
    weights = {"s": np.ones((2, 12), np.float32), "z": zero.astype(stored.dtype)}
    found = only(nodes, w=stored, **weights)
    assert (found.verdict, found.axis, found.dtype) == ("conforms", 0, f"uint{bits}")
    wrong = {**weights, "z": zero[::-1].astype(stored.dtype)}
    assert only(nodes, w=stored, **wrong).verdict == "violates"
    # The same behind a Transpose: zero points lie in the order of what is dequantized.
    turned = [node("Transpose", ["w"], "t", perm=[1, 0]), *nodes]
    turned[1].input[0] = "t"
    found = only(turned, w=stored.T.copy(), **weights)
    assert (found.verdict, found.axis) == ("conforms", 1)


def test_signed_int4() -> None:
    stored = (sparse(8, 12, axis=0) * -3).astype(ml_dtypes.int4)
    nodes = [node("DequantizeLinear", ["w", "s"], "d"), node("MatMul", ["x", "d"])]
    assert only(nodes, w=stored, s=np.float32(1)).verdict == "conforms"
    assert only(nodes, w=stored.T.copy(), s=np.float32(1)).verdict != "conforms"


def test_quantize_then_dequantize_keeps_zeros() -> None:
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z2"], "d"),
        node("MatMul", ["x", "d"]),
    ]
    weights = {"w": sparse(8, 12, axis=0), "s": np.float32(0.01), "z": np.array(9, np.uint8)}
    assert only(nodes, z2=weights["z"], **weights).verdict == "conforms"
    assert "quantized with one zero point" in only(nodes, z2=np.array(8, np.uint8), **weights).reason


def test_zero_point_computed_at_run_time() -> None:
    nodes = [node("DequantizeLinear", ["w", "s", "z"], "d"), node("MatMul", ["x", "d"])]
    found = only(nodes, w=np.zeros((8, 4), np.uint8), s=np.float32(1))
    assert (found.verdict, found.reason) == ("not checkable", "the zero point 'z' is not a constant")


@pytest.mark.parametrize(
    ("op", "inputs", "shape", "axis"),
    [
        ("MatMulInteger", ["x", "w", "", "z"], (8, 12), 0),
        ("QLinearMatMul", ["x", "xs", "xz", "w", "s", "z", "ys", "yz"], (8, 12), 0),
        ("ConvInteger", ["x", "w", "", "z"], (12, 8, 3), 1),
        ("QLinearConv", ["x", "xs", "xz", "w", "s", "z", "ys", "yz"], (12, 8, 3), 1),
    ],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_integer_products(op: str, inputs: list[str], shape: tuple[int, ...], axis: int, per_channel: bool) -> None:
    zero = np.arange(5, 17) if per_channel else np.array(6)
    spread = zero.reshape(-1, 1, 1) if per_channel and len(shape) == 3 else zero
    stored = quantized(sparse(*shape, axis=axis), spread)
    weights = {"w": stored, "s": np.float32(1), "z": zero.astype(np.uint8)}
    weights |= {"xs": np.float32(1), "xz": np.uint8(0), "ys": np.float32(1), "yz": np.uint8(0)}
    found = only([node(op, inputs)], **{k: np.asarray(v) for k, v in weights.items() if k in inputs})
    assert (found.verdict, found.axis) == ("conforms", axis)


@pytest.mark.parametrize("with_zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul_nbits(bits: int, with_zero_points: bool) -> None:
    num_out, num_in, block = 6, 32, 16
    rng = np.random.default_rng(0)
    points = rng.integers(1, 8, (num_out, 2)) if with_zero_points else np.full((num_out, 2), 1 << (bits - 1))
    values = np.where(sparse(num_out, num_in, axis=1) == 0, points.repeat(block, axis=1), 0).astype(np.uint8)

    def pack(unpacked: Any) -> Any:
        return unpacked if bits == 8 else (unpacked[..., ::2] | unpacked[..., 1::2] << 4)

    weights = {"w": pack(values.reshape(num_out, 2, block)), "s": np.ones((num_out, 2), np.float32)}
    inputs = ["x", "w", "s"]
    if with_zero_points:
        weights["z"] = pack(points.astype(np.uint8)).reshape(-1)
        inputs.append("z")
    attributes = {"K": num_in, "N": num_out, "bits": bits, "block_size": block}
    nodes = [node("MatMulNBits", inputs, domain="com.microsoft", **attributes)]
    found = only(nodes, **weights)
    assert (found.verdict, found.axis, found.shape) == ("conforms", 1, (num_out, num_in))
    weights["w"] = weights["w"] * 0
    assert only(nodes, **weights).verdict == "violates"


# ---- files


def save_external(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.int4, np.int8])
def test_external_data(dtype: Any, tmp_path: Path) -> None:
    weights = {"w": (sparse(8, 12, axis=0) * 3).astype(dtype), "v": (sparse(8, 12, axis=1) * 3).astype(dtype)}
    proto = model([node("MatMul", ["x", "w"], "a"), node("MatMul", ["x", "v"], "b")], **weights)
    path = save_external(proto, tmp_path)
    found = check_pattern(path).entries
    assert [(e.verdict, e.file) for e in found] == [("conforms", "model.onnx"), ("violates", "model.onnx")]
    assert [e.num_groups for e in found] == [24, 24]
    assert check_pattern(ir.load(path)).entries[1].conforming_axes == (1,)


def test_external_data_may_be_linked_as_in_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    path = save_external(model([node("MatMul", ["x", "w"])], w=sparse(8, 12, axis=0)), tmp_path / "blobs")
    for name in (path.name, "model.data"):
        os.symlink(tmp_path / "blobs" / name, snapshot / name)
    assert check_pattern(snapshot / "model.onnx").conforms
    assert check_pattern(snapshot).conforms


def test_graphs_that_share_a_data_file_are_both_checked(tmp_path: Path) -> None:
    proto = model([node("MatMul", ["x", "w"])], w=sparse(8, 12, axis=0))
    path = save_external(proto, tmp_path)
    path.rename(tmp_path / "decode.onnx")
    (tmp_path / "prefill.onnx").write_bytes((tmp_path / "decode.onnx").read_bytes())
    report = check_pattern(tmp_path)
    assert [e.file for e in report.entries] == ["decode.onnx", "prefill.onnx"]
    assert report.conforms


def test_damaged_files(tmp_path: Path) -> None:
    proto = model([node("MatMul", ["x", "w"])], w=sparse(8, 12, axis=0))
    path = save_external(proto, tmp_path)
    data = tmp_path / "model.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(SparsepassError, match=r"external data of weight 'w' is cut off: .* needs 384 from byte 0"):
        check_pattern(path)
    data.write_bytes(b"")
    with pytest.raises(SparsepassError, match="cannot be read"):
        check_pattern(path)
    data.unlink()
    with pytest.raises(SparsepassError, match="expected it beside the ONNX file"):
        check_pattern(path)
    with pytest.raises(SparsepassError, match="give the path of its file"):
        check_pattern(onnx.load(path, load_external_data=False))

    inline = proto.SerializeToString()
    for cut, text in ((len(inline) // 2, "truncated|cut-off"), (0, "holds no ONNX graph")):
        path.write_bytes(inline[:cut])
        with pytest.raises(SparsepassError, match=text):
            check_pattern(path)
    path.write_bytes(b"not protobuf at all")
    with pytest.raises(SparsepassError, match="cannot be read as an ONNX model"):
        check_pattern(path)

    short = numpy_helper.from_array(sparse(8, 12, axis=0), "w")
    short.raw_data = short.raw_data[:-8]
    onnx.save(model([node("MatMul", ["x", "w"])], w=short), path)
    with pytest.raises(SparsepassError, match=r"model\.onnx cannot be read .*'w' .* has 376 bytes and needs 384"):
        check_pattern(path)


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    path = save_external(model([node("MatMul", ["x", "w"])], w=sparse(8, 12, axis=0)), tmp_path)
    proto = onnx.load(path, load_external_data=False)
    next(e for e in proto.graph.initializer[0].external_data if e.key == "location").value = "../secret"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(SparsepassError, match="outside the model's folder"):
        check_pattern(path)


# ---- the independent checker


def polygraphy_says(path: Path) -> dict[str, bool]:
    command = [sys.executable, "-c", "from polygraphy.tools import main; main()", "inspect", "sparsity", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said = {}
    for line in (done.stdout + done.stderr).splitlines():
        for text, holds in (("Found sparse tensor: ", True), ("Found non-sparse tensor: ", False)):
            if text in line:
                said[line.split(text)[1].strip()] = holds
    return said


def test_agreement_with_polygraphy_on_float_weights(tmp_path: Path) -> None:
    nodes, weights = [], {}
    layouts: list[tuple[str, tuple[int, ...], int, dict[str, Any]]] = [
        ("MatMul", (8, 12), 0, {}),
        ("Gemm", (8, 12), 0, {}),
        ("Gemm", (12, 8), 1, {"transB": 1}),
        ("Conv", (4, 8, 3, 3), 1, {}),
        ("Conv", (4, 8, 1, 1), 1, {}),
    ]
    for number, (op, shape, axis, attributes) in enumerate(layouts):
        flipped = sparse(*shape, axis=axis)
        flipped[tuple(np.argwhere(flipped == 0)[0])] = 1
        negative = sparse(*shape, axis=axis)
        negative[negative == 0] = -0.0
        cases = {
            "right": sparse(*shape, axis=axis),
            "half": sparse(*shape, axis=axis, dtype=np.float16),
            "wrong": sparse(*shape, axis=0, seed=1) if axis else sparse(*shape, axis=1, seed=1),
            "flipped": flipped,
            "negative": negative,
            "dense": dense(*shape),
            "zero": np.zeros(shape, np.float32),
        }
        for case, weight in cases.items():
            name = f"{op}{number}_{case}"
            weights[name] = weight
            nodes.append(node(op, ["x", name], f"y_{name}", **attributes))
    turned = sparse(12, 8, axis=1)
    weights |= {"turned": turned, "turned_wrong": sparse(12, 8, axis=0)}
    for name in ("turned", "turned_wrong"):
        nodes += [node("Transpose", [name], f"t_{name}", perm=[1, 0]), node("MatMul", ["x", f"t_{name}"], f"y_{name}")]
    path = tmp_path / "m.onnx"
    onnx.save(model(nodes, **weights), path)

    ours = {e.weight: e.verdict == "conforms" for e in check_pattern(path).entries}

    assert ours == polygraphy_says(path)
    assert len(ours) == 37
    assert {name for name, holds in ours.items() if holds} == {
        name for name in ours if name.split("_")[-1] in ("right", "half", "negative", "zero", "turned")
    }


def test_agreement_with_polygraphy_on_an_export(tmp_path: Path) -> None:
    family = BY_NAME["llama"]
    result = export(family.model(), "onnx", tmp_path / "out", passes="nm_sparsify", validate=False, progress=False)
    path = result.folder / "model.onnx"
    ours = {entry.weight: entry.verdict == "conforms" for entry in check_pattern(path).entries}
    said = polygraphy_says(path)
    assert sum(ours.values()) == 14
    assert {name: said.get(name) for name in ours} == ours
