"""`export`: what stands in the folder, what the report says, and that nothing half-written is left."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.export.tiny import WORDS, save_tiny_llama
from torch import Tensor, nn

from sparsepass._docs import attribute_docs
from sparsepass.export.pattern.check import check_pattern
from sparsepass.export.report.document import HTML_FILE, PAGE_FILE, RECIPE_FILE, REPORT_FILE, read_report
from sparsepass.export.stages.exporting import SAMPLES_FILE, export, read_samples
from sparsepass.export.stages.preparing import prepare
from sparsepass.export.stages.settings import Calibration, Evaluation
from sparsepass.export.targets import TARGETS, Check, HuggingFace, Target
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.load import load_model
from sparsepass.graph.rewrite import without_branches
from sparsepass.graph.support import CHECKSUMS_FILE, write_checksums
from sparsepass.passes import NMSparsify, SLoRB, apply_passes, parse_pipeline

EVIDENCE = {REPORT_FILE, PAGE_FILE, HTML_FILE, RECIPE_FILE, CHECKSUMS_FILE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(WORDS * 60)
    return path


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return prepare(folder, passes=[NMSparsify(), SLoRB()]).program


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_goes_through_passes_lowering_and_verification(target: str, folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(
        folder,
        "torch{dtype=bfloat16}" if target == "torch" else target,
        out,
        passes="nm_sparsify{criterion=wanda},slorb{k=16}",
        calibration=Calibration(data=str(text), num_sequences=2, context=16),
        evaluation=Evaluation(text=text, context=16, max_tokens=64),
        command="sparse-export tiny",
    )
    assert result.state == ("not_checked" if target == "tensorrt" else "held"), "there is no GPU to run engines on"
    assert result.failures == ()
    assert files(out) >= EVIDENCE | {SAMPLES_FILE, "tokenizer.json"}
    assert not list(tmp_path.glob(".*")), "nothing is left beside the folder"

    report = read_report(out)
    assert report == result.report
    assert set(files(out)) == set(report["artifact"]["files"]) | EVIDENCE | {SAMPLES_FILE}
    assert report["model"]["source"] == str(folder)
    assert report["runs"][0]["command"] == "sparse-export tiny"
    assert [entry["name"] for entry in report["accuracy"]["measurements"]] == [
        "dense",
        "2:4, SLoRB switched off",
        "2:4 + SLoRB",
    ]
    assert ".partial" not in (out / REPORT_FILE).read_text(), "the report names the final folder"
    assert parse_pipeline((out / RECIPE_FILE).read_text().strip()) == parse_pipeline(result.program.recipe)

    expected = report["artifact"]["expected_sparse"]
    if target == "packed":  # no zeros are left in its files, and its own verification reads them
        assert expected == {}
        return
    assert sum(map(len, expected.values())) == len(result.program.sparse) == 14
    for name, weights in expected.items():
        assert check_pattern(out / name if name else out, expected_sparse=weights).conforms


def test_samples_are_what_the_program_computes(program: Program, tmp_path: Path) -> None:
    export(program, "onnx", tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "out" / SAMPLES_FILE)
    inputs = read_samples(tmp_path / "out" / SAMPLES_FILE)
    assert set(stored) == {*(f"inputs/{name}" for name in inputs), "outputs/logits"}
    with torch.no_grad():
        assert torch.equal(program(**inputs).logits, stored["outputs/logits"])


def test_the_hf_folder_is_not_confused_by_what_lies_beside_it(program: Program, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    export(program, "hf", out)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    inputs = program.example_inputs
    with torch.no_grad(), without_branches(program):
        assert torch.allclose(loaded(**inputs).logits, program(**inputs).logits, atol=1e-5)
    with pytest.raises((OSError, ValueError)):
        AutoTokenizer.from_pretrained(out)  # a program in memory brings none


def test_a_model_in_memory_is_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = export(model, "hf", tmp_path / "out", passes="nm_sparsify")
    assert result.held
    assert result.report["model"]["kind"] == "memory"
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_plain_module_can_leave_as_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    result = export(model, "onnx", tmp_path / "out", passes="nm_sparsify", example_inputs=torch.randn(2, 16))
    assert result.held
    assert result.report["passes"]["num_sparse"] == 2, "the last layer reaches the output"
    with pytest.raises(SparsepassError, match="target hf"):
        export(result.program, "hf", tmp_path / "hf")


def test_a_dense_program_can_be_exported_too(folder: Path, tmp_path: Path) -> None:
    result = export(folder, "onnx", tmp_path / "out")
    assert result.held
    assert result.report["recipe"] == ""
    assert result.report["artifact"]["expected_sparse"] == {"model.onnx": {}}


def test_without_verification_the_report_says_so(program: Program, tmp_path: Path) -> None:
    result = export(program, "hf", tmp_path / "out", verify=False)
    assert (result.held, result.state) == (False, "not_checked")
    assert read_report(tmp_path / "out")["verification"] == {"held": None, "state": "not_checked", "checks": []}
    assert "switched off" in (tmp_path / "out" / PAGE_FILE).read_text()


def broken_target(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    for name, method in changes.items():
        monkeypatch.setattr(HuggingFace, name, method)


def test_a_failed_check_is_reported_and_the_artifact_written(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_target(
        monkeypatch,
        verify=lambda *_: (
            Check(name="pattern", held=True, summary="holds"),
            Check(name="outputs", held=False, summary="differ by 3"),
        ),
    )
    result = export(program, "hf", tmp_path / "out")
    assert result.held is False
    assert result.failures == ("outputs: differ by 3",)
    assert "did NOT hold" in (tmp_path / "out" / PAGE_FILE).read_text()


@pytest.mark.parametrize(("decides", "state"), [(True, "not_checked"), (False, "held")])
def test_what_cannot_be_checked_is_neither_held_nor_a_failure(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decides: bool, state: str
) -> None:
    found = (
        Check(name="pattern", held=True, summary="holds"),
        Check(name="outputs", held=None, summary="no kernels here", decides=decides),
    )
    broken_target(monkeypatch, verify=lambda *_: found)
    result = export(program, "hf", tmp_path / "out")
    assert (result.state, result.held, result.failures) == (state, state == "held", ())
    assert result.unchecked == (("outputs: no kernels here",) if decides else ())
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert ("Not everything could be checked here" in page) is decides
    assert ("Verification held" in page) is not decides


@pytest.mark.parametrize("target", ["hf", "onnx", "packed", "torch{dtype=bfloat16}"])
def test_outputs_that_are_not_finite_never_hold(target: str, folder: Path, tmp_path: Path) -> None:
    model: Any = load_model(folder).model
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    result = export(model, target, tmp_path / "out", passes="nm_sparsify", validate=False)
    assert result.state == "did_not_hold"
    assert any("nothing is known" in failure for failure in result.failures), result.failures


@pytest.mark.parametrize("target", ["hf", "onnx", "packed{values=fp16}", "torch"])
def test_a_type_that_cannot_hold_the_weights_is_refused(target: str, folder: Path, tmp_path: Path) -> None:
    model: Any = load_model(folder, dtype="bfloat16").model
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = 1e5
    text = target if "fp16" in target else f"{target}{{dtype=float16}}"
    with pytest.raises(SparsepassError, match=r"holds values up to .*, which float16 cannot hold; use bfloat16"):
        export(model, text, tmp_path / "out", passes="nm_sparsify", validate=False)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SparsepassError, match="holds values that float16 cannot hold"):
        load_model(tmp_path / "model", dtype="float16")


def test_planted_damage_between_writing_and_verification_is_caught(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = HuggingFace.lower

    def lower(*args: Any) -> Any:
        lowered = write(*args)
        path = args[2] / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"].fill_(1.0)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        return lowered

    broken_target(monkeypatch, lower=lower)
    result = export(program, "hf", tmp_path / "out")
    assert result.held is False
    assert [check["held"] for check in result.report["verification"]["checks"]] == [False, False, False]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), OSError(28, "No space left on device")])
def test_an_interruption_leaves_the_old_output(
    error: BaseException, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    write_checksums(out)

    def verify(*_: Any) -> Any:
        raise error

    broken_target(monkeypatch, verify=verify)
    expected = SparsepassError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        export(program, "hf", out, force=True)
    assert files(tmp_path) == {"out/old", f"out/{CHECKSUMS_FILE}"}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be loaded before the arguments are checked")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "onx"}, "did you mean 'onnx'"),
        ({"target": "coreml"}, "known: 'hf', 'onnx', 'packed', 'tensorrt', 'torch'"),
        ({"target": "hf{opset=18}"}, "has no option 'opset'"),
        ({"target": "onnx{opset=new}"}, "opset expects int or none"),
        ({"target": "onnx,hf"}, "expected one target"),
        ({"target": "onnx{dtype=int3}"}, "int3"),
        ({"passes": "nm_sparsfy"}, "nm_sparsify"),
        ({"passes": "nm_sparsify{pattern=4:2}"}, "4:2"),
        ({"out": "full"}, "not empty"),
        ({"evaluation": Evaluation(text="nowhere.txt")}, "nowhere.txt does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparsepass.export.stages.preparing.load_model", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    arguments: dict[str, Any] = {"model": "m", "target": "onnx", "out": "out"} | change
    with pytest.raises(SparsepassError, match=said):
        export(**arguments)
    assert files(tmp_path) == {"full/file"}


@pytest.mark.parametrize(
    ("target", "passes", "said"),
    [
        ("packed", "quantize{symmetric=false}", "packed layers have no zero points, and what quantize rounds is uint4"),
        ("packed", "quantize{format=fp8}", "what quantize rounds is fp8; quantize with format=int"),
        ("packed{values=int8}", "quantize", "values=int8 with group_size=64 would round it again"),
        ("tensorrt", "quantize{symmetric=false}", "what quantize rounds .*: zero points have to be 0"),
        ("tensorrt", "quantize_embedding", "what quantize_embedding rounds .*: it is looked up"),
        ("hf", "slorb,quantize", "which has no place beside integers"),
    ],
)
def test_integers_that_a_form_does_not_hold_are_refused_before_a_model_is_looked_for(
    target: str, passes: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(SparsepassError, match=said):
        export("no/such/model", target, tmp_path / "out", passes=f"nm_sparsify,{passes}", calibration="no-such-text.txt")


def test_branches_are_switched_off_and_on_again(program: Program) -> None:
    inputs = program.example_inputs
    alone = apply_passes(prepare_dense(program), "nm_sparsify", validate=False)
    with torch.no_grad():
        with_branches = program(**inputs).logits
        with without_branches(program):
            without = program(**inputs).logits
        assert torch.equal(program(**inputs).logits, with_branches)
        assert torch.equal(without, alone(**inputs).logits)


def prepare_dense(program: Program) -> nn.Module:
    """The dense model that a program with masks still holds behind them."""
    bare = Program(
        program.graph_module,
        output_structure=program.output_structure,
        example_inputs=program.example_inputs,
        dynamic_axes=program.dynamic_axes,
        aliases=program.aliases,
        origin=program.origin,
    )
    return bare.to_model()


def test_an_earlier_report_is_carried_on(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sparsepass.export.cli.app import app

    pruned = tmp_path / "pruned"
    assert CliRunner().invoke(app, ["prune", str(folder), "-o", str(pruned)]).exit_code == 0
    report = export(pruned, "hf", tmp_path / "out").report
    assert [run["stage"] for run in report["runs"]] == ["prune", "export"]
    assert report["model"]["source"] == str(folder)
    newer = json.loads((pruned / REPORT_FILE).read_text()) | {"schema_version": 99}
    (pruned / REPORT_FILE).write_text(json.dumps(newer))
    write_checksums(pruned)
    with pytest.raises(SparsepassError, match="upgrade sparsepass"):
        export(pruned, "hf", tmp_path / "again")


def test_read_samples_takes_a_plain_file_of_inputs(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"x": torch.ones(2, 3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert list(read_samples(tmp_path / "x.safetensors")) == ["x"]
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    with pytest.raises(SparsepassError, match="cannot be read as a safetensors file"):
        read_samples(tmp_path / "broken.safetensors")


def test_every_target_is_complete() -> None:
    for name, row in TARGETS.items():
        assert row.name == name
        assert row.description
        assert callable(row.lower)
        assert callable(row.verify)
        assert issubclass(row, Target)
        assert row.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert all(field.kw_only and attribute_docs(row)[field.name] for field in dataclasses.fields(row))


def test_news_goes_to_the_log_and_to_the_old_keyword_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_llama(tmp_path / "tiny")
    steps = [f"loading {tmp_path / 'tiny'}", "writing hf", "opening what was written, and comparing it with the program"]
    with caplog.at_level("INFO", logger="sparsepass.export"):
        export(tmp_path / "tiny", HuggingFace(), tmp_path / "out")
    assert caplog.messages == steps
    told: list[str] = []
    with pytest.warns(DeprecationWarning, match=r"news goes to the log now, to the logger sparsepass.export"):
        export(tmp_path / "tiny", HuggingFace(), tmp_path / "again", tell=told.append)
    assert told == steps
