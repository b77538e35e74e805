"""Weights inside bodies of If, Loop and Scan and of local functions, rounding on the way, and packed weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepass.export.pattern import PatternEntry, check_pattern

OPSET = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def sparse(*shape: int, axis: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    """2:4 along `axis`, at random places, and hardly by chance along any other."""
    rng = np.random.default_rng(seed)
    values = np.moveaxis(rng.uniform(0.5, 2.0, shape), axis, -1)
    order = np.argsort(rng.random((*values.shape[:-1], values.shape[-1] // 4, 4)), axis=-1)
    values = values * (order < 2).reshape(values.shape)
    return np.moveaxis(values, -1, axis).astype(dtype).copy()


def info(name: str, shape: Sequence[int | None] | None = None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def make(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto], output: str, **weights: Any
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), [info(output)], tensors)
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


def entries(proto: onnx.ModelProto) -> dict[str, PatternEntry]:
    return {entry.weight: entry for entry in check_pattern(proto).entries}


# ---- bodies


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weights_that_a_scan_goes_through_layer_by_layer(axis: int) -> None:
    """Stacked layers, as jax writes them: the body sees one slice, and nothing in it names the stored tensor."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "layer"], ["h2"], "product")], "body", [info("h"), info("layer")], [info("h2")]
    )
    layers = np.stack([sparse(8, 8, axis=0, seed=i) for i in range(3)])
    scan = helper.make_node("Scan", ["x", "w"], ["y"], body=body, num_scan_inputs=1, scan_input_axes=[axis])
    stored = np.moveaxis(layers, 0, axis).copy()
    proto = make([scan], [info("x", [2, 8])], "y", w=stored)
    x = np.ones((2, 8), np.float32)
    expected = x @ layers[0] @ layers[1] @ layers[2]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5)

    found = entries(proto)["w"]
    assert (found.verdict, found.num_groups, found.axis) == ("conforms", 3 * 16, {0: 1, 1: 0, -1: 0}[axis])
    wrong = np.moveaxis(layers.swapaxes(1, 2), 0, axis).copy()
    assert entries(make([scan], [info("x", [2, 8])], "y", w=wrong))["w"].verdict == "violates"


def test_a_scanned_slice_that_is_changed_first_is_not_overlooked() -> None:
    nodes = [helper.make_node("Mul", ["layer", "two"], ["m"]), helper.make_node("MatMul", ["h", "m"], ["h2"])]
    body = helper.make_graph(nodes, "body", [info("h"), info("layer")], [info("h2")])
    scan = helper.make_node("Scan", ["x", "w"], ["y"], body=body, num_scan_inputs=1)
    found = entries(make([scan], [info("x", [2, 8])], "y", w=sparse(3, 8, 8, axis=1), two=np.array([2], np.float32)))
    assert found["w"].verdict == "not checkable"
    assert "passes through Mul" in found["w"].reason


def loop(body_nodes: Sequence[onnx.NodeProto], handed_on: str) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "v"], ["h2"], "product"), *body_nodes],
        "body",
        [info("i", [], TensorProto.INT64), info("go", [], TensorProto.BOOL), info("h"), info("v")],
        [info("go", [], TensorProto.BOOL), info("h2"), info(handed_on)],
    )
    node = helper.make_node("Loop", ["n", "", "x", "w"], ["y", "w_out"], body=body)
    return make([node], [info("x", [2, 8])], "y", w=sparse(8, 8, axis=0), n=np.array(3, np.int64))


def test_a_weight_that_a_loop_carries_unchanged() -> None:
    found = entries(loop([helper.make_node("Identity", ["v"], ["v2"])], "v2"))
    assert (found["w"].verdict, found["w"].axis) == ("conforms", 0)


def test_a_carried_value_that_changes_is_an_activation() -> None:
    assert entries(loop([helper.make_node("Add", ["v", "h"], ["v2"])], "v2")) == {}


