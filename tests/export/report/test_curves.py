"""What a training run leaves in the report: curves of few points, tables, and pictures."""

import math
from pathlib import Path
from typing import Any

import pytest

from sparsepass.export.report.curves import NUM_POINTS, curve, retraining_run
from sparsepass.export.report.document import check_report, new_report, write_report
from sparsepass.export.report.figures import drawn_figures, figure_names
from sparsepass.export.report.retraining import retraining_part, training_facts
from sparsepass.graph import SparsepassError


def lines(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl as a run writes them."""
    return [
        {
            "step": step, "tokens": 64 * step, "loss": 4 - step / count, "kl": 1.0, "ce": 3.0, "grad_norm": 0.5, "lr": 1e-3,
            "decay": 0.0, "flip_rate": 0.01 if step % 10 == 0 else 0.0, "flips_since_first": step / 10_000, "seconds": 0.1,
            "tokens_per_second": 640.0, "memory_bytes": 1 << 20,
        } | changes
        for step in range(1, count + 1)
    ]  # fmt: skip


def record(count: int = 40, **changes: Any) -> dict[str, Any]:
    """A run's entry of `Program.retraining`."""
    found = [{"step": s, "nll": 3.0, "perplexity": 20.0 - s / 10, "kl": 1.0 - s / 100, "num_tokens": 9} for s in (0, 20, 40)]
    return {
        "settings": {"method": "ast", "lr": 1e-3},
        "num_steps": count,
        "num_tokens": 64 * count,
        "seconds": 4.0,
        "step_of_weights": 20,
        "teacher": {"kind": "model", "class": "Llama", "source": "some/model"},
        "data": {"train": {"source": "a.txt", "epochs": 1.5}, "validation": None},
        "validations": found,
        "flips_since_first": 0.004,
        "flips_since_first_by_layer": {f"layers.{i}.{kind}.weight": 0.001 * i for i in range(3) for kind in ("up", "down")},
    } | changes


@pytest.mark.parametrize("count", [1, 7, 199, 200, 201, 1234])
def test_a_curve_is_means_over_equal_pieces(count: int) -> None:
    found = curve(lines(count))
    num = min(count, NUM_POINTS)
    ends = [math.floor((index + 1) * count / num) for index in range(num)]
    assert found["step"] == ends
    start = 0
    for index, end in enumerate(ends):
        losses = [4 - step / count for step in range(start + 1, end + 1)]
        assert found["loss"][index] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert abs(end - start - count / num) <= 1
        start = end


def test_what_was_not_finite_is_left_out_of_the_means() -> None:
    broken = lines(4)
    broken[1]["grad_norm"] = None
    assert curve(broken, 2)["grad_norm"] == [0.5, 0.5]
    assert curve(lines(2, kl=None))["kl"] == [None, None]
    assert curve([]) == {}


def test_a_run_is_a_section_that_the_schema_knows() -> None:
    run = retraining_run(record(), lines(40))
    document = check_report(new_report() | {"retraining": {"runs": [run]}})
    assert run["flips_by_layer"]["layers.2.up.weight"] == 0.002
    assert "flips_since_first_by_layer" not in run
    del document["retraining"]["runs"][0]["teacher"]
    with pytest.raises(SparsepassError, match="teacher"):
        check_report(document)


def test_the_page_names_the_pictures_that_are_drawn(tmp_path: Path) -> None:
    run = retraining_run(record(), lines(40))
    write_report(tmp_path, new_report() | {"retraining": {"runs": [run]}})
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.svg")}
    assert drawn == set(figure_names(1, run).values())
    assert len(drawn) == 6
    page = (tmp_path / "report.md").read_text()
    assert all(f"]({name})" in page for name in drawn)
    assert "perplexity 20 at step 0, 18 at step 20, whose weights were kept" in page
    again = drawn_figures({"runs": [run]})
    assert all(again[name] == (tmp_path / name).read_text() for name in drawn), "the same report, the same text"


@pytest.mark.parametrize(
    ("changes", "metrics", "drawn"),
    [
        ({}, 0, {"validation", "layers"}),
        ({"validations": []}, 40, {"loss", "flips", "moved", "rate", "layers"}),
        ({"flips_since_first_by_layer": {"layers.0.up.weight": 0.0}}, 1, {"loss", "validation", "moved", "rate"}),
    ],
)
def test_what_a_run_did_not_measure_is_not_drawn(changes: dict[str, Any], metrics: int, drawn: set[str]) -> None:
    run = retraining_run(record(**changes), lines(metrics))
    assert set(figure_names(1, run)) == drawn
    assert len(drawn_figures({"runs": [run]})) == len(drawn)
    assert retraining_part({"runs": [run]}).count("![") == len(drawn)


def test_facts_tell_teacher_and_validation() -> None:
    def facts(**changes: Any) -> dict[str, str]:
        return dict(training_facts(retraining_run(record(**changes), [])))

    assert facts()["teacher"] == "some/model"
    assert facts()["length"] == "40 steps, 2,560 tokens, 1.5 epochs"
    assert facts(teacher={"kind": "none"})["teacher"].startswith("none")
    assert facts(teacher={"kind": "CachedTeacher", "source": "m"})["teacher"] == "m, from cached logits"
    assert facts(validations=[])["validation"] == "none: the last weights were kept"
    assert "masks" not in facts(settings={"method": "fixed"})
