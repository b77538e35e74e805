"""docs/architectures.md is that of the results, the results say nothing wrong, and some rows come out again."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tests.architectures import documentation
from tests.architectures.check import check
from tests.architectures.tiny import causal_language_models

_FAILING = {"sarvam_moe"}  # its hf folder is not read back as it was written


def test_the_page_is_that_of_the_results() -> None:
    said = "docs/architectures.md is old: python -m tests.architectures.documentation"
    assert documentation.PAGE.read_text(encoding="utf-8") == documentation.page(), said


def test_every_class_of_that_transformers_has_a_row() -> None:
    rows = documentation.rows()
    if {row["versions"]["transformers"] for row in rows.values() if "versions" in row} != {version("transformers")}:
        pytest.skip("made with another transformers")
    assert {kind: row["class"] for kind, row in rows.items()} == causal_language_models()


@pytest.mark.parametrize("kind", documentation.rows())
def test_nothing_is_wrong_and_nothing_crashed(kind: str) -> None:
    row = documentation.rows()[kind]
    parts = [row[name] for name in ("capture", "hf", "onnx") if name in row]
    assert "error" not in row
    known = {"did_not_hold"} if kind in _FAILING else set()
    assert {part["state"] for part in parts} <= {"held", "refused", "unbuilt", "not_checked", "not_run"} | known, row
    assert not any(part.get("wrong") or part.get("raw") for part in parts), row


@pytest.mark.parametrize("kind", ["doge", "gpt2", "roberta"])
def test_a_row_comes_out_again(kind: str, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    list(check(kind, tmp_path, found))
    wanted = documentation.rows()[kind]
    for part in ("capture", "hf", "onnx"):
        keys = ("state", "layout", "holds", "refuses", "wrong", "raw") if part != "hf" else ("state",)
        assert {key: found[part].get(key) for key in keys} == {key: wanted[part].get(key) for key in keys}, part