def test_a_weight_that_an_if_picks_is_not_overlooked() -> None:
    def branch(name: str, weight: Any) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(weight, name))
        return helper.make_graph([constant], name, [], [info(name)])

    pick = helper.make_node(
        "If", ["c"], ["w"], then_branch=branch("a", sparse(8, 8, axis=0)), else_branch=branch("b", sparse(8, 8, axis=1))
    )
    proto = make([pick, helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x"), info("c", [], TensorProto.BOOL)], "y")
    found = entries(proto)["w"]
    assert (found.verdict, found.reason) == (
        "not checkable",
        "an If picks the weight at run time; export the model without it",
    )


def test_initializers_of_a_body_within_a_body() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "deep"], ["a"])],
        "inner",
        [],
        [info("a")],
        [numpy_helper.from_array(sparse(8, 4, axis=0), "deep")],
    )
    other = helper.make_graph([helper.make_node("MatMul", ["x", "outer"], ["b"])], "other", [], [info("b")])
    both = {"then_branch": inner, "else_branch": other}
    middle = helper.make_graph([helper.make_node("If", ["c"], ["m"], **both)], "middle", [], [info("m")])
    plain = helper.make_graph([helper.make_node("Identity", ["x"], ["p"])], "plain", [], [info("p")])
    top = helper.make_node("If", ["c"], ["y"], then_branch=middle, else_branch=plain)
    proto = make([top], [info("x"), info("c", [], TensorProto.BOOL)], "y", outer=sparse(8, 4, axis=1))
    assert {name: entry.verdict for name, entry in entries(proto).items()} == {"deep": "conforms", "outer": "violates"}


@pytest.mark.parametrize("flipped", [0, 1])
def test_functions_that_call_functions_with_attributes(flipped: int) -> None:
    """The inner function's transB is a reference to an attribute of the call; the weight of one call is inside it."""
    gemm = helper.make_node("Gemm", ["a", "b"], ["c"])
    gemm.attribute.append(onnx.AttributeProto(name="transB", ref_attr_name="flipped", type=onnx.AttributeProto.INT))
    inner = helper.make_function("local", "Inner", ["a", "b"], ["c"], [gemm], OPSET[:1], attributes=["flipped"])
    held = numpy_helper.from_array(sparse(8, 8, axis=0), "held")
    outer = helper.make_function(
        "local",
        "Outer",
        ["a", "b"],
        ["d"],
        [
            helper.make_node("Inner", ["a", "b"], ["c"], domain="local", flipped=flipped),
            helper.make_node("Constant", [], ["k"], value=held),
            helper.make_node("MatMul", ["c", "k"], ["d"]),
        ],
        [*OPSET[:1], helper.make_opsetid("local", 1)],
    )
    proto = make([helper.make_node("Outer", ["x", "w"], ["y"], domain="local")], [info("x")], "y", w=sparse(8, 8, axis=flipped))
    proto.functions.extend([inner, outer])
    proto.opset_import.append(helper.make_opsetid("local", 1))
    found = check_pattern(proto).entries
    assert [(entry.axis, entry.verdict) for entry in found] == [(flipped, "conforms"), (0, "conforms")]


# ---- rounding


