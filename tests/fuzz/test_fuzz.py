"""Files from strangers: each kind damaged in some hundred ways, and every one that once failed."""

import json
from pathlib import Path

import pytest
from tests.fuzz.running import CORPUS, all_kinds, read_once, run_cases, unpacked

_CASES = {"language_model": 30}


@pytest.mark.parametrize("name", all_kinds())
def test_a_damaged_file_is_read_or_refused_in_words(name: str) -> None:
    found = run_cases(name, seed=0, number=_CASES.get(name, 100))
    assert not found.failures, found.failures[0][0]
    assert found.counts["refused"]


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*.json")), ids=lambda file: file.stem)
def test_what_failed_once_does_not_fail_again(file: Path) -> None:
    case = json.loads(file.read_text())
    assert read_once(case["kind"], unpacked(case["files"])) in ("read", "refused")
