"""Beyond the sizes that a program holds for, its ONNX file fails in words; and picks among equal values are told."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from sparsepass.export.targets.onnx import lower_onnx, open_session, verify_onnx
from sparsepass.export.targets.onnx.guards import add_guards
from sparsepass.export.targets.onnx.session import run_session
from sparsepass.export.targets.onnx.ties import tie_in
from sparsepass.graph import SparsepassError, capture
from sparsepass.graph.limits.sizes import holds
from sparsepass.passes import apply_passes


def identity() -> ir.Model:
    """A graph of two inputs, of which one is no number."""
    kinds = {"x": ir.DataType.FLOAT, "mask": ir.DataType.BOOL}
    values = {name: ir.Value(name=name, shape=ir.Shape(["b", "t"]), type=ir.TensorType(kind)) for name, kind in kinds.items()}
    nodes = [ir.node("Neg", [values["x"]]), ir.node("Not", [values["mask"]])]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"output_{number}"
    nodes[0].outputs[0].type, nodes[1].outputs[0].type = values["x"].type, values["mask"].type
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(list(values.values()), outputs, nodes=nodes, opset_imports={"": 20}, name="identity")
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    "limits",
    [
        ["x[1] <= 8"],
        ["x[1] > 3", "x[1] < 7"],
        ["x[1] % 4 == 0 or x[1] == 6"],
        ["x[1] // 2 != 3 and not x[1] == 2"],
        ["max(x[1], 5) - 2 * x[0] >= 2"],
        ["-x[1] <= -3"],
        ["x[1] == mask[1]"],
    ],
)
def test_a_graph_with_guards_runs_where_the_limits_hold_and_nowhere_else(limits: list[str], tmp_path: Path) -> None:
    model = identity()
    assert add_guards(model, limits) == ()
    ir.save(model, tmp_path / "guarded.onnx")
    session = open_session(tmp_path / "guarded.onnx")
    for batch in (1, 2):
        for length in range(1, 13):
            given: dict[str, Any] = {"x": np.ones((batch, length), np.float32), "mask": np.ones((batch, 6), np.bool_)}
            sizes: Mapping[str, Sequence[int]] = {name: array.shape for name, array in given.items()}
            if all(holds(limit, sizes) for limit in limits):
                assert np.array_equal(run_session(session, given)["output_0"], -given["x"])
            else:
                with pytest.raises(SparsepassError, match="this graph holds only for"):
                    run_session(session, given)


def test_divisions_by_a_size_are_left_out_and_named() -> None:
    model = identity()
    assert add_guards(model, ["8 % x[1] == 0", "x[2] / 2 == 4"]) == ("8 % x[1] == 0", "x[2] / 2 == 4")
    assert len(model.graph) == 2
    assert not model.graph.initializers


class Branching(nn.Module):
    """Computes something else for more than 8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * 2 if x.shape[1] > 8 else self.layer(x)


@pytest.mark.parametrize(("length", "right", "wrong"), [(8, 3, 9), (12, 9, 8)])
def test_the_file_refuses_lengths_that_its_program_refuses(length: int, right: int, wrong: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branching()
    program = capture(model, torch.randn(2, length, 4))
    artifact = lower_onnx(program, tmp_path)
    assert "it fails at other sizes" in artifact.notes[-1]
    assert verify_onnx(program, tmp_path, artifact)["holds"]
    session = open_session(tmp_path / "model.onnx")
    x = torch.randn(2, right, 4)
    assert np.allclose(run_session(session, {"x": x.numpy()})["output"], model(x).detach().numpy(), atol=1e-6)
    with pytest.raises(SparsepassError, match=r"this graph holds only for x\[1\]"):
        run_session(session, {"x": np.zeros((2, wrong, 4), np.float32)})


class Choosing(nn.Module):
    """Keeps the rows whose score is largest; a score depends on the token alone, a row on its place, too."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places, self.score = nn.Embedding(64, 8), nn.Embedding(64, 8), score

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.tokens(input_ids)
        kept = self.score(rows).topk(3, dim=1).indices
        return torch.gather(rows + self.places.weight[: rows.shape[1]], 1, kept[..., None].expand(-1, -1, 8))


@pytest.mark.parametrize(("ids", "tied"), [([[3, 4, 5, 6, 7]], False), ([[3, 4, 4, 4, 4]], True)])
def test_ties_are_found_where_a_model_picks(ids: list[list[int]], tied: bool) -> None:
    program = capture(Choosing(lambda rows: rows.sum(-1)), torch.arange(3, 13).reshape(2, 5))
    said = tie_in(program, {"input_ids": torch.tensor(ids * 2)})
    assert (said is not None) is tied
    assert "some of which are equal" in (said or "some of which are equal")


def test_tokens_that_come_twice_are_among_the_cases_of_a_model_that_picks(tmp_path: Path) -> None:
    program = capture(Choosing(lambda rows: rows.sum(-1)), torch.arange(3, 63).reshape(2, 30))
    found = verify_onnx(program, tmp_path, lower_onnx(program, tmp_path))
    cases = {case["case"]: case for case in found["outputs"]["cases"]}
    assert cases["example inputs: output"]["holds"]
    assert not cases["tokens that come twice: output"]["holds"]
    assert "some of which are equal" in cases["tokens that come twice: output"]["reason"]


def test_a_model_that_picks_by_chance_on_long_inputs_is_exported_for_short_ones(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    program = apply_passes(
        capture(hf.DogeForCausalLM(hf.DogeConfig(**settings, **heads, keep_window_size=8)).eval()), "nm_sparsify"
    )
    assert "input_ids[1] >= 9" in program.limits
    artifact = lower_onnx(program, tmp_path)
    found = verify_onnx(program, tmp_path, artifact)
    assert found["holds"]
    assert found["pattern"]["model.onnx"]["num_sparse"] == len(program.sparse) > 0
    assert any("keeps the largest of values some of which are equal" in note for note in artifact.notes)
    session, model = open_session(tmp_path / "model.onnx"), program.to_model()
    for length in (1, 5, 8):
        ids = torch.full((2, length), 7)
        got = run_session(session, {"input_ids": ids.numpy(), "attention_mask": np.ones((2, length), np.int64)})["logits"]
        assert np.allclose(got, model(ids).logits.detach().numpy(), atol=1e-5)
    with pytest.raises(SparsepassError, match=r"this graph holds only for input_ids\[1\] <= 8"):
        run_session(session, {"input_ids": np.full((2, 9), 7), "attention_mask": np.ones((2, 9), np.int64)})
