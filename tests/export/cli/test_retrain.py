"""`sparsepass retrain` as its user meets it: what it trains, writes, resumes and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.export.cli.commands import run, same, weights
from tests.export.tiny import WORDS, save_tiny_llama
from tests.retrain.runs import exports_once

from sparsepass.export.report.document import read_report
from sparsepass.export.stages.retraining import clear_run_folder, default_run_folder
from sparsepass.export.stages.settings import ModelSource
from sparsepass.graph import Program
from sparsepass.graph.load import LoadedModel
from sparsepass.retrain.restart import program_of_checkpoint
from sparsepass.retrain.run.metrics import METRICS, read_metrics

SETTINGS = """
train:
  max_steps: 6
  batch_size: 4
  lr: 1.0e-2
  min_lr: 1.0e-3
  decay: 1.0e-2
  mask_interval: 2
  validate_every: 3
  dtype: float32
data:
  source: WORDS
  context: 16
  validation: 4
"""


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with exports_once():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, settings, a pruned program, and a retrained one."""
    place = tmp_path_factory.mktemp("retrain")
    save_tiny_llama(place / "tiny")
    (place / "words.txt").write_text(WORDS * 60)
    (place / "train.yaml").write_text(SETTINGS.replace("WORDS", str(place / "words.txt")))
    pruned = run("prune", place / "tiny", "-o", place / "pruned", "--no-validate", *evaluation(place))
    assert pruned.exit_code == 0, pruned.output
    done = run("retrain", place / "pruned", "-o", place / "out", "-c", place / "train.yaml", *evaluation(place))
    assert done.exit_code == 0, done.output
    assert "2:4, retrained" in done.output
    return place


def evaluation(place: Path) -> list[Any]:
    return ["--eval-text", place / "words.txt", "--eval-context", 16, "--max-tokens", 64]


def test_the_output_is_a_trained_program_with_its_evidence(place: Path) -> None:
    program = Program.load(place / "out")
    assert not same(place / "pruned", place / "out")
    assert program.recipe == Program.load(place / "pruned").recipe
    for name, state in program.sparse.items():
        assert state.mask is not None
        groups = program.tensor(state.mask).reshape(-1, 4).sum(1)
        assert groups.max() <= 2, name
    assert (place / "out" / "tokenizer.json").is_file()
    assert (place / "out" / "recipe.txt").read_text().strip() == program.recipe
    lines = [line["step"] for line in read_metrics(default_run_folder(place / "out") / METRICS) if "loss" in line]
    assert lines == list(range(1, 7))


def test_the_report_gains_the_run_and_keeps_what_was_measured_before(place: Path) -> None:
    before, report = read_report(place / "pruned"), read_report(place / "out")
    assert [entry["stage"] for entry in report["runs"]] == ["prune", "retrain"]
    assert report["passes"] == before["passes"]
    (found,) = report["retraining"]["runs"]
    assert found["method"] == "ast"
    assert found["num_steps"] == 6
    assert found["num_tokens"] == 6 * 4 * 16
    assert found["teacher"]["source"] == str(place / "tiny")
    assert [entry["step"] for entry in found["validations"]] == [0, 3, 6]
    assert found["curve"]["step"] == list(range(1, 7))
    assert 0 < found["flips_since_first"] < 1
    assert set(found["flips_by_layer"]) == set(Program.load(place / "out").sparse)
    measured = report["accuracy"]["measurements"]
    assert [entry["name"] for entry in measured] == ["dense", "2:4", "2:4, retrained"]
    assert measured[:2] == before["accuracy"]["measurements"], "what is known is not measured again"


def test_the_page_shows_the_pictures_that_lie_beside_it(place: Path) -> None:
    page = (place / "out" / "report.md").read_text()
    for what in ("loss", "validation", "flips", "moved", "rate", "layers"):
        name = f"figures/retraining-1-{what}.svg"
        assert f"]({name})" in page
        assert ElementTree.parse(place / "out" / name).getroot().tag.endswith("svg")
    assert "6 steps, 384 tokens" in page
    assert "of their entries differ from the first mask" in page
    assert "| lr | 0.01 |" in page


def test_single_settings_and_data_come_from_the_command_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(WORDS * 20)
    options = ["--set", "train.max_steps=2", "--set", "train.kd_weight=0", "--data", tmp_path / "other.txt"]
    result = run("retrain", place / "pruned", "-o", tmp_path / "out", "-c", place / "train.yaml", *options)
    assert result.exit_code == 0, result.output
    (found,) = read_report(tmp_path / "out")["retraining"]["runs"]
    assert found["num_steps"] == 2
    assert found["teacher"] == {"kind": "none"}
    assert found["data"]["train"]["source"] == str(tmp_path / "other.txt")


