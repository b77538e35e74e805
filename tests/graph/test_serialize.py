import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.families import FAMILIES, captured
from torch import fx

from sparsepass.graph import CaptureError, ProgramFormatError, structure
from sparsepass.graph.records import (
    BranchState,
    PassRecord,
    SiteOutcome,
    SparseState,
    from_json,
    pass_record_from_json,
    sparse_state_from_json,
    to_json,
)
from sparsepass.graph.saved import check_tensor_name, graph_from_json, graph_to_json, module_stack

_aten = torch.ops.aten


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def line(node: fx.Node) -> str:
    return f"{node.format_node()} {module_stack(node)}"


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_graph_comes_back_as_it_was(name: str) -> None:
    graph = captured(name).graph_module.graph
    again = graph_from_json(through_json(graph_to_json(graph)))
    assert [line(node) for node in again.nodes] == [line(node) for node in graph.nodes]
    again.lint()


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5)
SPECIAL = st.sampled_from(
    [
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.strided,
        torch.preserve_format,
        torch.channels_last,
        torch.device("cpu"),
        torch.device("cuda:1"),
        slice(None, 3, 2),
        slice(1, None),
        math.inf,
        -math.inf,
        math.nan,
    ]
)
ARGUMENTS = st.recursive(SCALARS | SPECIAL, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner), max_leaves=8)


@settings(max_examples=100)
@given(value=ARGUMENTS)
def test_every_argument_comes_back_with_its_type(value: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(_aten.clone.default, (x, value), {"other": [x, value]})
    graph.output((node,))
    _, again, _ = graph_from_json(through_json(graph_to_json(graph))).nodes
    assert repr(again.args) == repr(node.args)
    assert repr(again.kwargs) == repr(node.kwargs)


def test_an_argument_that_cannot_be_written_is_refused() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(_aten.ones.default, ([2], {1, 2})),))  # type: ignore[arg-type]
    with pytest.raises(ProgramFormatError, match="node ones_default has an argument of type set, which cannot be saved"):
        graph_to_json(graph)


@pytest.mark.parametrize(
    "target", [print, torch.relu, torch.load, getattr, "numpy", torch.ops.profiler._record_function_enter.default]
)
def test_a_target_that_cannot_be_written_is_refused(target: Any) -> None:
    graph = fx.Graph()
    graph.output((graph.create_node("call_function" if callable(target) else "call_method", target, ()),))
    with pytest.raises(ProgramFormatError, match=r"which a saved program may not call; it can be used in memory"):
        graph_to_json(graph)


@pytest.mark.parametrize(
    "target",
    [
        "aten.add",
        "aten..default",
        "aten.add.Tensor.x",
        "aten.add.no_such",
        "add",
        "",
        "aten.__dict__.keys",
        "operator.call",
        "math.pow",
    ],
)
def test_a_name_that_is_no_operator_is_refused(target: str) -> None:
    document = {"nodes": [{"name": "a", "op": "call_function", "target": target}], "stacks": []}
    with pytest.raises(ProgramFormatError):
        graph_from_json(document)


@pytest.mark.parametrize("name", ["a.b.weight", "layers.0.w-1", "a b.c", "ünder.weight", "_0"])
def test_names_that_a_tensor_may_have(name: str) -> None:
    assert check_tensor_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "a..b", 'a"b', "a'b", "a\nb", "a\\b", "a{b}", None, 3])
def test_names_that_no_tensor_has(name: Any) -> None:
    with pytest.raises(ProgramFormatError, match="may not have a tensor named"):
        check_tensor_name(name)


@pytest.mark.parametrize(
    "state",
    [
        SparseState(pattern="2:4", axis=1, mask="a.mask"),
        SparseState(pattern="1:2", axis=0, mask=None, branch=BranchState(k=16, weight="a.slorb_weight", projection="a.x")),
    ],
)
def test_sparse_states_come_back(state: SparseState) -> None:
    assert sparse_state_from_json(through_json(to_json(state))) == state


def test_pass_records_come_back() -> None:
    record = PassRecord(
        text="nm_sparsify{pattern=2:4}",
        promise="approximate",
        outcomes=(
            SiteOutcome(site="a", weight="a.weight", shape=(4, 8), action="rewritten", facts={"relative_error": 0.25, "n": 3}),
            SiteOutcome(site="b", weight="", shape=(), action="skipped", reason="an embedding"),
        ),
        validation={"max_error": 0.5, "kl": None},
        calibration={"text": "a.txt", "num_tokens": 8},
        seconds=1.5,
    )
    assert pass_record_from_json(through_json(to_json(record))) == record
    assert (record.num_rewritten, record.num_skipped) == (1, 1)


def test_numbers_that_json_lacks_come_back() -> None:
    record = PassRecord(text="fold", promise="exact", outcomes=(), validation={"kl": math.inf, "each": [-math.inf, 1.0]})
    assert pass_record_from_json(through_json(to_json(record))) == record
    assert math.isnan(from_json(through_json(to_json({"loss": math.nan})))["loss"])


STRUCTURE = {
    "kind": "dict",
    "keys": ["a", "b"],
    "items": [{"kind": "tuple", "items": ["tensor", None]}, {"kind": "list", "items": ["tensor"]}],
}


def test_an_output_structure_names_and_builds() -> None:
    structure.check(STRUCTURE)
    assert structure.names(STRUCTURE) == ["a.0", "b.0"]
    x, y = torch.zeros(1), torch.ones(1)
    assert structure.build(STRUCTURE, [x, y]) == {"a": (x, None), "b": [y]}
    dropped = structure.without(STRUCTURE, [False, True])
    assert structure.names(dropped) == ["a.0"]
    assert structure.build(dropped, [x]) == {"a": (x, None), "b": [None]}


def test_the_output_classes_of_transformers_are_built() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    document = structure.describe(torch.utils._pytree.tree_structure(BaseModelOutput(last_hidden_state=torch.zeros(1))))
    assert document == {
        "kind": "transformers.modeling_outputs.BaseModelOutput",
        "keys": ["last_hidden_state"],
        "items": ["tensor"],
    }
    assert isinstance(structure.build(document, [torch.zeros(1)]), BaseModelOutput)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("os.system", "only build output classes of transformers, not os.system"),
        ("transformersx.modeling_outputs.BaseModelOutput", "only build output classes of transformers"),
        ("transformers.modeling_utils.PreTrainedModel", "is none"),
        ("transformers.modeling_outputs.NoSuchOutput", "which the installed transformers does not have"),
        ("transformers.modeling_no_such.Output", "which the installed transformers does not have"),
        ("transformers.modeling_outputs.torch", "is none"),
        ("transformers.testing_utils.Output", "only build output classes of transformers"),
        ("transformers.cli.serve.Output", "only build output classes of transformers"),
        ("None", "only build output classes of transformers"),
    ],
)
def test_other_classes_are_never_built(kind: str, message: str) -> None:
    with pytest.raises(ProgramFormatError, match=message):
        structure.check({"kind": "list", "items": [{"kind": kind, "keys": ["a"], "items": ["tensor"]}]})


@pytest.mark.parametrize("bad", [5, "tensors", [], {"kind": "tuple"}, {"kind": "dict", "items": ["tensor"]}])
def test_a_structure_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ProgramFormatError):
        structure.check(bad)


def test_an_unknown_container_is_refused() -> None:
    from collections import deque

    with pytest.raises(CaptureError, match=r"the model returns a collections\.deque.*wrap the model"):
        structure.describe(torch.utils._pytree.tree_structure(deque([torch.zeros(1)])))