def test_values_that_a_cast_rounds_to_zero_are_zero_in_the_product() -> None:
    weight = sparse(8, 12, axis=0)
    weight[weight == 0] = 1e-12
    half = [
        helper.make_node("Cast", ["w"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["x", "t"], ["y"], transB=1),
    ]
    found = entries(make(half, [info("x")], "y", w=weight))["w"]
    assert (found.verdict, found.reason) == ("conforms", "48 stored values become zero on the way to the product")
    wide = [helper.make_node("Cast", ["w"], ["h"], to=TensorProto.DOUBLE), helper.make_node("MatMul", ["x", "h"], ["y"])]
    assert entries(make(wide, [info("x")], "y", w=weight))["w"].verdict == "violates"


def test_values_that_quantization_rounds_to_zero_are_zero_in_the_product() -> None:
    weight = sparse(8, 12, axis=0)
    weight[weight == 0] = 0.01
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    found = entries(make(nodes, [info("x")], "y", w=weight, s=np.float32(0.1), z=np.array(5, np.uint8)))["w"]
    assert found.verdict == "conforms"
    fine = entries(make(nodes, [info("x")], "y", w=weight, s=np.float32(0.001), z=np.array(5, np.uint8)))["w"]
    assert fine.verdict == "violates"


# ---- fused attention


def test_projections_of_fused_attention_are_checked() -> None:
    for op, inputs, index in (("Attention", ["x", "w", "b"], 1), ("DecoderAttention", ["q", "k", "w", "v"], 2)):
        node = helper.make_node(op, inputs, ["y"], "attention", domain="com.microsoft", num_heads=2)
        weights = {"w": sparse(8, 24, axis=0), "b": np.ones(24, np.float32), "v": sparse(8, 16, axis=1)}
        given = {name: value for name, value in weights.items() if name in inputs}
        free = [info(name) for name in inputs if name not in given]
        found = entries(make([node], free, "y", **given))
        assert (found["w"].verdict, found["w"].axis, inputs[index]) == ("conforms", 0, "w")
        assert "b" not in found, "a bias is no weight"
        if "v" in given:
            assert found["v"].reason.startswith("2:4 lies on axis 1, but K is axis 0")


def test_quantized_attention_has_a_zero_point_for_each_column() -> None:
    zero = np.arange(1, 25).astype(np.uint8)
    weight = sparse(8, 24, axis=0)
    stored = np.where(weight == 0, zero, zero + 1 + (weight * 3).astype(np.uint8)).astype(np.uint8)
    inputs = ["x", "w", "b", "xs", "ws", "", "xz", "z"]
    node = helper.make_node("QAttention", inputs, ["y"], domain="com.microsoft", num_heads=2)
    weights = {"w": stored, "ws": np.ones(24, np.float32), "z": zero, "b": np.ones(24, np.float32)}
    weights |= {"xs": np.float32(1), "xz": np.array(0, np.uint8)}
    assert entries(make([node], [info("x")], "y", **weights))["w"].verdict == "conforms"
    assert entries(make([node], [info("x")], "y", **(weights | {"z": zero[::-1].copy()})))["w"].verdict == "violates"


# ---- packed weights, as onnxruntime itself unpacks them


@pytest.mark.parametrize("kind", [0, 1])
def test_matmul_bnb4_against_onnxruntime(kind: int) -> None:
    """What onnxruntime multiplies by (read out with a unit matrix) is zero exactly where the check sees a zero."""
    num_out, num_in = 6, 32
    rng = np.random.default_rng(kind)
    packed = rng.integers(0, 256, num_out * num_in // 2).astype(np.uint8)
    attributes: dict[str, Any] = {"K": num_in, "N": num_out, "block_size": 16, "quant_type": kind}
    node = helper.make_node("MatMulBnb4", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    proto = make([node], [info("x", [None, num_in])], "y", w=packed, s=np.ones(num_out * num_in // 16, np.float32))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    weight = session.run(None, {"x": np.eye(num_in, dtype=np.float32)})[0].T

    found = entries(proto)["w"]
    assert found.num_nonzeros == np.count_nonzero(weight)
    groups = np.count_nonzero(weight.reshape(num_out, -1, 4), axis=-1)
    assert (found.shape, found.num_violations) == ((num_out, num_in), int(np.count_nonzero(groups > 2)))
    codes = np.where(sparse(num_out, num_in, axis=1) == 0, 7 if kind else 8, 1).astype(np.uint8).reshape(-1)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(codes[::2] << 4 | codes[1::2], "w"))
    assert entries(proto)["w"].verdict == "conforms"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_points", [False, True])
def test_matmul_nbits_against_onnxruntime(bits: int, has_points: bool) -> None:
    num_out, num_in, block = 5, 64, 32
    rng = np.random.default_rng(bits)
    per_byte = 8 // bits
    values = rng.integers(0, 1 << bits, (num_out, 2, block)).astype(np.uint8)
    points = rng.integers(0, 1 << bits, (num_out, 2)).astype(np.uint8) if has_points else np.full((num_out, 2), 1 << (bits - 1))
    # Half of the values are at the zero point.
    values = np.where(rng.random(values.shape) < 0.5, points[..., None], values).astype(np.uint8)

    def pack(unpacked: Any) -> Any:
        return unpacked if per_byte == 1 else unpacked[..., ::2] | unpacked[..., 1::2] << 4

    weights = {"w": pack(values), "s": np.ones((num_out, 2), np.float32)}
    if has_points:
        weights["z"] = pack(points.astype(np.uint8)).reshape(-1)
    attributes: dict[str, Any] = {"K": num_in, "N": num_out, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **attributes)
    proto = make([node], [info("x", [None, num_in])], "y", **weights)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    weight = np.round(session.run(None, {"x": np.eye(num_in, dtype=np.float32)})[0].T, 3)

    found = entries(proto)["w"]
    groups = np.count_nonzero(weight.reshape(num_out, -1, 4), axis=-1)
    assert found.num_nonzeros == np.count_nonzero(weight)
    assert found.num_violations == np.count_nonzero(groups > 2) > 0
