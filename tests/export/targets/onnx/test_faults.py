"""What must be caught: a file that was tampered with, and requests that cannot be met. And the options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import sparsepass.export.targets.onnx.lower as target
from sparsepass.export.targets.onnx import OnnxArtifact, generate_greedy, lower_onnx, open_session, verify_onnx
from sparsepass.export.targets.onnx.session import run_session
from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.passes import apply_passes

FILE = "model.onnx"


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def sparse_mlp() -> Program:
    return apply_passes(mlp(), ["nm_sparsify", "slorb{k=4}"], example_inputs=torch.randn(2, 5, 16), validate=False)


class OwnLlama(hf.LlamaForCausalLM):
    """A class that transformers does not know."""


def one_layer(kind: Any = hf.LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return kind(config).eval()


def changed(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite one initializer of the file."""
    model = ir.load(folder / FILE)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy().copy())), name=name)
    ir.save(model, folder / FILE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path, OnnxArtifact]:
    program, folder = sparse_mlp(), tmp_path_factory.mktemp("mlp")
    return program, folder, lower_onnx(program, folder)


@pytest.fixture
def copy_of(written: tuple[Program, Path, OnnxArtifact], tmp_path: Path) -> tuple[Program, Path, OnnxArtifact]:
    program, folder, artifact = written
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    return program, tmp_path, artifact


def test_the_untouched_file_holds(copy_of: tuple[Program, Path, OnnxArtifact]) -> None:
    program, folder, artifact = copy_of
    (stored,) = artifact.weights["0.weight"]
    assert (stored.op, stored.axis, stored.initializer) == ("MatMul", 0, "0.weight")
    assert verify_onnx(program, folder, artifact)["holds"]


def test_sparse_along_the_wrong_axis_is_caught(copy_of: tuple[Program, Path, OnnxArtifact]) -> None:
    program, folder, artifact = copy_of
    changed(folder, "0.weight", lambda stored: stored.T)  # square: the shape still fits
    found = verify_onnx(program, folder, artifact)
    assert not found["holds"]
    (failure,) = found["pattern"][FILE]["failures"]
    assert (failure["weight"], failure["verdict"], failure["conforming_axes"]) == ("0.weight", "violates", [1])


def test_a_flipped_mask_entry_is_caught(copy_of: tuple[Program, Path, OnnxArtifact]) -> None:
    """The file still is 2:4, only with another weight kept."""
    program, folder, artifact = copy_of
    dense = program.tensor("0.weight").detach().numpy().T

    def flip(stored: Any) -> Any:
        kept, dropped = np.flatnonzero(stored[:4, 0])[0], np.flatnonzero(stored[:4, 0] == 0)[0]
        stored[kept, 0], stored[dropped, 0] = 0.0, dense[dropped, 0]
        return stored

    changed(folder, "0.weight", flip)
    found = verify_onnx(program, folder, artifact)
    assert found["pattern"][FILE]["conforms"]
    assert found["weights"]["differing"] == ["0.weight"]
    assert not any(case["holds"] for case in found["outputs"]["cases"])
    assert not found["holds"]


def test_a_dropped_branch_is_caught(copy_of: tuple[Program, Path, OnnxArtifact]) -> None:
    program, folder, artifact = copy_of
    model = ir.load(folder / FILE)
    branch = next(u.node for u in model.graph.initializers["0.slorb_weight"].uses()).outputs[0]
    (add,) = branch.consumers()
    kept = next(value for value in add.inputs if value is not branch)
    assert kept is not None
    ir.convenience.replace_all_uses_with(add.outputs[0], kept)
    model.graph.remove(add, safe=True)
    ir.save(model, folder / FILE)
    found = verify_onnx(program, folder, artifact)
    assert found["pattern"][FILE]["conforms"]
    assert not any(case["holds"] for case in found["outputs"]["cases"])
    assert not found["holds"]


def test_a_permuted_input_channel_is_caught(copy_of: tuple[Program, Path, OnnxArtifact]) -> None:
    """Whole groups of four change places, so that the file still is 2:4."""
    program, folder, artifact = copy_of
    changed(folder, "2.weight", lambda stored: stored[[4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)]])
    found = verify_onnx(program, folder, artifact)
    assert found["pattern"][FILE]["conforms"]
    assert found["weights"]["differing"] == ["2.weight"]
    assert not any(case["holds"] for case in found["outputs"]["cases"])
    assert not found["holds"]


def test_a_file_that_does_not_run_does_not_hold(copy_of: tuple[Program, Path, OnnxArtifact]) -> None:
    program, folder, artifact = copy_of
    changed(folder, "2.bias", lambda stored: np.zeros(7, np.float32))
    found = verify_onnx(program, folder, artifact)
    assert "onnxruntime" in found["outputs"]["not_run"]
    assert not found["holds"]


