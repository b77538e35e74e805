"""The table of criteria: rows measured in processes of their own, kept, gone on from, and shown."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.export.tiny import WORDS, save_tiny_llama
from typer.testing import CliRunner

from sparsepass.export.cli.app import app
from sparsepass.export.stages.criteria import CriteriaSettings, Job, criteria_page, criteria_table, jobs_of, measure_to_file
from sparsepass.export.stages.news import listen
from sparsepass.export.stages.settings import Calibration, Evaluation, ModelSource
from sparsepass.graph import SparsepassError
from sparsepass.passes.criteria.table import CRITERIA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("criteria")
    save_tiny_llama(place / "model")
    (place / "train.txt").write_text(WORDS * 40, encoding="utf-8")
    (place / "valid.txt").write_text(WORDS * 9, encoding="utf-8")
    return place


def _settings(folder: Path, *, calibration: Path | None = None, text: str | None = None) -> CriteriaSettings:
    return CriteriaSettings(
        model=ModelSource(source=str(folder / "model")),
        calibration=Calibration(data=str(calibration or folder / "train.txt"), num_sequences=4, context=24),
        evaluation=Evaluation(text=text or str(folder / "valid.txt"), context=24, max_tokens=100),
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure in this process, and tell which rows were."""
    measured: list[str] = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        measured.append(json.loads(command[-2])["job"]["name"])
        return subprocess.CompletedProcess(command, measure_to_file(command[-2], command[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    return measured


@pytest.mark.usefixtures("here")
def test_several_texts_have_a_column_each(folder: Path) -> None:
    (folder / "other.txt").write_text("".join(reversed(WORDS)) * 9, encoding="utf-8")
    texts = [str(folder / "valid.txt"), str(folder / "other.txt")]
    apart = [criteria_table(_settings(folder, text=text), [])["rows"][0] for text in texts]
    settings = _settings(folder)
    both = replace(settings, evaluation=replace(settings.evaluation, text=texts, max_tokens=200))
    found = criteria_table(both, [])
    (row,) = found["rows"]
    assert row["by_text"] == {text: one["perplexity"] for text, one in zip(texts, apart, strict=True)}
    assert apart[0]["perplexity"] != apart[1]["perplexity"]
    assert min(row["by_text"].values()) < row["perplexity"] < max(row["by_text"].values())
    assert row["num_tokens"] == sum(one["num_tokens"] for one in apart)
    assert "| passes | perplexity | valid.txt | other.txt | times dense |" in criteria_page(found)
    assert f"| {row['by_text'][texts[1]]:.2f} | 1.00 |" in criteria_page(found)


def test_a_row_is_measured_in_a_process_of_its_own(folder: Path) -> None:
    told: list[str] = []
    with listen(told.append):
        found = criteria_table(_settings(folder), jobs_of(["wanda"]))
    dense, wanda = found["rows"]
    assert (dense["name"], dense["num_sparse"], dense["times_dense"]) == ("dense", 0, 1.0)
    assert wanda["num_sparse"] == 14
    assert "criterion=wanda" in wanda["passes"]
    assert wanda["perplexity"] != dense["perplexity"]
    assert wanda["times_dense"] == wanda["perplexity"] / dense["perplexity"]
    assert 0 < wanda["relative_error"] < 1
    assert wanda["peak_bytes"] > 50 * 2**20
    assert told[0] == "row 1 of 2: dense"


def test_the_command_writes_the_table_and_goes_on_where_it_was(folder: Path, tmp_path: Path, here: list[str]) -> None:
    def run(*extra: str) -> tuple[int, str]:
        texts = ["--calibration", str(folder / "train.txt"), "--eval-text", str(folder / "valid.txt")]
        arguments = ["criteria", str(folder / "model"), *texts]
        arguments += ["--num-sequences", "4", "--context", "24", "--eval-context", "24", "--max-tokens", "100"]
        done = CliRunner().invoke(app, [*arguments, "--work", str(tmp_path / "work"), *extra])
        return done.exit_code, done.output

    assert run("--criteria", "magnitude")[0] == 0
    assert here == ["dense", "magnitude"]
    files = ("--json", str(tmp_path / "table.json"), "--out", str(tmp_path / "table.md"))
    code, said = run("--criteria", "magnitude,wanda", "--passes", "nm_sparsify{criterion=magnitude},slorb{k=4}", *files)
    assert code == 0
    assert here == ["dense", "magnitude", "wanda", "nm_sparsify{criterion=magnitude},slorb{k=4}"]
    document = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in document["rows"]] == here
    page = (tmp_path / "table.md").read_text()
    assert criteria_page(document) in page
    for row in document["rows"]:
        assert any(row["name"][:8] in line and f"{row['perplexity']:.2f}" in line for line in said.splitlines())
    assert str(folder) not in page, "folders of this machine say nothing to others"

    code, said = run("--criteria", "magnitude", "--seed", "1")
    assert code == 2
    assert "holds rows measured with seed 0, and this run has 1" in " ".join(said.split())


def test_a_changed_text_is_not_mixed_with_earlier_rows(folder: Path, tmp_path: Path, here: list[str]) -> None:
    text = tmp_path / "train.txt"
    text.write_text(WORDS * 40, encoding="utf-8")
    settings = _settings(folder, calibration=text)
    criteria_table(settings, [], work=tmp_path / "work")
    text.write_text(WORDS * 41, encoding="utf-8")
    with pytest.raises(SparsepassError, match="holds rows measured with digests"):
        criteria_table(settings, [], work=tmp_path / "work")
    assert here == ["dense"]


def test_what_a_row_complains_of_is_told_with_its_name(folder: Path, tmp_path: Path, here: list[str]) -> None:
    job = Job(name="odd", passes="nm_sparsify{pattern=2:5,criterion=magnitude}")
    with pytest.raises(SparsepassError, match=r"odd: pass nm_sparsify .*not a multiple of 5"):
        criteria_table(_settings(folder), [job], work=tmp_path / "work")
    assert here == ["dense", "odd"]
    assert len(list((tmp_path / "work").iterdir())) == 2, "the settings and the dense row"


def test_a_process_that_dies_is_told_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9))
    with pytest.raises(SparsepassError, match=r"dense: .* ended by signal 9; .* lack of memory"):
        criteria_table(_settings(folder), [])


def test_rows_are_all_criteria_by_default_and_bad_ones_are_refused(folder: Path) -> None:
    assert [job.name for job in jobs_of()] == list(CRITERIA)
    with pytest.raises(SparsepassError, match="did you mean 'wanda'"):
        jobs_of(["wandas"])
    with pytest.raises(SparsepassError, match="twice"):
        jobs_of(["wanda", "wanda"])
    with pytest.raises(SparsepassError, match="unknown pass"):
        jobs_of(pipelines=["nm_sparse"])
    with pytest.raises(SparsepassError, match="does not exist"):
        criteria_table(_settings(folder, text="nowhere.txt"), [])


def test_an_interruption_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    words = [
        "criteria",
        str(folder / "model"),
        "--calibration",
        "python-docs",
        "--eval-text",
        "python-docs",
        "--eval-context",
        "32",
    ]
    command = [sys.executable, "-m", "sparsepass", *words, "--work", str(tmp_path / "work")]
    # A test run that was started in the background ignores this signal, and so would its children.
    heeds: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heeds) as process:
        assert process.stderr is not None
        assert "row 1 of" in process.stderr.readline()
        time.sleep(2)  # the child is there by now; a terminal sends the signal to both
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.splitlines() == ["Error: interrupted; an output folder that stood there before is as it was"]
