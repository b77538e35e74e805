"""Equivalence: figures against a slow reference, what must hold, what must be caught, and what must be refused."""

import ast
import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers as hf
from onnx import TensorProto, helper, numpy_helper
from tests.families import BY_NAME
from torch import Tensor, nn

from sparsepass.graph.capture.exporter import capture
from sparsepass.graph.equivalence import differences as difference_module
from sparsepass.graph.equivalence.artifact import Step, layer_results
from sparsepass.graph.equivalence.comparison import assert_equivalent, compare
from sparsepass.graph.equivalence.differences import difference
from sparsepass.graph.equivalence.running import run
from sparsepass.graph.program import Program
from sparsepass.graph.rewrite import attach_branch, attach_mask, finish, fold_mask
from sparsepass.graph.sites import Site
from sparsepass.graph.support.errors import EquivalenceError
from sparsepass.passes.maths.pattern import NMPattern, nm_mask

_ROOT = Path(__file__).parents[3]
_UP, _DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
_Q, _O = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"


# What the figures mean


def test_figures_against_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(difference_module, "_CHUNK", 7)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    a = {"logits": torch.randn(3, 4, 5, generator=generator), "state": torch.randn(9, generator=generator)}
    b = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in a.items()}
    found = difference(a, b)
    x, y = torch.cat([t.double().flatten() for t in a.values()]), torch.cat([t.double().flatten() for t in b.values()])
    assert found.max_error == float((x - y).abs().max())
    assert math.isclose(found.mean_error, float((x - y).abs().mean()), rel_tol=1e-12)
    assert math.isclose(found.relative_error, float((x - y).norm() / x.norm()), rel_tol=1e-12)
    p, q = a["logits"].double().softmax(-1), b["logits"].double().softmax(-1)
    assert found.kl is not None
    assert math.isclose(found.kl, float((p * (p / q).log()).sum(-1).mean()), rel_tol=1e-9)
    assert found.outputs["state"].kl is None
    assert not found.exact
    assert set(found.to_dict()["outputs"]) == {"logits", "state"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool])
def test_equal_tensors_differ_by_nothing(dtype: torch.dtype) -> None:
    t = (torch.arange(12).reshape(3, 4) % 3).to(dtype)
    found = difference({"logits": t}, {"logits": t.clone()})
    assert (found.max_error, found.mean_error, found.relative_error) == (0, 0, 0)
    assert found.kl == (0 if dtype.is_floating_point else None)
    assert found.exact


def test_infinities_and_nan() -> None:
    inf, nan = torch.inf, torch.nan
    same = difference({"logits": torch.tensor([0.0, -inf])}, {"logits": torch.tensor([0.0, -inf])})
    assert same.exact
    assert same.kl == 0
    for reference, candidate in [(0.0, inf), (nan, 0.0), (0.0, nan), (inf, -inf)]:
        found = difference({"logits": torch.tensor([1.0, reference])}, {"logits": torch.tensor([1.0, candidate])})
        assert found.max_error == found.relative_error == inf
    both = difference({"x": torch.tensor([nan, 1.0])}, {"x": torch.tensor([nan, 1.0])})
    assert both.max_error == 0
    assert both.num_nan == 1
    assert not both.exact
    for unknown in ([inf, 1.0], [-inf, -inf], [inf, nan]):
        found = difference({"x": torch.tensor(unknown)}, {"x": torch.tensor(unknown)})
        assert (found.max_error, found.exact) == (0, False)
        assert "on both sides, so nothing is known of them" in found.unknown
    assert difference({"x": torch.zeros(2)}, {"x": torch.ones(2)}).relative_error == inf
    assert difference({"x": torch.zeros(0, 3)}, {"x": torch.zeros(0, 3)}).exact


