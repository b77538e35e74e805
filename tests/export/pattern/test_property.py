"""The checker against a slow reference, over random graphs.

The reference knows nothing of axes, zero points or names: onnx's reference evaluator computes the operand that enters
the product, the product itself is run on it to learn the matrix that is really multiplied (a unit vector for each k),
and groups are counted along K in plain Python.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsepass.export.pattern.check import check_pattern

OPSET = [helper.make_opsetid("", 21)]
HELD = ("initializer", "Constant node", "external")
STEPS = (
    *("Transpose", "TransposePerm", "Identity", "Cast", "Qdq", "Unsqueeze", "Squeeze"),
    *("Reshape", "Mul", "Slice", "Concat"),
)


@dataclass
class Chain:
    """A weight on its way to a product, made backwards: `value` is what a step has to yield, `inverse` what is stored."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    current: str = ""

    def name(self) -> str:
        return f"v{len(self.nodes)}_{len(self.tensors)}"

    def step(self, op: str, *others: Any, **attributes: Any) -> None:
        inputs = [self.current]
        for other in others:
            inputs.append(self.name())
            self.tensors[inputs[-1]] = other
        output = self.name()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        self.current = output


def value_of(chain: Chain) -> Any:
    if not chain.nodes:
        return chain.tensors[chain.current]
    info = [helper.make_value_info(name, onnx.TypeProto()) for name in chain.tensors]
    graph = helper.make_graph(chain.nodes, "chain", info, [helper.make_value_info(chain.current, onnx.TypeProto())])
    found = ReferenceEvaluator(helper.make_model(graph, opset_imports=OPSET, ir_version=10)).run(None, dict(chain.tensors))
    return next(iter(found))


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """A stored weight of random shape, type and sparsity, and up to four steps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(2, 3))
    shape = [draw(st.sampled_from([4, 8, 12, 6, 1])) if draw(st.booleans()) else 8 for _ in range(rank)]
    values = rng.uniform(0.5, 2.0, shape) * rng.choice([-1, 1], shape)
    axis = draw(st.integers(0, rank - 1))
    if draw(st.booleans()) and shape[axis] % 4 == 0:
        moved = np.moveaxis(values, axis, -1)
        keep = rng.random((*moved.shape[:-1], shape[axis] // 4, 4)).argsort(-1) < 2
        values = np.moveaxis(moved * keep.reshape(moved.shape), -1, axis)
    if draw(st.booleans()):
        values = np.where(rng.random(shape) < 0.1, rng.choice([0.0, -0.0, 1.0, 1e-9]), values)
    chain = Chain(current="w")
    kind = draw(st.sampled_from(["float32", "float16", "bfloat16", "int8", "uint8", "int4", "uint4", "blocked"]))
    if kind in ("float32", "float16"):
        chain.tensors["w"] = values.astype(kind)
    elif kind == "bfloat16":
        chain.tensors["w"] = values.astype(ml_dtypes.bfloat16)
        chain.step("Cast", to=TensorProto.FLOAT)
    else:
        _quantize(draw, chain, values, kind, rng)
    for _ in range(draw(st.integers(0, 4))):
        _extend(draw, chain, rng)
    return chain


def _quantize(draw: st.DrawFn, chain: Chain, values: Any, kind: str, rng: np.random.Generator) -> None:
    """Integers whose zero lies at a zero point that is one, per channel, or per block, and a DequantizeLinear."""
    stored_as = {"int8": np.int8, "uint8": np.uint8, "blocked": np.uint8, "int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}[
        kind
    ]
    axis = draw(st.integers(0, values.ndim - 1))
    low, high = (-3, 3) if kind.startswith("int") else (3, 6)
    block = 4 if kind == "blocked" and values.shape[axis] % 4 == 0 else 0
    shape: list[int] = []
    if block:
        shape = [size // block if i == axis else size for i, size in enumerate(values.shape)]
    elif draw(st.booleans()):
        shape = [values.shape[axis]]
    zero = rng.integers(low, high, shape)
    spread = zero
    if block:
        spread = zero.repeat(block, axis=axis)
    elif shape:
        spread = zero.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    away = np.sign(values) * np.maximum(np.abs(np.round(values)), 1) * (np.abs(values) > 1e-6)
    stored = (spread + away).astype(stored_as)
    order = draw(st.permutations(range(values.ndim)))
    chain.tensors["w"] = stored.transpose(order).copy()
    if list(order) != sorted(order):
        # Stored in another order than it is dequantized in: zero points lie along the axes of the latter.
        chain.step("Transpose", perm=[int(i) for i in np.argsort(order)])
    # A zero point that is left out is zero, whatever the integers were made with: the reference decides.
    others = [np.full(shape, 0.1, np.float32), *([zero.astype(stored_as)] if draw(st.booleans()) else [])]
    chain.step("DequantizeLinear", *others, axis=axis, **({"block_size": block} if block else {}))


def _extend(draw: st.DrawFn, chain: Chain, rng: np.random.Generator) -> None:
    value = value_of(chain)
    op = draw(st.sampled_from(STEPS))
    if op == "Transpose":
        chain.step("Transpose")
    elif op == "TransposePerm":
        chain.step("Transpose", perm=draw(st.permutations(range(value.ndim))))
    elif op == "Cast":
        chain.step("Cast", to=draw(st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE])))
    elif op == "Qdq":
        if value.dtype != np.float32:
            chain.step("Cast", to=TensorProto.FLOAT)
        scale, zero = np.float32(draw(st.sampled_from([0.5, 0.02]))), np.array(draw(st.integers(-4, 4)), np.int8)
        chain.step("QuantizeLinear", scale, zero)
        chain.step("DequantizeLinear", scale, zero)
    elif op == "Unsqueeze" and value.ndim < 4:
        chain.step("Unsqueeze", np.array([draw(st.integers(0, value.ndim))]))
    elif op == "Squeeze" and value.ndim > 2 and 1 in value.shape:
        chain.step("Squeeze", np.array([value.shape.index(1)]))
    elif op == "Reshape" and value.ndim == 3:
        chain.step("Reshape", np.array([value.shape[0] * value.shape[1], value.shape[2]]))
    elif op == "Mul":
        chain.step("Mul", (rng.random(value.shape) < 0.7).astype(value.dtype))
    elif op == "Slice" and value.shape[0] >= 4:
        chain.step("Slice", np.array([0]), np.array([value.shape[0] // 2]), np.array([0]))
    elif op == "Concat":
        chain.step("Concat", value.copy(), axis=draw(st.integers(0, value.ndim - 1)))
    else:
        chain.step("Identity")


def multiplied(op: str, weight: Any, attributes: dict[str, Any]) -> Any:
    """The matrices [..., K, N] that a product multiplies by, told by running it on unit vectors alone."""
    weight = np.asarray(weight, np.float64)
    if op == "Conv":  # [out, in, ...]: one matrix for each place of the kernel
        return np.moveaxis(weight, (1, 0), (-2, -1))
    sizes = {weight.shape[-1], weight.shape[-2]}
    for num_in in sorted(sizes):
        x = np.eye(num_in)
        inputs = {"x": x, "w": weight}
        names = ["x", "w"]
        if op == "left":
            names = ["w", "x"]
        node = helper.make_node("Gemm" if op == "Gemm" else "MatMul", names, ["y"], **attributes)
        info = [helper.make_value_info(name, onnx.TypeProto()) for name in names]
        graph = helper.make_graph([node], "product", info, [helper.make_value_info("y", onnx.TypeProto())])
        model = helper.make_model(graph, opset_imports=OPSET, ir_version=10)
        try:
            found = np.asarray(next(iter(ReferenceEvaluator(model).run(None, inputs))))
        except (TypeError, ValueError, RuntimeError):
            continue
        return found.swapaxes(-1, -2) if op == "left" else found
    raise AssertionError("one of the two sizes is K")


def num_bad_groups(matrices: Any) -> int:
    """Groups of four along K with more than two nonzeros, in plain Python."""
    bad = 0
    for matrix in matrices.reshape(-1, *matrices.shape[-2:]):
        for column in matrix.T:
            for start in range(0, len(column), 4):
                bad += sum(1 for value in column[start : start + 4] if value != 0) > 2
    return bad


def build(chain: Chain, op: str, attributes: dict[str, Any], held: str) -> onnx.ModelProto:
    names = ["w_in", "x"] if op == "left" else ["x", "w_in"]
    node = helper.make_node(op if op in ("Gemm", "Conv") else "MatMul", names, ["y"], "product", **attributes)
    nodes = [*chain.nodes, helper.make_node("Identity", [chain.current], ["w_in"]), node]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in chain.tensors.items()]
    if held == "Constant node":
        constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
        nodes, tensors = [*constants, *nodes], []
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], tensors), opset_imports=OPSET, ir_version=10)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    chain=chains(),
    product=st.sampled_from(["MatMul", "left", "Gemm", "Conv"]),
    flipped=st.booleans(),
    held=st.sampled_from(HELD),
)
def test_the_checker_agrees_with_the_matrix_that_is_multiplied(
    chain: Chain, product: str, flipped: bool, held: str, tmp_path: Path
) -> None:
    weight = value_of(chain)
    if (product == "Gemm" and weight.ndim != 2) or (product == "Conv" and weight.ndim < 3):
        product = "MatMul"
    attributes = {"transB": int(flipped)} if product == "Gemm" else {}
    model = build(chain, product, attributes, held)
    source: Any = model
    if held == "external":
        source = tmp_path / "model.onnx"
        (tmp_path / "model.data").unlink(missing_ok=True)
        onnx.save(model, source, save_as_external_data=True, location="model.data", size_threshold=0)

    matrices = multiplied(product, weight, attributes)
    report = check_pattern(source)

    assert len(report.entries) == 1, str(report)
    entry = report.entries[0]
    num_in = matrices.shape[-2]
    if num_in == 1:
        assert not entry.required
    elif entry.verdict == "not checkable":
        # The one thing that is given up on, with its reason.
        assert "zero points of a gathered, scanned or squeezed" in entry.reason
    elif num_in % 4:
        assert entry.verdict == "not eligible"
    else:
        expected = num_bad_groups(matrices)
        assert entry.verdict == ("violates" if expected else "conforms"), str(report)
        if entry.verdict == "violates" and not chain_rounds(chain):
            assert entry.num_violations * matrices.size == expected * entry.num_groups * 4, "the same share of the groups"


def chain_rounds(chain: Chain) -> bool:
    return any(node.op_type in ("Cast", "QuantizeLinear") for node in chain.nodes)


def test_the_property_can_fail() -> None:
    """A checker that ignored Transpose would be caught: the reference tells the two axes apart."""
    weight = np.zeros((8, 8), np.float32)
    weight[:2] = 1.0
    assert num_bad_groups(multiplied("MatMul", weight, {})) == 0
    assert num_bad_groups(multiplied("MatMul", weight.T, {})) == 4
    assert num_bad_groups(multiplied("Gemm", weight.T, {"transB": 1})) == 0
    assert num_bad_groups(multiplied("left", weight.T, {})) == 0
    with pytest.raises(AssertionError):
        assert check_pattern(build(Chain(tensors={"w": weight.T}, current="w"), "MatMul", {}, "initializer")).conforms