def test_a_second_training_adds_a_second_entry(place: Path, tmp_path: Path) -> None:
    options = ["-c", place / "train.yaml", "--set", "train.max_steps=2", "--teacher", place / "tiny"]
    result = run("retrain", place / "out", "-o", tmp_path / "again", *options)
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path / "again")
    assert [found["num_steps"] for found in report["retraining"]["runs"]] == [6, 2]
    assert "### Training 2 of 2" in (tmp_path / "again" / "report.md").read_text()
    assert (tmp_path / "again" / "figures" / "retraining-2-loss.svg").is_file()


def test_a_new_run_starts_from_a_checkpoint_with_settings_of_its_own(place: Path, tmp_path: Path) -> None:
    still = ["--set", "train.max_steps=1", "--set", "train.lr=0", "--set", "train.min_lr=0", "--set", "train.behind=original"]
    command = ["retrain", place / "pruned", "-o", tmp_path / "out", "-c", place / "train.yaml", *still, "--from-checkpoint"]
    earlier = default_run_folder(place / "out")
    result = run(*command, earlier)
    assert result.exit_code == 0, result.output
    checkpoint = earlier / "checkpoints" / "step-00000006"
    expected, _ = program_of_checkpoint(Program.load(place / "pruned"), checkpoint)
    expected.save(tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    assert not same(tmp_path / "out", place / "pruned")
    refused = run(*command, tmp_path / "nothing", "--force")
    assert refused.exit_code == 2
    assert "does not exist; name a run folder" in refused.output
    own = run(
        "retrain", place / "pruned", "-o", place / "out", "-c", place / "train.yaml", "--force", "--from-checkpoint", earlier
    )
    assert own.exit_code == 2
    assert "lies in the run folder of this run" in own.output


def test_the_teacher_is_cached_once_and_then_not_loaded(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ["-c", place / "train.yaml", "--teacher-cache", tmp_path / "cache", "--set", "teacher_k=300"]
    only = run("retrain", place / "pruned", "-o", tmp_path / "out", *cache, "--cache-only")
    assert only.exit_code == 0, only.output
    assert "24 sequences" in only.output
    assert not (tmp_path / "out").exists()

    load = ModelSource.load

    def refuse_teacher(self: ModelSource, *rest: Any) -> LoadedModel:
        assert self.source == str(place / "pruned"), "the teacher was loaded"
        return load(self, *rest)

    monkeypatch.setattr(ModelSource, "load", refuse_teacher)
    result = run("retrain", place / "pruned", "-o", tmp_path / "out", *cache)
    assert result.exit_code == 0, result.output
    (found,) = read_report(tmp_path / "out")["retraining"]["runs"]
    assert found["teacher"] == {"kind": "CachedTeacher", "source": str(place / "tiny")}
    # 300 of 320 logits are nearly all of the teacher.
    plain = read_report(place / "out")["retraining"]["runs"][0]["curve"]["loss"]
    assert found["curve"]["loss"][0] == pytest.approx(plain[0], rel=1e-3)
    assert found["curve"]["loss"] == pytest.approx(plain, rel=2e-2)
    assert "teacher" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{}/tiny", "-o", "{}/x", "-c", "{}/train.yaml"], "no saved program"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/nowhere.yaml"], "there is no file"),
        (["{}/pruned", "-o", "{}/x", "-c", "smolm2-cpu"], "did you mean 'smollm2-cpu'"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--set", "train.lrr=1"], "did you mean 'lr'"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--set", "train.lr=fast"], "lr"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--set", "trian.lr=1"], "did you mean 'train'"),
        (["{}/pruned", "-o", "{}/x", "--data", "{}/words.txt"], "give max_steps or max_tokens"),
        (["{}/pruned", "-o", "{}/x", "--set", "train.max_steps=1"], "there is no source"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--data", "{}/nowhere.txt"], "does not exist"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--teacher", "{}/pruned"], "has sparse layers"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--set", "data.context=128"], "64"),
        (["{}/pruned", "-o", "{}/out", "-c", "{}/train.yaml"], "not empty"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--cache-only"], "--teacher-cache"),
        (["{}/pruned", "-o", "{}/x", "-c", "{}/train.yaml", "--run-folder", "{}/out.run", "--resume", "never"], "checkpoints"),
        (["{}/out", "-o", "{}/x", "-c", "{}/train.yaml", "--run-folder", "{}/out.run"], "another program"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: list[str], said: str, place: Path) -> None:
    result = run("retrain", *(argument.replace("{}", str(place), 1) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not (place / "x").exists()


def test_a_signal_saves_and_the_same_command_goes_on(place: Path, tmp_path: Path) -> None:
    """SIGTERM: exit code 130 and no output folder; again: bit-equal to a run that was not stopped."""
    command = [sys.executable, "-m", "sparsepass.export.cli", "retrain", str(place / "pruned"), "-c", str(place / "train.yaml")]
    command += ["--set", "train.max_steps=60", "--set", "train.validate_every=20", "-o", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = default_run_folder(tmp_path / "out") / METRICS
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_bytes().splitlines()) > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130, error
    assert "Start the same command again to go on" in error.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    stopped = json.loads(metrics.read_bytes().splitlines()[-1])["step"]
    assert 0 < stopped < 60
    resumed = run(*command[3:])
    assert resumed.exit_code == 0, resumed.output
    whole = run(*command[3:-1], tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert same(tmp_path / "out", tmp_path / "whole")


def test_the_teacher_writes_part_of_the_text_once(place: Path, tmp_path: Path) -> None:
    sample = ["--set", "sample.num_tokens=480", "--set", "sample.length=24", "--set", "sample.batch_size=8"]
    command = ["retrain", place / "pruned", "-o", tmp_path / "out", "-c", place / "train.yaml", *sample]
    done = run(*command)
    assert done.exit_code == 0, done.output
    (written,) = default_run_folder(tmp_path / "out").glob("sampled-*.jsonl")
    rows = [json.loads(line)["input_ids"] for line in written.read_text(encoding="utf-8").splitlines()]
    assert [len(row) for row in rows] == [24] * 20
    (told,) = read_report(tmp_path / "out")["retraining"]["runs"]
    assert told["data"]["train"]["mixed_in"]["num_sequences"] == 30
    assert told["data"]["train"]["num_sequences"] == 60, "half of them"

    before = written.stat().st_mtime_ns
    clear_run_folder(written.parent)
    assert list(written.parent.iterdir()) == [written]
    again = run(*command, "--force", "--set", "train.lr=2.0e-2")
    assert again.exit_code == 0, again.output
    assert written.stat().st_mtime_ns == before, "what is asked is the same, so it is not written again"
    clear_run_folder(written.parent)
    other = run(*command, "--force", "--set", "sample.seed=1")
    assert other.exit_code == 0, other.output
    assert len(list(written.parent.glob("sampled-*.jsonl"))) == 2
    assert weights(tmp_path / "out").keys() == weights(place / "out").keys()


def test_the_text_that_is_sampled_is_part_of_a_cached_teachers_sequences(place: Path, tmp_path: Path) -> None:
    sample = ["--set", "sample.num_tokens=480", "--set", "sample.length=24", "--teacher-cache", tmp_path / "cache"]
    command = ["retrain", place / "pruned", "-o", tmp_path / "out", "-c", place / "train.yaml", *sample]
    cached = run(*command, "--cache-only")
    assert cached.exit_code == 0, cached.output
    assert not (tmp_path / "out").exists()
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert len(list(default_run_folder(tmp_path / "out").glob("sampled-*.jsonl"))) == 1


def test_a_quantized_program_is_trained_behind_its_rounding_and_exported(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    passes = "nm_sparsify,quantize{group_size=16}"
    done = run("prune", place / "tiny", "-o", tmp_path / "small", "--passes", passes, "--no-validate")
    assert done.exit_code == 0, done.output
    command = ["retrain", tmp_path / "small", "-o", tmp_path / "out", "-c", place / "train.yaml"]
    refused = run(*command)
    assert refused.exit_code == 2
    assert "set train.quantize: true" in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()
    result = run(*command, "--set", "train.quantize=true")
    assert result.exit_code == 0, result.output
    start, program = Program.load(tmp_path / "small"), Program.load(tmp_path / "out")
    assert program.quantized == start.quantized
    assert not same(tmp_path / "small", tmp_path / "out")
    (found,) = read_report(tmp_path / "out")["retraining"]["runs"]
    assert found["settings"]["quantize"] is True
    # Each export opens what it wrote, and compares integers, scales and zeros with the program's.
    for target in ("hf", "packed"):
        written = run("export", tmp_path / "out", "--target", target, "-o", tmp_path / target)
        assert written.exit_code == 0, written.output
        verified = run("verify", tmp_path / target)
        assert verified.exit_code == 0, verified.output
    refused = run(*command, "--set", "train.method=cast", "--set", "train.quantize=true")
    assert refused.exit_code == 2
    assert "quantize: true is for the methods ast and fixed" in " ".join(refused.output.split())
