"""The four states of each weight, and what follows from them: told apart, never merged, never guessed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from sparsepass.export.pattern import PatternEntry, check_pattern
from sparsepass.export.targets.evidence import LayerEvidence, counts
from sparsepass.export.targets.tensorrt.evidence import Around, Observed, gather, obstacle, surroundings
from sparsepass.export.targets.tensorrt.log import InspectedLayer, SparsityLog, TacticTimes, Told

ENTRY = PatternEntry(
    file="model.onnx",
    node="node_linear",
    op="MatMul",
    weight="w",
    parameter="",
    shape=(64, 32),
    dtype="float16",
    axis=0,
    pattern="2:4",
    verdict="conforms",
    required=True,
)
SEEN = Observed(engine="decode", runtime="tensorrt", sparse=True, on_gpu=True, log=SparsityLog(), inspected={})


def named(*names: str) -> Told:
    return Told(count=len(names), names=frozenset(names))


def judged(entry: PatternEntry = ENTRY, around: Around | None = None, **seen: Any) -> LayerEvidence:
    (found,) = gather([entry], {(entry.node, entry.weight): around or Around()}, replace(SEEN, **seen))
    return found


def states(found: LayerEvidence) -> tuple[str, ...]:
    return found.conforms, found.flag_requested, found.eligible, found.chosen, found.ran_sparse


def test_chosen_by_the_log() -> None:
    log = SparsityLog(eligible=named("node_linear", "other"), chosen=named("node_linear"))
    found = judged(log=log)
    assert states(found) == ("yes", "yes", "yes", "yes", "yes")
    assert found.reason == "the builder took a sparse tactic"


def test_found_39_chose_0() -> None:
    log = SparsityLog(eligible=Told(count=39, names=None), chosen=Told(count=0, names=frozenset()))
    found = judged(log=log)
    assert states(found) == ("yes", "yes", "unknown", "no", "no")
    assert found.reason.startswith("dense tactic faster")


def test_numbers_without_names_leave_it_open() -> None:
    log = SparsityLog(eligible=Told(count=39, names=None), chosen=Told(count=7, names=None))
    found = judged(log=log)
    assert states(found) == ("yes", "yes", "unknown", "unknown", "unknown")
    assert found.reason == "the log says that 7 of 39 layers run sparse, and not which"


def test_numbers_that_are_equal_tell_of_all_that_are_eligible() -> None:
    log = SparsityLog(eligible=named("node_linear", "other"), chosen=Told(count=2, names=None))
    assert states(judged(log=log)) == ("yes", "yes", "yes", "yes", "yes")
    assert judged(replace(ENTRY, node="third"), log=log).chosen == "no"


def test_times_tell_by_how_much_dense_was_faster() -> None:
    log = SparsityLog(
        eligible=named("node_linear"), chosen=named(), timings={"node_linear": TacticTimes(dense_ms=0.012, sparse_ms=0.02)}
    )
    found = judged(log=log)
    assert states(found) == ("yes", "yes", "yes", "no", "no")
    assert found.reason == "dense tactic faster: 0.012 ms against 0.02 ms"
    assert (found.dense_ms, found.sparse_ms) == (0.012, 0.02)


def test_no_kernel_on_this_target() -> None:
    log = SparsityLog(eligible=named("node_linear"), chosen=named(), timings={"node_linear": TacticTimes(dense_ms=0.012)})
    assert judged(log=log).reason.startswith("no kernel on this target")


def test_the_inspector_has_the_last_word() -> None:
    log = SparsityLog(eligible=named("node_linear"), chosen=named())
    found = judged(log=log, inspected={"node_linear": InspectedLayer(tactic="sm80_xmma_sparse_gemm", sparse=True)})
    assert states(found)[3:] == ("yes", "yes")
    assert found.reason == "the builder took a sparse tactic (sm80_xmma_sparse_gemm)"
    found = judged(log=log, inspected={"node_linear": InspectedLayer(tactic="", sparse=None)})
    assert found.chosen == "no", "an inspector that does not tell leaves it to the log"


def test_without_the_flag_nothing_runs_sparse() -> None:
    found = judged(sparse=False)
    assert states(found) == ("yes", "no", "unknown", "unknown", "no")
    assert found.reason == "the engine was built without the sparsity flag"


def test_without_a_gpu_it_is_unknown() -> None:
    found = judged(on_gpu=False, runtime="tensorrt-rtx")
    assert states(found) == ("yes", "yes", "unknown", "unknown", "unknown")
    assert found.reason.startswith("no GPU here: tensorrt-rtx built ahead of time")


def test_a_log_that_is_silent_leaves_it_open() -> None:
    assert judged().reason == "neither the log nor the engine inspector tells"


def test_a_weight_on_the_wrong_axis() -> None:
    entry = replace(ENTRY, verdict="violates", reason="dense", conforming_axes=(1,))
    found = judged(entry, log=SparsityLog(eligible=named(), chosen=named()))
    assert states(found) == ("no", "yes", "no", "no", "no")
    assert found.reason == "axis: the stored weight is 2:4 along axis 1, and the product sums over axis 0"
    assert obstacle(replace(entry, conforming_axes=()), Around()) == "pattern: dense"


def test_a_weight_that_is_dense_on_purpose() -> None:
    found = judged(replace(ENTRY, verdict="left out"))
    assert (found.conforms, found.ran_sparse, found.reason) == ("unknown", "no", "dense on purpose")


@pytest.mark.parametrize(
    ("entry", "around", "said"),
    [
        (replace(ENTRY, dtype="float"), Around(), "dtype: float32"),
        (replace(ENTRY, dtype="int4"), Around(), "dtype: int4"),
        (replace(ENTRY, shape=(30, 32)), Around(), "shape rule: 30 inputs are no multiple of 4"),
        (ENTRY, Around(plugin="MyMatMul of com.me"), "plugin: the weight goes into MyMatMul of com.me"),
        (ENTRY, Around(between=("Transpose",)), "Transpose in between"),
        (ENTRY, Around(between=("DequantizeLinear",)), ""),
        (replace(ENTRY, dtype="bfloat16"), Around(), ""),
    ],
)
def test_rules(entry: PatternEntry, around: Around, said: str) -> None:
    found = obstacle(entry, around)
    assert found.startswith(said)
    assert bool(found) == bool(said)
    if said:
        assert states(judged(entry, around)) == ("yes", "yes", "no", "unknown", "no")


def test_quantize_nodes_in_between() -> None:
    entry, around = replace(ENTRY, dtype="int8"), Around(between=("DequantizeLinear",), is_requantized=False)
    log = SparsityLog(eligible=named("node_linear"), chosen=named())
    assert judged(entry, around, log=log).reason.startswith("quantize nodes in between: the product is not quantized again")
    requantized = replace(around, is_requantized=True)
    assert "DequantizeLinear between the weight" in judged(entry, requantized, log=log).reason


def test_counts_are_kept_apart() -> None:
    layers = [
        judged(log=SparsityLog(eligible=named("node_linear"), chosen=named("node_linear"))),
        judged(replace(ENTRY, node="b"), log=SparsityLog(eligible=named("b"), chosen=named())),
        judged(replace(ENTRY, node="c", verdict="left out")),
    ]
    found = counts(layers)
    assert found["total"]["eligible"] == {"yes": 2, "no": 0, "unknown": 0}
    assert found["engines"]["decode"]["chosen"] == {"yes": 1, "no": 1, "unknown": 0}
    assert found["total"]["ran_sparse"] == {"yes": 1, "no": 1, "unknown": 0}


def test_what_stands_around_a_weight_is_read_from_the_graph(tmp_path: Path) -> None:
    weight = np.zeros((8, 4), np.float32)
    weight[::2] = 1
    tensors = [
        numpy_helper.from_array(weight, "plain"),
        numpy_helper.from_array(weight.T.copy(), "turned"),
        numpy_helper.from_array(weight.astype(np.int8), "whole"),
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "plain"], ["a"], "direct"),
        helper.make_node("Transpose", ["turned"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["b"], "behind"),
        helper.make_node("Mine", ["x", "plain"], ["c"], "own", domain="com.me"),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], "dq"),
        helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["wd"], "dqw"),
        helper.make_node("MatMul", ["xd", "wd"], ["d"], "quantized"),
        helper.make_node("Sum", ["a", "b", "c", "d"], ["y"], "sum"),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 8]), ("y", [2, 4]))]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.me", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], tensors), opset_imports=opsets)
    save(model, tmp_path / "model.onnx")
    found = surroundings(tmp_path / "model.onnx")
    assert found["direct", "plain"] == Around()
    assert found["behind", "turned"] == Around(between=("Transpose",))
    assert found["own", "plain"] == Around(plugin="Mine of com.me")
    assert found["quantized", "whole"] == Around(between=("DequantizeLinear",), is_requantized=False)
    entries = {entry.node: entry for entry in check_pattern(tmp_path / "model.onnx").entries}
    assert obstacle(entries["behind"], found["behind", "turned"]) != ""
