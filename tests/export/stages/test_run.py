"""`sparsepass run`: a recipe from a dense model to verified exports, killed and resumed, and what changed settings do."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.export.cli.commands import run, same
from tests.export.report.browser import SIZES_OF_PICTURES, browser
from tests.export.targets.zeros import check_zeros
from tests.export.tiny import WORDS, save_tiny_llama
from tests.retrain.runs import exports_once

from sparsepass.export.report.document import read_report
from sparsepass.export.stages.recipe import read_recipe
from sparsepass.export.stages.retraining import default_run_folder, retrain_program
from sparsepass.graph import Program
from sparsepass.retrain.run.metrics import METRICS, read_metrics

STEPS = 30
ONLY_HF = [part for each in ("export=[{target: hf}]", "measure=null", "retrain=null", "eval=null") for part in ("--set", each)]
STAGES = ["prune", "retrain", "eval", "export.hf", "export.onnx", "measure"]
USED = {"hf": ["No: hf: ", "--target packed"], "onnx": ["Unknown: ", "sparse-export FOLDER --target tensorrt"]}
"""What a page says of whether a runtime uses the sparsity: of the target that is measured, and of another."""
BENCH = {"batches": [1, 2], "prompt_tokens": 4, "new_tokens": 3, "prefill_tokens": 8, "repeats": 1, "memory": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a text, and a recipe that was killed with SIGKILL in the middle of its training and then run to its end."""
    place = tmp_path_factory.mktemp("pipeline")
    save_tiny_llama(place / "tiny")
    (place / "words.txt").write_text(WORDS * 60)
    words = str(place / "words.txt")
    train = {"max_steps": STEPS, "batch_size": 4, "lr": 1e-2, "min_lr": 1e-3, "mask_interval": 3, "dtype": "float32"}
    recipe = {
        "model": str(place / "tiny"),
        "out": str(place / "out"),
        "prune": {"passes": "nm_sparsify,slorb{k=8}", "calibration": words, "num_sequences": 2, "context": 16},
        "retrain": {
            "train": train | {"validate_every": 10, "checkpoint_every": 5},
            "data": {"source": words, "context": 16, "validation": 4},
        },
        "eval": {"text": words, "context": 16, "max_tokens": 64},
        "export": [{"target": "hf"}, {"target": "onnx"}],
        "measure": {"target": "hf", "bench": BENCH},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with exports_once():
        yield place


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    kill_in_training([sys.executable, "-m", "sparsepass.export.cli", "run", str(place / "recipe.yaml")], place / "out")
    assert states(place / "out") == {"prune": True, "retrain": False}
    assert not (place / "out" / "retrained").exists()
    pruned = (place / "out" / "pruned" / "program.json").stat().st_mtime_ns
    planned = run("run", place / "recipe.yaml", "--dry-run").output
    assert "prune: done" in planned
    assert "retrain: to be gone on with" in planned
    assert f"measure: to be run, into {place / 'out' / 'hf'}" in "".join(planned.splitlines())
    result = run("run", place / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "going on from step" in result.stderr
    assert "done before" in result.stdout
    assert (place / "out" / "pruned" / "program.json").stat().st_mtime_ns == pruned, "prune was not run again"
    return place / "out"


def kill_in_training(command: list[str], out: Path) -> None:
    """Start a command, and kill it between two checkpoints of its training."""
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    metrics = default_run_folder(out / "retrained") / METRICS
    while process.poll() is None and not any(line["step"] >= 7 for line in read_metrics(metrics)):
        time.sleep(0.01)
    process.kill()
    _, error = process.communicate(timeout=240)
    assert process.returncode == -9, error


def states(out: Path) -> dict[str, bool]:
    return {name: record["done"] for name, record in json.loads((out / "stages.json").read_text()).items()}


def times(out: Path) -> dict[str, int]:
    folders = ("pruned", "retrained", "eval", "hf", "onnx")
    return {name: (out / name / "report.json").stat().st_mtime_ns for name in folders}


def test_every_stage_has_a_folder_and_is_done(finished: Path) -> None:
    assert states(finished) == dict.fromkeys(STAGES, True)
    assert set(times(finished)) == {"pruned", "retrained", "eval", "hf", "onnx"}


def test_the_killed_training_ends_like_one_that_was_not_killed(place: Path, finished: Path, tmp_path: Path) -> None:
    recipe = read_recipe(place / "recipe.yaml")
    assert recipe.retrain is not None
    retrain_program(finished / "pruned", recipe.retrain, tmp_path / "whole", progress=False)
    assert same(finished / "retrained", tmp_path / "whole")


@pytest.mark.parametrize("target", ["hf", "onnx"])
def test_the_retrained_program_exports_with_its_checks(target: str, finished: Path) -> None:
    report = read_report(finished / target)
    assert report["verification"]["held"] is True
    held = {check["name"]: check["held"] for check in report["verification"]["checks"]}
    assert held["pattern"] is True
    assert held["weights"] is True
    assert held["outputs"] is True
    assert [entry["stage"] for entry in report["runs"][:3]] == ["prune", "retrain", "export"]
    assert report["retraining"]["runs"][0]["num_steps"] == STEPS
    named = [entry["name"] for entry in report["accuracy"]["measurements"]]
    assert named == ["dense", "2:4 + SLoRB", "2:4 + SLoRB, retrained"]
    assert (finished / target / "figures" / "retraining-1-loss.svg").is_file()
    checked = run("verify", finished / target)
    assert checked.exit_code == 0, checked.output


def test_the_report_of_what_is_measured_shows_accuracy_size_and_speed_beside_dense(place: Path, finished: Path) -> None:
    report = read_report(finished / "hf")
    assert [entry["stage"] for entry in report["runs"]] == ["prune", "retrain", "export", "measure"]
    assert [side["name"] for side in report["speed"]["sides"]] == ["hf", "tiny"]
    assert [(point["phase"], point["batch"]) for point in report["speed"]["points"]] == [
        ("decode", 1),
        ("decode", 2),
        ("prefill", 1),
    ]
    assert all(len(point["results"]) == 2 for point in report["speed"]["points"])
    size = report["size"]
    assert [entry["source"] for entry in size["files"]] == [str(place / "tiny"), str(finished / "hf"), str(finished / "onnx")]
    assert all(entry["bytes"] > 0 for entry in size["files"])
    assert "2:4 bf16, SLoRB k=8" in [form["form"] for form in size["forms"]]
    assert report["accuracy"]["measurements"][0]["name"] == "dense"
    page = (finished / "hf" / "report.html").read_text()
    for heading in ("Accuracy", "Speed", "Size"):
        assert f">{heading}</h2>" in page
    onnx = read_report(finished / "onnx")
    assert not {"speed", "size"} & onnx.keys()
    assert run("verify", finished / "hf").exit_code == 0, "what was added is part of the folder"


def test_a_measurement_that_was_interrupted_is_made_again(place: Path, finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    records: dict[str, Any] = json.loads((tmp_path / "out" / "stages.json").read_text())
    records["measure"]["done"] = False
    (tmp_path / "out" / "stages.json").write_text(json.dumps(records))
    before = times(tmp_path / "out")
    result = run("run", place / "recipe.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    after = times(tmp_path / "out")
    assert [name for name in before if after[name] != before[name]] == ["hf"]
    assert [entry["stage"] for entry in read_report(tmp_path / "out" / "hf")["runs"]][-2:] == ["measure", "measure"]
    assert states(tmp_path / "out") == dict.fromkeys(STAGES, True)


@pytest.mark.parametrize("target", ["hf", "onnx"])
def test_the_page_of_a_full_run_tells_its_story_in_a_browser(target: str, finished: Path) -> None:
    report = read_report(finished / target)
    with browser() as page:
        page.open(finished / target / "report.html")
        assert page.messages == []
        assert page.requests == [(finished / target / "report.html").as_uri()]
        drawn = page.value(SIZES_OF_PICTURES)
        page.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        text = page.value("document.body.innerText")
    # Perplexity, zeros, errors, six of the training, sizes on disk; of the measured one also its speed and its sizes.
    assert len(drawn) == {"hf": 12, "onnx": 10}[target]
    assert all(width > 50 and height > 30 for width, height in drawn)
    for said in (
        "14 of 16 layers 2:4",
        "output head: pruning it costs much accuracy",
        "times dense",
        "compute what the program computes",
        *USED[target],
        "Verification held",
        "model.layers.1.mlp.down_proj",
        "Learning rate",
        f"run {finished.parent / 'recipe.yaml'}",
        report["runs"][0]["versions"]["torch"],
        *(f"{entry['perplexity']:.4g}" for entry in report["accuracy"]["measurements"]),
    ):
        assert said in text, said


def test_the_training_pays(finished: Path) -> None:
    perplexity = [entry["perplexity"] for entry in read_report(finished / "eval")["accuracy"]["measurements"]]
    assert perplexity[2] < 0.5 * perplexity[1], "on the text that it was trained on"


def test_two_four_and_integers_from_the_dense_model_to_what_is_measured(place: Path, tmp_path: Path) -> None:
    """What the recipe smollm2-small does, on a tiny model."""
    document = yaml.safe_load((place / "recipe.yaml").read_text())
    document["prune"]["passes"] = "nm_sparsify{criterion=sparsegpt},quantize{group_size=16},quantize_embedding"
    document["retrain"]["train"] |= {"quantize": True, "behind": "zeros", "frozen": ["*embed_tokens*"]}
    document["export"] = [{"target": "packed"}, {"target": "onnx"}]
    document["measure"] = {"target": "packed", "bench": BENCH}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(document | {"out": str(tmp_path / "out")}, sort_keys=False))
    result = run("run", tmp_path / "small.yaml")
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path / "out" / "packed")
    _, pruned, healed = (entry["perplexity"] for entry in report["accuracy"]["measurements"])
    assert healed < 0.5 * pruned, "the tiny model itself is not trained"
    assert report["verification"]["held"] is True
    assert report["retraining"]["runs"][0]["settings"]["quantize"] is True
    assert [side["name"] for side in report["speed"]["sides"]] == ["packed", "tiny"]
    first, *exported = report["size"]["files"]
    assert [entry["source"] for entry in exported] == [str(tmp_path / "out" / name) for name in ("packed", "onnx")]
    assert exported[0]["form"] == "2:4 int4, embedding int8"
    assert exported[0]["bytes"] < first["bytes"]
    program = Program.load(tmp_path / "out" / "retrained")
    assert check_zeros(program) > 0
    assert read_report(tmp_path / "out" / "onnx")["verification"]["held"] is True


def test_run_again_runs_nothing(place: Path, finished: Path) -> None:
    before = times(finished)
    result = run("run", place / "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("done before") == len(STAGES)
    assert times(finished) == before


def test_what_only_watches_a_training_may_change(place: Path, finished: Path) -> None:
    result = run("run", place / "recipe.yaml", "--set", "retrain.train.log_every=5", "--dry-run")
    assert result.exit_code == 0
    assert result.output.count(": done, in ") == len(STAGES)


def test_changed_settings_are_said_and_run_anew_when_forced(place: Path, finished: Path) -> None:
    before = times(finished)
    change = ["--set", "eval.max_tokens=32"]
    refused = run("run", place / "recipe.yaml", *change)
    assert refused.exit_code == 2
    assert "eval: max_tokens was 64, is 32" in refused.stderr.replace("\n", " ")
    assert "run eval, export.hf, export.onnx, measure anew" in refused.stderr.replace("\n", " ")
    assert times(finished) == before
    result = run("run", place / "recipe.yaml", *change, "--force")
    assert result.exit_code == 0, result.output
    after = times(finished)
    assert [name for name in before if after[name] != before[name]] == ["eval", "hf", "onnx"]
    measured = read_report(finished / "onnx")["accuracy"]["measurements"]
    assert {entry["num_tokens"] for entry in measured} == {
        read_report(finished / "eval")["accuracy"]["measurements"][0]["num_tokens"]
    }


def test_a_change_in_an_interrupted_training_is_said(place: Path, finished: Path, tmp_path: Path) -> None:
    """The checkpoints of a training with other settings are not gone on from, and go when that is forced."""
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    records: dict[str, Any] = json.loads((tmp_path / "out" / "stages.json").read_text())
    unfinished = {"prune": records["prune"], "retrain": records["retrain"] | {"done": False}}
    (tmp_path / "out" / "stages.json").write_text(json.dumps(unfinished))
    for name in ("retrained", "eval", "hf", "onnx"):
        shutil.rmtree(tmp_path / "out" / name)
    change = [
        "-o",
        tmp_path / "out",
        "--set",
        "retrain.train.max_steps=3",
        "--set",
        "export=[]",
        "--set",
        "eval=null",
        "--set",
        "measure=null",
    ]
    refused = run("run", place / "recipe.yaml", *change)
    assert refused.exit_code == 2
    assert f"retrain: train.max_steps was {STEPS}, is 3" in refused.stderr.replace("\n", " ")
    result = run("run", place / "recipe.yaml", *change, "--force")
    assert result.exit_code == 0, result.output
    assert read_report(tmp_path / "out" / "retrained")["retraining"]["runs"][0]["num_steps"] == 3


def test_a_folder_that_is_gone_is_said(place: Path, finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "hf")
    result = run("run", place / "recipe.yaml", "-o", tmp_path / "out", "--set", "eval.max_tokens=32")
    assert result.exit_code == 2
    assert "hf is gone" in result.stderr.replace("\n", "")


def test_others_folders_are_not_replaced(place: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("mine")
    result = run("run", place / "recipe.yaml", "-o", tmp_path)
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert (tmp_path / "hf" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "stages.json").exists()


def test_an_export_that_does_not_hold_is_exit_code_1(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsepass.export.targets import Check, HuggingFace

    monkeypatch.setattr(HuggingFace, "verify", lambda *_: (Check(name="outputs", held=False, summary="too far"),))
    change = ["-o", tmp_path / "out", *ONLY_HF]
    for _ in range(2):
        result = run(
            "run", place / "recipe.yaml", *change, "--set", "prune.passes=nm_sparsify", "--set", "prune.calibration=null"
        )
        assert result.exit_code == 1, result.output
        assert "verification did not hold" in result.stderr.replace("\n", " ")


def test_an_export_that_could_not_be_checked_is_exit_code_3(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsepass.export.targets import Check, HuggingFace

    monkeypatch.setattr(HuggingFace, "verify", lambda *_: (Check(name="outputs", held=None, summary="no kernels"),))
    change = ["-o", tmp_path / "out", *ONLY_HF]
    change += ["--set", "prune.passes=nm_sparsify", "--set", "prune.calibration=null"]
    assert run("run", place / "recipe.yaml", *change).exit_code == 3
    assert run("run", place / "recipe.yaml", *change, "--allow-unchecked").exit_code == 0


def test_the_example_and_the_recipes_are_printed() -> None:
    example = run("run", "--example")
    assert example.exit_code == 0
    assert yaml.safe_load(example.stdout)["model"]
    listed = run("run", "--list").stdout
    assert "smollm2-cpu: SmolLM2-135M on two CPU cores\n" in listed
    assert yaml.safe_load(run("run", "smollm2-cpu", "--print").stdout)["retrain"]
    assert run("run").exit_code == 2


def test_two_processes_share_a_recipe(place: Path, tmp_path: Path) -> None:
    """`accelerate launch`: one prunes and exports, both train; killed in between, and started again."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "sparsepass.export.cli", "run"]
    command = [
        *launch,
        str(place / "recipe.yaml"),
        "-o",
        str(tmp_path / "out"),
        "--set",
        "export=[{target: hf}]",
        "--set",
        "measure=null",
    ]
    for _ in range(2):
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 4
    report = read_report(tmp_path / "out" / "hf")
    assert report["verification"]["held"] is True
    assert len(report["retraining"]["runs"]) == 1
