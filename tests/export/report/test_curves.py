"""What a training run leaves in the report: curves of few points, tables, and pictures."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.export.report.reports import lines, record

from sparsepass.export.report.document import new_report, write_report
from sparsepass.export.report.pages import drawn_figures, render_markdown
from sparsepass.export.report.schema import ReportDocument, check_report
from sparsepass.export.report.sections import TrainingEntry
from sparsepass.export.report.training import NUM_POINTS, curve, retraining_run, training_facts, training_pictures
from sparsepass.export.report.view import ReportView, report_view
from sparsepass.graph import SparsepassError


def entry(run: dict[str, Any]) -> TrainingEntry:
    return TrainingEntry.model_validate(run, strict=True)


def view_of(run: dict[str, Any]) -> ReportView:
    return report_view(ReportDocument.parse(new_report() | {"retraining": {"runs": [run]}}))


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
    assert drawn == {f"figures/retraining-1-{what}.svg" for what in training_pictures(entry(run))}
    assert len(drawn) == 6
    page = (tmp_path / "report.md").read_text()
    assert all(f"]({name})" in page for name in drawn)
    assert "perplexity 20 at step 0, 18 at step 20, whose weights were kept" in page
    again = drawn_figures(view_of(run))
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
    assert set(training_pictures(entry(run))) == drawn
    assert len(drawn_figures(view_of(run))) == len(drawn)
    assert render_markdown(view_of(run)).count("![") == len(drawn)


def test_facts_tell_teacher_and_validation() -> None:
    def facts(**changes: Any) -> dict[str, str]:
        return dict(training_facts(entry(retraining_run(record(**changes), []))))

    assert facts()["teacher"] == "some/model"
    assert facts()["length"] == "40 steps, 2,560 tokens, 1.5 epochs"
    assert facts(teacher={"kind": "none"})["teacher"].startswith("none")
    assert facts(teacher={"kind": "CachedTeacher", "source": "m"})["teacher"] == "m, from cached logits"
    assert facts(validations=[])["validation"] == "none: the last weights were kept"
    assert "masks" not in facts(settings={"method": "fixed"})
