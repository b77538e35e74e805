"""The report's schema: what is written, what is refused, and that its documentation is complete."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model
from tests.export.cli.commands import run
from tests.export.report import documentation
from tests.export.report.reports import full_report, html_page, markdown_page
from tests.export.tiny import save_tiny_llama

from sparsepass.export.report import view
from sparsepass.export.report.blocks import EVERYWHERE, Block, Sentence
from sparsepass.export.report.document import (
    HTML_FILE,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    add_to_report,
    find_report,
    new_report,
    plain_json,
    read_report,
    write_pages,
    write_report,
)
from sparsepass.export.report.pages import render_html, render_markdown
from sparsepass.export.report.parts import Part
from sparsepass.export.report.schema import SCHEMA_VERSION, SECTIONS, ReportDocument, check_report, json_schema
from sparsepass.export.report.view import VIEWS
from sparsepass.export.report.words import size
from sparsepass.export.stages.preparing import prepare, write_program
from sparsepass.export.stages.settings import Calibration
from sparsepass.graph import SparsepassError


def test_a_full_report_round_trips_through_its_file(tmp_path: Path) -> None:
    written = write_report(tmp_path, full_report())
    assert read_report(tmp_path) == read_report(tmp_path / REPORT_FILE) == written
    assert (tmp_path / RECIPE_FILE).read_text() == "nm_sparsify{pattern=2:4}\n"
    assert (tmp_path / PAGE_FILE).read_text() == markdown_page(written)
    assert (tmp_path / HTML_FILE).read_text() == html_page(written)


def test_the_page_tells_a_newcomer_what_matters() -> None:
    page = markdown_page(check_report(full_report()))
    assert "Verification did NOT hold" in page
    assert "| dense | 10 | 1.00x |" in page
    assert "| 2:4 | 15 | 1.50x |" in page
    assert "| 7 \\| 4 | 1 | b |" in page
    assert "1.2 MB" in page
    assert "| outputs | DID NOT HOLD | they differ |" in page
    assert "| other | not checked |" in page
    assert "| decode | SM89 | 1.0 kB |  |  |  | 1 yes, 2 unknown |  |" in page
    assert "| a sparse tactic | yes | 1 |" in page
    assert "| 1 | 64 | 3 | 2 | 1.50x |" in page
    assert "sparse is faster everywhere" in page


def test_unknown_sections_are_kept_and_shown(tmp_path: Path) -> None:
    written = write_report(tmp_path, full_report() | {"retrain": {"steps": 150}})
    assert read_report(tmp_path)["retrain"] == {"steps": 150}
    assert "## retrain" in markdown_page(written)


def test_infinities_are_written_as_text_that_any_json_reader_takes(tmp_path: Path) -> None:
    report = full_report()
    report["accuracy"]["measurements"][1]["perplexity"] = math.inf
    write_report(tmp_path, report)
    raw = (tmp_path / REPORT_FILE).read_text()
    assert json.loads(raw, parse_constant=pytest.fail)["accuracy"]["measurements"][1]["perplexity"] == "inf"
    assert "| 2:4 | inf |" in (tmp_path / PAGE_FILE).read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "other"}, "no sparsepass report"),
        ({"schema_version": SCHEMA_VERSION + 1}, "upgrade sparsepass"),
        ({"schema_version": "1"}, "expected an integer"),
        ({"recipe": None}, "'recipe' is None, expected text"),
        ({"runs": [{}]}, r"runs\[0\] has no field 'stage'"),
        ({"model": []}, "model is a list where an object is expected"),
        ({"passes": {"num_sites": True}}, "'num_sites' is True, expected integer"),
        (
            {"verification": {"held": None, "checks": [{"name": "x"}]}},
            r"verification.checks\[0\] has no field 'summary'",
        ),
    ],
)
def test_a_broken_or_newer_report_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    broken = full_report() | change
    with pytest.raises(SparsepassError, match=said):
        check_report(broken)
    (tmp_path / REPORT_FILE).write_text(json.dumps(broken))
    with pytest.raises(SparsepassError):
        read_report(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="does not exist"):
        read_report(tmp_path)
    assert find_report(tmp_path) is None
    (tmp_path / REPORT_FILE).write_text('{"schema": "somebody else\'s"}')
    assert find_report(tmp_path) is None
    (tmp_path / REPORT_FILE).write_text("{")
    with pytest.raises(SparsepassError, match="cannot be read as JSON"):
        find_report(tmp_path)


def test_a_report_holds_plain_values_only() -> None:
    with pytest.raises(TypeError, match="plain values"):
        plain_json({"x": object()})


def test_every_section_has_a_view() -> None:
    assert set(VIEWS) == set(SECTIONS)


def test_the_documentation_is_made_from_the_models() -> None:
    text = documentation.FILE.read_text(encoding="utf-8")
    assert text == documentation.whole(), "docs/report.md is old: python -m tests.export.report.documentation"
    for name, model in SECTIONS.items():
        assert f"### `{name}`" in text
        assert all(field.description for field in model.model_fields.values()), name


def test_the_command_prints_the_json_schema() -> None:
    printed = json.loads(run("report", "--schema").stdout)
    assert printed == json_schema()
    assert set(SECTIONS) < set(printed["properties"])
    assert set(printed["required"]) == set(new_report())


def test_a_program_keeps_the_name_that_its_report_gave_the_calibration_text(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "tiny")
    calibration = Calibration(data="python-docs", num_sequences=1, context=8)
    prepared = prepare(tmp_path / "tiny", passes="nm_sparsify", calibration=calibration, validate=False, progress=False)
    named = write_program(prepared, tmp_path / "pruned")["passes"]["passes"]
    assert named[0]["calibration"]["source"].startswith("Python's documentation topics")
    again = prepare(tmp_path / "pruned", passes=None).document["passes"]["passes"]
    assert [record["calibration"]["source"] for record in again] == [record["calibration"]["source"] for record in named]


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 538_000_000, 7e12)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "538.0 MB",
        "7000.0 GB",
    ]


def test_a_section_is_a_model_a_field_and_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    class LatencySection(Part):
        tokens_per_second: float

    def latency_view(section: LatencySection, report: ReportDocument) -> Iterator[Block]:
        yield Sentence(f"`{report.recipe}` runs at {section.tokens_per_second} tokens a second.", on=EVERYWHERE)

    extended = create_model("Extended", __base__=ReportDocument, latency=(LatencySection | None, None))
    monkeypatch.setattr(view, "VIEWS", {**VIEWS, "latency": ("Latency", latency_view)})
    found = view.report_view(extended.parse(full_report() | {"latency": {"tokens_per_second": 9.5}}))
    assert "## Latency\n\n`nm_sparsify{pattern=2:4}` runs at 9.5 tokens a second." in render_markdown(found)
    assert "<p><code>nm_sparsify{pattern=2:4}</code> runs at 9.5 tokens a second.</p>" in render_html(found)
    with pytest.raises(SparsepassError, match="latency: field 'tokens_per_second' is 'many', expected number"):
        extended.parse(full_report() | {"latency": {"tokens_per_second": "many"}})


def test_what_two_add_at_once_is_all_there(tmp_path: Path) -> None:
    place = tmp_path / "report"

    def add(name: str) -> None:
        for _ in range(5):
            add_to_report(place, {}, stage=name, command=None, seconds=0.0)

    add_to_report(place, {}, stage="first", command=None, seconds=0.0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add, ("plan", "verify")))
    stages = [run["stage"] for run in read_report(place)["runs"]]
    assert sorted(stages) == ["first", *["plan"] * 5, *["verify"] * 5]


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_pages_of_another_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SparsepassError, match="did not write"):
        write_pages(tmp_path, new_report())
    assert (tmp_path / name).read_text() == "mine"
