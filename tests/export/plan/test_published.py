"""The committed comparison with published figures: its score, what the documentation says of it, printing it anew."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks" / "results" / "plan_published.md"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "plan_published.py"))


def test_the_committed_score_is_enough() -> None:
    """Every direction right, and at least 80% within 20%."""
    text = RESULT.read_text(encoding="utf-8")
    both = text[text.index("## Both") :]
    found = re.search(r"(\d+) of (\d+) in the published direction, (\d+) of \d+", both)
    assert found is not None
    right, total, near = map(int, found.groups())
    assert right == total == 11
    assert near >= 0.8 * total
    assert f"all {total} have the published\ndirection and {near} are within 20%" in (ROOT / "docs" / "plan.md").read_text()


def test_rows_know_a_miss_and_a_wrong_direction(script: dict[str, Any]) -> None:
    def row(low: float, high: float, predicted: float) -> Any:
        return script["Row"](what="", source="", low=low, high=high, predicted=predicted)

    assert row(1.1, 1.3, 1.2).off == 0
    assert row(1.0, 1.0, 1.5).off == pytest.approx(0.5)
    assert row(1.3, 1.8, 0.9).off == pytest.approx(0.9 / 1.3 - 1)
    assert not row(0.4, 0.4, 1.2).same_direction
    assert not row(1.3, 1.3, 0.9).same_direction
    assert "**miss**" in script["table"]([row(1.0, 1.0, 1.5)])
    assert "**other**" in script["table"]([row(1.0, 1.0, 1.5)])
    assert script["score"]([row(1.0, 1.0, 1.5), row(2, 2, 2)]).startswith("1 of 2 in the published direction, 1 of 2")


def test_rows_without_a_model_are_as_committed(script: dict[str, Any]) -> None:
    assert script["table"](script["storage"]()) in RESULT.read_text(encoding="utf-8")
    torch_row = f"| {script['gemm']('a100', 'torch', 1, 4096, 4096):.2f}x |"
    assert f"pytorch/pytorch issue 111339 | 0.111x {torch_row}" in RESULT.read_text(encoding="utf-8")


def test_the_script_prints_what_is_committed(script: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    script["main"]()
    assert capsys.readouterr().out.strip() in RESULT.read_text(encoding="utf-8")
