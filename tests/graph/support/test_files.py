import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparsepass.graph.support.checksums import CHECKSUMS_FILE, write_checksums
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.files import replaced_file, replaced_folder
from sparsepass.graph.support.places import check_free, check_place


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    write_checksums(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS_FILE)


def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system be one in which folders cannot change places in one step."""
    monkeypatch.setattr("sparsepass.graph.support.files._exchange", lambda one, other: False)


def write_half(out: Path, error: BaseException) -> None:
    with replaced_folder(out, force=True) as staging:
        (staging / "half.txt").write_text("half")
        raise error


def test_it_stands_there_only_when_the_block_has_ended(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with replaced_folder(out) as staging:
        (staging / "new.txt").write_text("new")
        assert not out.exists()
        assert staging.parent == out.parent  # the same disk, so that the move is a rename
    assert names(out) == ["new.txt"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("kept_away", [0o022, 0o007, 0o077])
def test_all_of_it_has_the_rights_that_the_umask_gives(kept_away: int, tmp_path: Path) -> None:
    before = os.umask(kept_away)
    try:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain.txt").write_text("")
        with replaced_folder(tmp_path / "out") as staging:
            (staging / "inner").mkdir(mode=0o700)
            safetensors.torch.save_file({"weight": torch.ones(2)}, staging / "inner" / "a.safetensors")
    finally:
        os.umask(before)
    folder, file = (tmp_path / "plain").stat().st_mode, (tmp_path / "plain.txt").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out", tmp_path / "out" / "inner")} == {folder}
    assert {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()} == {file}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with replaced_folder(tmp_path / "out") as staging:
        (staging / "new.txt").write_text("new")
    assert names(tmp_path / "out") == ["new.txt"]


def test_a_folder_that_is_not_empty_needs_force(old: Path) -> None:
    with (
        pytest.raises(SparsepassError, match=r"out is not empty; choose another one, or pass force=True"),
        replaced_folder(old),
    ):
        pytest.fail("the block must not run")
    assert names(old) == ["old.txt"]
    with replaced_folder(old, force=True) as staging:
        (staging / "new.txt").write_text("new")
    assert names(old) == ["new.txt"]
    assert names(old.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("defect"), KeyboardInterrupt(), SystemExit(1), PermissionError("no")])
def test_an_interruption_leaves_the_old_content(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_half(old, error)
    assert names(old) == ["old.txt"]
    assert names(old.parent) == ["out"]


def test_an_interruption_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "out", KeyboardInterrupt())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_and_the_old_content_stays(old: Path, error: Exception) -> None:
    with pytest.raises(SparsepassError, match=r"the disk is full: .*untouched; free some space"):
        write_half(old, error)
    assert names(old) == ["old.txt"]
    assert names(old.parent) == ["out"]


def too_large(path: Path) -> None:
    with replaced_file(path) as beside:
        beside.write_text("half")
        raise OSError(errno.EFBIG, "File too large")


def test_one_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(SparsepassError, match=r"may not grow so large.*untouched"):
        too_large(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with replaced_file(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"


def test_the_old_content_comes_back_if_the_last_move_fails(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "defect of the disk")
        real(source, target)

    in_two_steps(monkeypatch)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="defect"), replaced_folder(old, force=True):
        pass
    assert names(old) == ["old.txt"]
    assert names(old.parent) == ["out"]


def test_a_file_or_link_is_never_replaced(tmp_path: Path, old: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(old)
    for name in ("file", "link"):
        with pytest.raises(SparsepassError, match="exists and is not a folder"):
            check_free(tmp_path / name, force=True)


def test_the_folder_we_are_in_and_those_around_it_are_never_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = old / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for out in (Path(), Path(".."), old, Path.home()):
        with pytest.raises(SparsepassError, match="name a folder inside it"):
            check_free(out, force=True)
    check_free("new")
    assert names(old) == ["inner", "old.txt"]


def stays(monkeypatch: pytest.MonkeyPatch, out: Path, code: int = errno.EBUSY) -> None:
    """Let a folder be one that cannot be moved, as a mount point is."""
    in_two_steps(monkeypatch)
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source) == out or Path(target) == out:
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr("sparsepass.graph.support.files.os.replace", refuse)


@pytest.mark.parametrize("is_seen", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError("stop"), KeyboardInterrupt()])
def test_a_mount_point_gets_the_content_moved_in(
    is_seen: bool, error: BaseException | None, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old / "lost+found").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: is_seen and path == old)
    stays(monkeypatch, old)
    if error is not None:
        with pytest.raises(type(error)):
            write_half(old, error)
        assert names(old) == ["lost+found", "old.txt"]
    else:
        with replaced_folder(old, force=True) as staging:
            (staging / "new").mkdir()
            (staging / "new/a.txt").write_text("new")
        assert names(old) == ["lost+found", "new"]
    assert names(old.parent) == ["out"]


def test_the_old_content_comes_back_if_moving_in_fails(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == old)

    def fail(source: Path, target: Path) -> None:
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sparsepass.graph.support.files.shutil.move", fail)
    with pytest.raises(SparsepassError, match="disk is full"), replaced_folder(old, force=True) as staging:
        (staging / "new.txt").write_text("new")
    assert names(old) == ["old.txt"]


def test_a_fresh_file_system_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "out/lost+found").mkdir(parents=True)
    check_free(tmp_path / "out")


def test_a_mounted_file_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stays(monkeypatch, tmp_path / "a.txt")
    with replaced_file(tmp_path / "a.txt") as beside:
        beside.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsepassError, match="is no folder"):
        check_free(tmp_path / "file/out")
    with pytest.raises(SparsepassError, match="is no folder"):
        check_place(tmp_path / "file/table.json")
    check_place(tmp_path / "made/when/written.json")
    with pytest.raises(SparsepassError, match="is a folder"):
        check_place(tmp_path)
    monkeypatch.setattr("sparsepass.graph.support.files.os.access", lambda place, mode: Path(place) != tmp_path)
    for check in (check_free, check_place):
        with pytest.raises(SparsepassError, match="is read-only for you"):
            check(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    check_free(tmp_path / "mine")