def test_rounding_is_told_from_mistakes(tmp_path: Path) -> None:
    """Where float32 itself is far from float64, being as near as the program is counts; being wrong does not."""
    program = capture(one_layer())
    artifact = lower_onnx(program, tmp_path)
    found = verify_onnx(program, tmp_path, artifact, tolerance=1e-12)
    assert found["holds"], found["outputs"]
    assert {"program", "file"} == set(found["outputs"]["cases"][0]["against_float64"])
    changed(tmp_path, "model.norm.weight", lambda stored: stored * 1.001)
    assert not any(case["holds"] for case in verify_onnx(program, tmp_path, artifact)["outputs"]["cases"])


# ---- options


def test_a_large_model_has_its_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "EXTERNAL_DATA_BYTES", 1000)
    program = sparse_mlp()
    artifact = lower_onnx(program, tmp_path)
    assert set(artifact.files) == {FILE, f"{FILE}.data"}
    assert artifact.files[f"{FILE}.data"] >= 16 * 16 * 4
    assert verify_onnx(program, tmp_path, artifact)["holds"]


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_operator_sets(tmp_path: Path, opset: int) -> None:
    program = sparse_mlp()
    artifact = lower_onnx(program, tmp_path, opset=opset)
    assert ir.load(tmp_path / FILE).opset_imports[""] == opset
    assert verify_onnx(program, tmp_path, artifact)["holds"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_the_pattern(tmp_path: Path, dtype: str) -> None:
    model = one_layer()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0].mul_(-1e-9)  # underflows in float16, to -0.0 in part
    program = apply_passes(model, ["nm_sparsify", "slorb{k=16}"], validate=False)
    artifact = lower_onnx(program, tmp_path, dtype=dtype)
    found = verify_onnx(program, tmp_path, artifact)
    assert found["holds"], found
    assert found["pattern"][FILE]["num_negative_zeros"] == 0
    assert found["weights"]["num_converted"] > len(program.sparse)
    types = {v.dtype for v in artifact.graphs[0].inputs if v.name.startswith("past")}
    assert types == {dtype}
    assert found["outputs"]["cases"], "a bfloat16 file is run, too: as a copy in float32"
    assert found["outputs"]["not_run"] is None
    inverse = ir.load(tmp_path / FILE).graph.initializers["model.rotary_emb.inv_freq"]
    assert inverse.dtype == ir.DataType.FLOAT  # positions lose precision otherwise


def test_a_plain_graph_of_a_model_that_generates(tmp_path: Path) -> None:
    """Asked for by its task, or because the class is not known to transformers."""
    program = apply_passes(one_layer(OwnLlama), "nm_sparsify", validate=False)
    artifact = lower_onnx(program, tmp_path)
    assert artifact.kind == "forward"
    assert "not known to transformers" in artifact.notes[0]
    assert [v.name for v in artifact.graphs[0].inputs] == ["input_ids", "attention_mask"]
    assert verify_onnx(program, tmp_path, artifact)["holds"]
    with pytest.raises(SparsepassError, match="no key-value cache"):
        generate_greedy(tmp_path, torch.ones(1, 2), 1)
    with pytest.raises(SparsepassError, match="cannot be written: the model's class"):
        lower_onnx(program, tmp_path, with_past=True)


def test_the_program_is_not_changed(tmp_path: Path) -> None:
    program = sparse_mlp()
    before = {name: t.clone() for name, t in program.tensors().items()}
    code = program.graph_module.code
    lower_onnx(program, tmp_path)
    assert program.graph_module.code == code
    assert set(before) == set(program.tensors())
    assert all(torch.equal(t, before[name]) for name, t in program.tensors().items())


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"opset": 11}, "opset 11 is not supported: torch.onnx writes 18 to"),
        ({"opset": 99}, "opset 99 is not supported"),
        ({"dtype": "float64"}, "not supported by the onnx target"),
        ({"dtype": "int4"}, "dtype int4 is not understood"),
        ({"dtype": "float16"}, "convert the module before capturing it"),
        ({"task": "text-generatoin"}, "did you mean text-generation"),
        ({"task": "feature-extraction", "with_past": True}, "drop one of them"),
        ({"task": "text-generation-with-past", "with_past": False}, "drop one of them"),
        ({"with_past": True}, "this module does not generate"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    program = capture(mlp(), torch.randn(2, 16))
    with pytest.raises(SparsepassError, match=says):
        lower_onnx(program, tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="is no folder; create it first"):
        lower_onnx(capture(mlp(), torch.randn(2, 16)), tmp_path / "nowhere")


def test_a_program_without_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(8, 4)
    program = capture(model, torch.empty(2, 8, device="meta"))
    with pytest.raises(SparsepassError, match="captured without weights; fill it"):
        lower_onnx(program, tmp_path)


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = one_layer()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(SparsepassError, match=r"lm_head.weight holds values up to 1e\+06.*use bfloat16 or float32"):
        lower_onnx(capture(model), tmp_path, dtype="float16")


def test_activations_that_overflow_in_float16_are_told(tmp_path: Path) -> None:
    """onnxruntime's CPU kernels compute in float32, where nothing overflows."""
    model = one_layer()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e3)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e5).clamp_(-6e4, 6e4)
    program = capture(model)
    found = verify_onnx(program, tmp_path, lower_onnx(program, tmp_path, dtype="float16"))
    assert not found["holds"]
    (case,) = [case for case in found["outputs"]["cases"] if not case["holds"]]
    assert case["case"] == "float16 arithmetic: logits"
    assert case["reason"].startswith("activations overflow in float16")


