"""Reports, exports, run folders, caches and recipes that earlier code wrote: read, shown, verified, gone on from."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.compatibility.command_line import FIXTURES, run

from sparsepass import Program
from sparsepass.export import check_pattern, read_report

REPORTS = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.rglob("report.json"))
EXPORTS = ("out/hf", "out/onnx", "torch")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all of it, in which commands are given by the names that were used then."""
    shutil.copytree(FIXTURES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def done(*arguments: object) -> str:
    """Run a command that has to succeed; what it prints, both ways."""
    found = run(*arguments)
    assert found.code == 0, found.output + found.errors
    return found.output + found.errors


def test_there_is_a_report_of_each_command() -> None:
    stages = {entry["stage"] for name in REPORTS for entry in read_report(FIXTURES / name)["runs"]}
    assert stages == {"prune", "retrain", "eval", "export", "plan", "verify"}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_read_as_it_is_and_rendered(name: str, tmp_path: Path) -> None:
    there = json.loads((FIXTURES / name / "report.json").read_text(encoding="utf-8"))
    assert read_report(FIXTURES / name) == there
    assert read_report(FIXTURES / name / "report.json") == there
    shown = done("report", FIXTURES / name, "-o", tmp_path)
    assert shown.strip()
    for page in ("report.html", "report.md"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert there["runs"][-1]["stage"] in text
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_is_added_to(place: Path) -> None:
    before = read_report(place / "out/pruned")
    done("verify", "out/pruned", "--report", "out/pruned")
    after = read_report(place / "out/pruned")
    assert [entry["stage"] for entry in after["runs"]] == ["prune", "verify"]
    assert all(after[name] == before[name] for name in before if name != "runs")


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_verified(name: str) -> None:
    assert check_pattern(FIXTURES / name).entries
    found = json.loads(run("verify", FIXTURES / name, "--json").output)
    assert found["conforms"] is True
    assert ("torch_semi_structured" in found) == (name == "torch")


@pytest.mark.parametrize(("name", "bound"), [("out/hf", 1), ("out/onnx/model.onnx", 1e-5)])
def test_an_export_is_compared_with_its_program(name: str, bound: float) -> None:
    """On the samples beside it; the folder for transformers is taken without the branches in its adapter."""
    said = done("compare", FIXTURES / "out/retrained", FIXTURES / name, "--no-layers", "--rtol", bound, "--json")
    assert json.loads(said[: said.rindex("}") + 1])["outputs"]


def test_a_recipe_that_was_run_is_done(place: Path) -> None:
    """Its stages' settings are compared with those of then: nothing runs anew."""
    stages = (place / "out/stages.json").read_bytes()
    planned = done("run", "recipe.yaml", "--dry-run")
    assert planned.count("done") == 5, planned
    assert done("run", "recipe.yaml").count("done before") == 5
    assert (place / "out/stages.json").read_bytes() == stages


def test_an_interrupted_training_goes_on(place: Path) -> None:
    """From the checkpoint of step 3 to where the training of then came."""
    before = (place / "out/retrained.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = done("retrain", "out/pruned", "-o", "again", "-c", "recipe.yaml", "--run-folder", "out/retrained.run")
    assert "going on from step 3" in told
    expected = safetensors.torch.load_file("out/retrained/program.safetensors")
    found = Program.load("again")
    for name in expected.keys() - {"example_inputs/input_ids", "example_inputs/attention_mask"}:
        torch.testing.assert_close(found.tensor(name), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    after = (place / "out/retrained.run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(after) == len(before)
    assert after[:4] == before[:4], "what was measured up to the checkpoint is kept"


def test_a_training_starts_from_a_checkpoint(place: Path) -> None:
    still = ("--set", "train.max_steps=1", "--set", "train.lr=0", "--set", "train.min_lr=0", "--set", "train.behind=original")
    done("retrain", "out/pruned", "-o", "again", "-c", "recipe.yaml", *still, "--from-checkpoint", "out/retrained.run")
    found, first = Program.load("again"), Program.load("out/pruned")
    stored = safetensors.torch.load_file("out/retrained.run/checkpoints/step-00000003/rank-00000-0.safetensors")
    assert any(not torch.equal(found.tensor(name), first.tensor(name)) for name in found.sparse)
    for name in found.sparse:
        assert torch.equal(found.tensor(name), stored[f"weights/{name}"]), name


def test_a_teacher_is_read_from_its_cache(place: Path) -> None:
    """The model it was written by is gone."""
    shutil.rmtree(place / "model")
    done("retrain", "out/pruned", "-o", "again", "-c", "recipe.yaml", "--teacher-cache", "cache", "--set", "teacher_k=8")
    (found,) = read_report(place / "again")["retraining"]["runs"]
    assert found["teacher"] == {"kind": "CachedTeacher", "source": "model"}


def test_a_sampling_that_was_interrupted_goes_on(place: Path) -> None:
    rows = (place / ".interrupted.jsonl.partial").read_text(encoding="utf-8").splitlines()[1:]
    done("sample", "model", "-o", "interrupted.jsonl", "--tokens", 64, "--length", 16, "--batch-size", 2)
    assert not (place / ".interrupted.jsonl.partial").exists()
    found = (place / "interrupted.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    assert len(found) == 4
    assert found[:2] == rows


def test_sampled_text_is_trained_on(place: Path) -> None:
    short = ("--set", "train.max_steps=1", "--set", "data.validation=1", "--set", "train.batch_size=2")
    done("retrain", "out/pruned", "-o", "again", "-c", "recipe.yaml", *short, "--data", "sampled.jsonl")
    (found,) = read_report(place / "again")["retraining"]["runs"]
    assert found["data"]["train"]["source"] == "sampled.jsonl"


def test_rows_of_a_table_of_criteria_are_not_measured_again(place: Path) -> None:
    options = ("--calibration", "words.txt", "--num-sequences", 2, "--context", 16, "--criteria", "magnitude")
    measured = ("--eval-text", "words.txt", "--eval-context", 16, "--max-tokens", 64)
    kept = {path: path.read_bytes() for path in (place / "criteria").iterdir()}
    done("criteria", "model", *options, *measured, "--work", "criteria", "--json", "again.json")
    assert {path: path.read_bytes() for path in (place / "criteria").iterdir()} == kept
    again, before = (json.loads((place / name).read_text(encoding="utf-8")) for name in ("again.json", "criteria.json"))
    assert again["rows"] == before["rows"]


def test_masks_are_shown_and_compared() -> None:
    shown = json.loads(done("masks", FIXTURES / "masks.safetensors", "--json"))
    assert (shown["about"], shown["num_masks"]) == ("words", 7)
    compared = json.loads(done("masks", FIXTURES / "masks.safetensors", FIXTURES / "out/pruned", "--json"))
    assert len(compared["layers"]) == 7
    assert 0 < compared["total"]["num_flipped"] < compared["total"]["num_entries"]


def test_a_recipe_for_every_target_is_understood(place: Path) -> None:
    """The options of engines and of torch's kernels, by the names that recipes had for them."""
    engine = "{runtime: tensorrt-rtx, sm: [86, 89], profiles: ['batch=1:1:4'], timeout_s: 60, one_engine: true, sparse: true}"
    kernels = "{shapes: [[1, 16]], sparse_only: true, compiled: true}"
    targets = f"[{{target: tensorrt, engine: {engine}}}, {{target: torch, dtype: bfloat16, semi_structured: {kernels}}}, "
    targets += "{target: onnx, opset: 18, task: text-generation, dtype: float16}, {target: hf, verify: false}]"
    planned = done("run", "recipe.yaml", "-o", "elsewhere", "--set", f"export={targets}", "--dry-run")
    assert all(f"export.{name}" in planned for name in ("tensorrt", "torch", "onnx", "hf"))


def test_the_recipes_that_come_along_are_all_there() -> None:
    listed = done("run", "--list")
    for name in ("gpt2-paper", "llama2-7b-paper", "opt-paper"):
        assert name in listed
    for name in ("smollm2-cpu", "smollm2-gpu", "smollm2-maskllm-cpu", "smollm2-maskllm-gpu"):
        assert name in listed
        assert "train:" in done("run", name, "--print")


def test_an_export_for_torch_is_compared(place: Path) -> None:
    """A folder of that target is a folder of transformers, too."""
    said = done("compare", "torch", "torch", "--no-layers", "--exact", "--json")
    assert json.loads(said[: said.rindex("}") + 1])["equivalent"] is True
