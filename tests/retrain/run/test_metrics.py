"""The metrics file: whole lines at once, no step twice after a resumption, nothing lost in silence."""

import json
import math
from pathlib import Path

import pytest

from sparsepass.graph import SparsepassError
from sparsepass.retrain.run.metrics import MetricsFile, read_metrics


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in range(1, 6):
            metrics.write({"step": step, "loss": 1 / step})
            if step % 2 == 0:
                metrics.write({"step": step, "validation_loss": 2 / step})
    return path


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m") as metrics:
        metrics.write({"step": 1, "loss": 0.1 + 0.2, "flips": {"layer 0": 0.5}})
        assert (tmp_path / "m").read_text() == '{"step": 1, "loss": 0.30000000000000004, "flips": {"layer 0": 0.5}}\n'


def test_a_resumed_run_drops_what_it_will_measure_again(path: Path) -> None:
    with MetricsFile(path, resumed_at=3) as metrics:
        assert steps(path) == [1, 2, 2, 3]
        metrics.write({"step": 4, "loss": 9.0})
    assert steps(path) == [1, 2, 2, 3, 4]
    assert read_metrics(path)[-1]["loss"] == 9.0


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', '{"step": 6, "loss": 1.0}', "\x00\x00"])
def test_a_torn_last_line_is_dropped(path: Path, torn: str) -> None:
    with path.open("a") as file:
        file.write(torn)
    assert steps(path) == [1, 2, 2, 3, 4, 4, 5]
    with MetricsFile(path, resumed_at=10) as metrics:
        metrics.write({"step": 6})
    assert steps(path) == [1, 2, 2, 3, 4, 4, 5, 6]


def test_a_new_run_starts_an_empty_file(path: Path) -> None:
    with MetricsFile(path):
        assert path.read_text() == ""


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"loss": 1}', '{"step": "one"}'])
def test_a_line_that_was_not_torn_but_changed_is_an_error(path: Path, line: str) -> None:
    before = path.read_text()
    path.write_text(line + "\n" + before)
    with pytest.raises(SparsepassError, match=r"line 1 of .*metrics\.jsonl (is not a JSON object|cannot be read)"):
        MetricsFile(path, resumed_at=3)
    assert path.read_text() == line + "\n" + before


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m") as metrics:
        metrics.write({"step": 1, "loss": math.nan, "layers": [math.inf, 1.0], "flips": {"a": -math.inf}})
    (line,) = (tmp_path / "m").read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    values = json.loads(line, parse_constant=refuse)
    assert values == {"step": 1, "loss": None, "layers": [None, 1.0], "flips": {"a": None}}


def test_only_the_first_process_writes(path: Path) -> None:
    before = path.read_text()
    with MetricsFile(path, enabled=False) as metrics:
        metrics.write({"step": 1})
    assert path.read_text() == before


def test_a_line_without_a_step_is_refused(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m") as metrics, pytest.raises(SparsepassError, match="needs a step"):
        metrics.write({"loss": 1.0})