def test_a_damaged_bfloat16_file_does_not_hold(tmp_path: Path) -> None:
    model = one_layer()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(100)
    program = capture(model)
    artifact = lower_onnx(program, tmp_path, dtype="bfloat16")
    graph = onnx.load(tmp_path / FILE)
    for node in graph.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "Neg"
    onnx.save(graph, tmp_path / FILE)
    found = verify_onnx(program, tmp_path, artifact)
    assert not found["weights"]["differing"]
    assert not found["holds"]


class WithEig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(self.linear(x)[:, :, None] * x[:, None, :])  # type: ignore[no-any-return]


def test_an_operation_that_onnx_does_not_have(tmp_path: Path) -> None:
    program = capture(WithEig(), torch.randn(2, 4))
    with pytest.raises(SparsepassError, match="the model graph cannot be lowered to ONNX"):
        lower_onnx(program, tmp_path)


def test_what_is_no_graph_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="is no file"):
        open_session(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(SparsepassError, match="onnxruntime cannot run"):
        open_session(tmp_path / FILE)
    with pytest.raises(SparsepassError, match="expected prompts of shape"):
        generate_greedy(tmp_path, torch.ones(3), 1)
    with pytest.raises(SparsepassError, match="pad on the left"):
        generate_greedy(tmp_path, torch.ones(1, 2), 1, attention_mask=torch.tensor([[1, 0]]))
    with pytest.raises(SparsepassError, match="no record of an ONNX export"):
        OnnxArtifact.from_dict({"kind": "forward"})


class Watching(nn.Module):
    """A layer whose values reach no output: nothing reads them, or their shape alone is read."""

    def __init__(self, watch: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.used, self.watch = nn.Linear(16, 16), nn.Linear(16, 8), watch

    def forward(self, x: Tensor) -> Tensor:
        return self.watch(torch.relu(self.used(x)), self.seen(x))


@pytest.mark.parametrize("watch", [lambda used, _: used, lambda used, seen: used * seen.new_ones(8)], ids=["dead", "shape"])
def test_a_sparse_weight_that_reaches_no_output_is_told(watch: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    program = apply_passes(Watching(watch), ["nm_sparsify{criterion=magnitude}"], example_inputs=torch.randn(2, 16))
    artifact = lower_onnx(program, tmp_path)
    assert artifact.notes == ("not in the graph, because no output depends on their values: seen.weight",)
    assert set(artifact.weights) & {"seen.weight", "used.weight"} == {"used.weight"}
    assert verify_onnx(program, tmp_path, artifact)["holds"]


class Normed(nn.Module):
    """A layer, and a norm of its results: of nothing but zeros, too."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(8, 8, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * self.norm(y)  # type: ignore[no-any-return]


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "root, 1e-8": lambda y: torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-8),
    "root, 1e-12": lambda y: torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-12),
    "sum, 1e-20": lambda y: 1.0 / (y.abs().sum(-1, keepdim=True) + 1e-20),
    "difference, 1e-9": lambda y: 1.0 / (-y.abs().sum(-1, keepdim=True) - 1e-9),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_small_epsilon_is_no_zero(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    x[1, 0] = 0.0
    program = capture(Normed(NORMS[name]), x)
    assert verify_onnx(program, tmp_path, lower_onnx(program, tmp_path))["holds"]


class Splitting(nn.Module):
    """Splits what is three times as long as its input."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.cat([x, 2 * x, x.square()], 1).split(x.shape[1], 1)
        return first * third + second


def test_parts_of_a_computed_size(tmp_path: Path) -> None:
    program = capture(Splitting(), torch.randn(2, 5, 8))
    assert verify_onnx(program, tmp_path, lower_onnx(program, tmp_path))["holds"]
    session, x = open_session(tmp_path / FILE), torch.randn(3, 9, 8)
    assert np.allclose(run_session(session, {"x": x.numpy()})["output"], Splitting()(x).numpy(), atol=1e-6)