@pytest.mark.parametrize(
    ("reference", "candidate", "said"),
    [
        ({}, {}, "no outputs"),
        ({"a": torch.ones(1)}, {}, r"lacks the outputs \['a'\]"),
        ({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, r"reference lacks, \['b'\]"),
        ({"a": torch.ones(2, 3)}, {"a": torch.ones(3, 2)}, r"expected \(2, 3\), got \(3, 2\)"),
    ],
)
def test_outputs_that_cannot_be_compared(reference: dict[str, Tensor], candidate: dict[str, Tensor], said: str) -> None:
    with pytest.raises(EquivalenceError, match=said):
        difference(reference, candidate)


# What must hold, and what must be caught, on one tiny llama and its ONNX file


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tiny llama, its program, sparse programs made from it, and an ONNX file of the last."""

    model: nn.Module
    inputs: dict[str, Tensor]
    program: Program
    masked: Program
    sparse: Program
    file: Path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = hf.LlamaForCausalLM(config)
    model.eval()
    program = capture(model, {"input_ids": _ids(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)})
    masked = _masked(program)
    sparse = _branched(masked)
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    _export(sparse, file)
    inputs = {"input_ids": _ids(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    return Prepared(model=model, inputs=inputs, program=program, masked=masked, sparse=sparse, file=file)


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def _site(program: Program, name: str) -> Site:
    return next(site for site in program.sites() if site.name == name)


def _masked(program: Program, *, wrong_axis: str = "") -> Program:
    changed = copy.deepcopy(program)
    for site in program.sites():
        if site.left_alone is not None:
            continue
        score = site.to_matrix(changed.tensor(site.weight).detach()).abs()
        turned = site.name == wrong_axis
        mask = nm_mask(score.t() if turned else score, NMPattern(2, 4))
        mask = mask.t() if turned else mask
        attach_mask(changed, site, site.from_matrix(mask), "2:4")
    finish(changed)
    return changed


def _branched(program: Program, *, but: str = "", trainable: bool = False) -> Program:
    changed = copy.deepcopy(program)
    for name in (_UP, _DOWN):
        if name != but:
            site = _site(changed, name)
            weight = torch.randn(site.out_features, site.in_features // 8, generator=torch.Generator().manual_seed(1))
            projection = torch.eye(site.in_features // 8).repeat_interleave(8, 1) if trainable else None
            attach_branch(changed, site, 0.02 * weight, 8, projection)
    finish(changed)
    return changed


def _export(program: Program, file: Path) -> None:
    folded = copy.deepcopy(program)
    for weight in folded.sparse:
        fold_mask(folded, weight)
    finish(folded)
    axes = tuple(dict.fromkeys(folded.dynamic_axes[name], torch.export.Dim.DYNAMIC) for name in folded.input_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            folded.graph_module, tuple(folded.example_inputs.values()), file, dynamo=True, verbose=False,
            external_data=True, dynamic_shapes=axes, input_names=list(folded.input_names),
            output_names=list(folded.output_names),
        )  # fmt: skip


def test_model_equals_its_program(prepared: Prepared) -> None:
    found = compare(prepared.model, prepared.program, prepared.inputs)
    assert found.max_error == 0
    assert found.kl == 0
    assert found.first_divergence is None
    names = [layer.name for layer in found.layers]
    assert len(names) == 9
    assert names[:2] == ["model.embed_tokens", _Q]
    assert names[-1] == "lm_head"
    assert all(layer.max_error == 0 for layer in found.layers)
    assert_equivalent(prepared.model, prepared.program, prepared.inputs, exact=True)


def test_program_equals_its_saved_copy(prepared: Prepared, tmp_path: Path) -> None:
    prepared.sparse.save(tmp_path / "saved")
    found = compare(prepared.sparse, tmp_path / "saved", prepared.inputs)
    assert_equivalent(prepared.sparse, str(tmp_path / "saved"), prepared.inputs, exact=True)
    assert_equivalent(prepared.sparse, tmp_path / "saved" / "program.json", prepared.inputs, exact=True)
    assert len(found.layers) == 9


@pytest.mark.parametrize("trainable", [True, False])
def test_program_equals_its_hierarchy(prepared: Prepared, trainable: bool) -> None:
    program = _branched(prepared.masked, trainable=trainable)
    found = compare(program, program.hierarchy(), prepared.inputs)
    assert found.outputs.exact
    assert all(layer.max_error == 0 for layer in found.layers)
    assert {_UP, _DOWN} < {layer.name for layer in found.layers}


def test_program_equals_to_model(prepared: Prepared) -> None:
    assert_equivalent(prepared.masked, prepared.masked.to_model(), prepared.inputs, exact=True)
    found = compare(prepared.sparse, prepared.sparse.to_model(), prepared.inputs)
    assert not found.failures()
    assert found.first_divergence is None
    assert {_UP, _DOWN} < {layer.name for layer in found.layers}


def test_program_equals_its_onnx_file(prepared: Prepared) -> None:
    found = compare(prepared.sparse, prepared.file, prepared.inputs)
    assert not found.failures(max_kl=1e-9)
    assert 0 < found.max_error < 1e-5
    assert found.first_divergence is None
    assert len(found.layers) == 9
    assert max(layer.relative_error for layer in found.layers) < 1e-6
    assert_equivalent(prepared.file.parent, prepared.sparse, prepared.inputs)  # the folder, and the other way round
    assert_equivalent(prepared.file, prepared.file, prepared.inputs, exact=True)


def _flipped(good: Prepared) -> tuple[Program, str]:
    bad = copy.deepcopy(good.sparse)
    mask = bad.tensor(f"{_UP}.mask").clone()
    entry = mask[5].nonzero()[0]
    mask[5, entry] = False
    bad.set_tensor(f"{_UP}.mask", mask)
    return bad, _UP


def _branch_dropped(good: Prepared) -> tuple[Program, str]:
    return _branched(good.masked, but=_DOWN), _DOWN


def _channels_permuted(good: Prepared) -> tuple[Program, str]:
    bad = copy.deepcopy(good.sparse)
    order = torch.arange(32)
    order[[2, 9]] = order[[9, 2]]
    bad.set_tensor(f"{_Q}.weight", bad.tensor(f"{_Q}.weight").detach()[:, order])
    bad.set_tensor(f"{_Q}.mask", bad.tensor(f"{_Q}.mask")[:, order])
    return bad, _Q


def _wrong_axis(good: Prepared) -> tuple[Program, str]:
    return _branched(_masked(good.program, wrong_axis=_O)), _O


@pytest.mark.parametrize("plant", [_flipped, _branch_dropped, _channels_permuted, _wrong_axis])
@pytest.mark.parametrize("against", ["program", "onnx"])
def test_planted_faults_are_caught(prepared: Prepared, plant: Callable[[Prepared], tuple[Program, str]], against: str) -> None:
    reference = prepared.sparse if against == "program" else prepared.file
    bad, layer = plant(prepared)
    assert compare(reference, bad, prepared.inputs).first_divergence == layer
    with pytest.raises(EquivalenceError, match=f"first layer at which they part: {layer}") as raised:
        assert_equivalent(reference, bad, prepared.inputs)
    assert "exceeds rtol 1e-05 (the default for float32)" in str(raised.value)
    assert "look next at" in str(raised.value)
    if plant is _branch_dropped and against == "program":
        assert "SLoRB branch model.layers.0.mlp.down_proj.slorb_weight, k=8" in str(raised.value)
        assert "no SLoRB branch" in str(raised.value)


def test_fault_in_the_onnx_file_is_caught(prepared: Prepared, tmp_path: Path) -> None:
    model = onnx.load(prepared.file)
    node = next(n for n in model.graph.node if any(_DOWN in e.value for e in n.metadata_props) and n.op_type == "MatMul")
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    values = numpy_helper.to_array(weight).copy()
    values[:, 3] = values[::-1, 3]
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "bad.onnx")
    assert compare(prepared.sparse, tmp_path / "bad.onnx", prepared.inputs).first_divergence == _DOWN


def test_layers_of_a_file_without_module_names_are_found_by_its_weights(prepared: Prepared, tmp_path: Path) -> None:
    model = onnx.load(prepared.file)
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        scopes = [e.value for e in node.metadata_props if e.key.endswith("name_scopes")]
        if node.op_type == "MatMul" and "_proj" in scopes[0]:
            path = ast.literal_eval(scopes[0])[-2]
            name = f"{path}.weight" if f"{path}.weight" not in renamed.values() else f"{path}.slorb_weight"
            node.input[1] = renamed.setdefault(node.input[1], name)
        del node.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    onnx.save(model, tmp_path / "model.onnx")
    found = compare(prepared.sparse, tmp_path, prepared.inputs)
    assert {_Q, _O, _UP, _DOWN} < {layer.name for layer in found.layers}
    assert found.first_divergence is None
    assert compare(tmp_path, _branched(prepared.masked, but=_UP), prepared.inputs).first_divergence == _UP


def test_a_dense_model_and_its_sparse_program_differ(prepared: Prepared) -> None:
    found = compare(prepared.model, prepared.masked, prepared.inputs)
    assert found.first_divergence == _Q
    assert found.relative_error > 0.01
    text = str(found)
    assert "first layer at which they part: model.layers.0.self_attn.q_proj" in text
    assert "LlamaForCausalLM" in text
    assert found.to_dict()["first_divergence"] == _Q
    assert found.failures(exact=True)
    assert len(found.failures(rtol=0.001, atol=1e-6, max_kl=1e-9)) == 3
    assert not found.failures(rtol=10)
    # A bound that is given stands in the place of the default.
    assert found.failures()
    assert not found.failures(max_kl=10)
    assert not found.failures(atol=10)
    assert found.failures(max_kl=10, atol=1e-6)


# Running


def test_run_leaves_the_model_as_it_was(prepared: Prepared) -> None:
    prepared.model.train()
    try:
        outputs = run(prepared.model, prepared.inputs, layers=True)
        assert all(module.training for module in prepared.model.modules())
    finally:
        prepared.model.eval()
    assert list(outputs) == ["logits"]
    assert not outputs["logits"].requires_grad
    assert len(outputs.layers) == 9  # the embedding is a layer too
    assert not any(module._forward_hooks for module in prepared.model.modules())


def test_floating_inputs_take_the_dtype_and_the_coarser_dtype_decides() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    rounded = copy.deepcopy(layer).to(torch.bfloat16)
    found = assert_equivalent(layer, rounded, torch.randn(6, 16))
    assert found.dtype is torch.bfloat16
    assert found.relative_error > 1e-4
    with pytest.raises(EquivalenceError, match="exceeds rtol 1e-05"):
        assert_equivalent(layer, rounded, torch.randn(6, 16), rtol=1e-5)


def test_calls_of_a_shared_module_are_told_apart() -> None:
    family = BY_NAME["convnet"]
    model = family.model()
    program = capture(model, family.inputs(2, 8))
    found = compare(model, program, family.inputs(3, 8))
    names = ["stem", "body", "depthwise", "mix", "mix#1", "head"]
    assert [layer.name for layer in found.layers] == names
    assert [layer.name for layer in compare(program, program.hierarchy(), family.inputs(3, 8)).layers] == names
    assert found.outputs.exact


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.positions = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]).expand(input_ids.shape))
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        return {"logits": self.head(x.reshape(-1, 8)).reshape(*input_ids.shape, 16)}


def _decoder_file(model: _Decoder, file: Path, past: list[str | int]) -> None:
    """A decoder with a cache as an exporter writes it, with module names in node names as older ones do."""
    weights = {"e": model.embed.weight, "p": model.positions.weight, "w": model.head.weight.t()}
    number = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["e", "input_ids"], ["x0"], name="/embed/Gather"),
            helper.make_node("Gather", ["p", "position_ids"], ["x1"], name="/positions/Gather"),
            helper.make_node("Add", ["x0", "x1"], ["x2"], name="/Add"),
            helper.make_node("Cast", ["attention_mask"], ["m0"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["m0", "axis"], ["m1"]),
            helper.make_node("Mul", ["x2", "m1"], ["x3"]),
            helper.make_node("MatMul", ["x3", "w"], ["logits"], name="/head/MatMul"),
            helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        ],
        "decoder",
        [
            number("input_ids", TensorProto.INT64, ["b", "t"]),
            number("attention_mask", TensorProto.INT64, ["b", "p + t"]),
            number("position_ids", TensorProto.INT64, ["b", "t"]),
            number("past_key_values.0.key", TensorProto.FLOAT, past),
        ],
        [number("logits", TensorProto.FLOAT, None), number("present.0.key", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(t.detach().numpy().copy(), name) for name, t in weights.items()]
        + [
            numpy_helper.from_array(torch.tensor([-1]).numpy(), "axis"),
            numpy_helper.from_array(torch.ones(2, 2, 1, 4).numpy(), "new"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


def test_onnx_decoder_gets_an_empty_cache(tmp_path: Path) -> None:
    model = _Decoder()
    _decoder_file(model, tmp_path / "decoder.onnx", ["b", "2", "p", 4])
    ids = torch.randint(0, 16, (2, 5))
    found = compare(model, tmp_path, {"input_ids": ids})
    assert not found.failures()
    assert found.first_divergence is None
    assert [layer.name for layer in found.layers] == ["embed", "positions", "head"]  # of as many entries, if not axes
    assert "returns it" in found.not_compared["past_key_values.0.key"]
    assert run(tmp_path, {"input_ids": ids})["past_key_values.0.key"].shape == (2, 2, 1, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert_equivalent(model, tmp_path, {"input_ids": ids, "attention_mask": mask})
    _decoder_file(model, tmp_path / "decoder.onnx", ["b", "heads", "p", 4])
    with pytest.raises(EquivalenceError, match=r"past_key_values.0.key.*exactly one axis that varies"):
        run(tmp_path, {"input_ids": ids})


def test_final_value_of_a_layer_is_past_its_branch() -> None:
    def step(path: str, reads: str, write: str, *, matmul: bool = False, tensor: bool = True) -> Step:
        return Step(path=path, reads=tuple(reads.split()), writes=(write,), is_matmul=matmul, is_tensor=tensor)

    steps = [
        step("mlp.up", "x w", "y", matmul=True),
        step("mlp.up", "s v", "branch", matmul=True),
        step("mlp.up", "y branch", "sum"),
        step("mlp.up", "sum", "size", tensor=False),
        step("mlp", "sum", "act"),
        step("mlp.up", "act w", "again", matmul=True),
    ]
    assert layer_results(steps) == {"sum": "mlp.up", "again": "mlp.up"}


# What is refused


def test_nan_on_both_sides_proves_nothing() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(EquivalenceError, match="NaN on both sides"):
        assert_equivalent(layer, layer, torch.full((2, 4), torch.nan))


def test_inputs_that_matter_are_not_dropped() -> None:
    class Ids(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids * 2

    ids = torch.ones(2, 3)
    quiet = {"input_ids": ids, "attention_mask": torch.ones(2, 3), "token_type_ids": torch.zeros(2, 3), "extra": None}
    assert list(run(Ids(), quiet)) == ["output"]
    with pytest.raises(EquivalenceError, match="does not take the input 'attention_mask'"):
        run(Ids(), {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    with pytest.raises(EquivalenceError, match="input 'input_ids' is a list"):
        run(Ids(), {"input_ids": [1]})  # type: ignore[dict-item]


def test_outputs_of_both_sides_must_match() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x, "pooled": x}

    class One(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x, "hidden_states": x}

    class Other(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": x}

    with pytest.raises(EquivalenceError, match=r"One does not return \['pooled'\]"):
        compare(Two(), One(), torch.ones(2))
    with pytest.raises(EquivalenceError, match=r"One does not return \['pooled'\]"):
        compare(One(), Two(), torch.ones(2))
    matched = compare(One(), Other(), torch.ones(2))
    assert list(matched.outputs.outputs) == ["logits"]
    assert matched.not_compared == {"hidden_states": "only One returns it"}
    with pytest.raises(EquivalenceError, match="no layer is known on both sides"):
        assert_equivalent(One(), nn.ReLU(), torch.tensor([-1.0, 1.0]))


def test_artifacts_that_cannot_be_run(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    (tmp_path / "broken.onnx").write_bytes(b"no model at all")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, Any, str]] = [
        (3, torch.ones(1, 4), "a int cannot be compared"),
        (tmp_path / "none", torch.ones(1, 4), "does not exist"),
        (tmp_path / "empty", torch.ones(1, 4), "holds neither model.onnx nor program.json"),
        (tmp_path / "broken.onnx", torch.ones(1, 4), "ONNX"),
        (layer, torch.ones(1, 5), r"Linear cannot be run with these inputs"),
        (nn.Linear(4, 4, device="meta"), torch.ones(1, 4), "has no values yet"),
        (nn.Identity(), {"input": None}, "cannot be run"),
    ]
    for artifact, inputs, said in cases:
        with pytest.raises(EquivalenceError, match=said):
            run(artifact, inputs)
    (tmp_path / "other.onnx").write_bytes(b"")
    with pytest.raises(EquivalenceError, match="several ONNX files"):
        run(tmp_path, torch.ones(1, 4))


def test_bounds_that_make_no_sense() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(EquivalenceError, match="rtol must be a number that is not negative"):
        assert_equivalent(layer, layer, torch.ones(1, 4), rtol=-1.0)
    with pytest.raises(EquivalenceError, match="no output is named logits"):
        assert_equivalent(layer, layer, torch.ones(1, 4), max_kl=0.1)


def test_the_example_for_users_runs(tmp_path: Path) -> None:
    example = _ROOT / "examples" / "equivalence" / "test_my_model.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(example)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
