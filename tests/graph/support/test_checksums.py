"""Checksums follow what is written later, and a run that is killed meanwhile leaves no folder that looks edited."""

import os
import signal
from pathlib import Path

import pytest

from sparsepass.graph.support import CHECKSUMS_FILE, changed_files, checksums_follow, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "weights").write_text("weights")
    write_checksums(tmp_path)
    return tmp_path


def files_amiss(folder: Path) -> list[str]:
    return [change.file for change in changed_files(folder)]


def test_what_the_block_writes_is_known(folder: Path) -> None:
    with checksums_follow(folder, ("report.json",)):
        (folder / "report.json").write_text("new")
    assert not files_amiss(folder)
    assert "being_written" not in (folder / CHECKSUMS_FILE).read_text()


def test_a_block_that_fails_leaves_nothing_open(folder: Path) -> None:
    def fail() -> None:
        with checksums_follow(folder, ("report.json",)):
            (folder / "report.json").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not files_amiss(folder)
    (folder / "report.json").write_text("edited")
    assert files_amiss(folder) == ["report.json"]


def test_a_run_that_is_killed_in_the_block_leaves_no_edit(folder: Path) -> None:
    child = os.fork()
    if child == 0:
        with checksums_follow(folder, ("report.json", "pages")):
            (folder / "report.json").write_text("half")
            (folder / "pages").mkdir()
            (folder / "pages" / "one").write_text("one")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not files_amiss(folder)
    (folder / "weights").write_text("edited")
    assert files_amiss(folder) == ["weights"], "the rest is looked at as ever"

    with checksums_follow(folder, ("report.json", "pages")):
        (folder / "report.json").write_text("new")
    assert files_amiss(folder) == ["weights"]
    (folder / "report.json").write_text("edited")
    assert files_amiss(folder) == ["report.json", "weights"]


def test_what_was_edited_before_stays_so(folder: Path) -> None:
    (folder / "report.json").write_text("edited")
    with checksums_follow(folder, ("report.json",)):
        pass
    assert files_amiss(folder) == ["report.json"]
