"""What killed runs leave is removed by the next one, and what a living run writes stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsepass.graph.support.checksums import CHECKSUMS_FILE, changed_files, checksums_follow
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.files import replaced_file, replaced_folder
from sparsepass.graph.support.places import check_free, check_place
from sparsepass.graph.support.temporaries import alone_in, lock_now, sweep, waiting_for

LOCKED = """
import fcntl, os, sys
held = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(held, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Let another process hold the lock of a file or folder."""
    command = [sys.executable, "-S", "-c", LOCKED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield process
        finally:
            process.kill()


def left(place: Path, name: str = ".out.abcd_123.partial") -> Path:
    folder = place / name
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "half").write_text("half")
    return folder


def test_what_a_killed_run_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    dead, living = left(tmp_path), left(tmp_path, ".out.01234567.partial")
    (tmp_path / ".out.zzzzzzzz.partial").write_text("half")
    with held_by_another(living) as owner:
        check_free(tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == [living.name]
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        check_free(tmp_path / "out")
    assert not dead.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".out.partial", ".out.abcd_123.other", ".other.abcd_123.partial", ".out.a.b.partial", "out2"])
def test_other_names_are_left_alone(tmp_path: Path, name: str) -> None:
    left(tmp_path, name)
    sweep(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.abcd_123.partial").symlink_to(tmp_path / "precious")
    sweep(tmp_path / "out")
    assert (tmp_path / ".out.abcd_123.partial").is_symlink()


@pytest.mark.parametrize("is_there", [False, True])
def test_an_old_result_is_put_back(tmp_path: Path, is_there: bool) -> None:
    aside = tmp_path / ".out.abcd_123.old" / "out"
    aside.mkdir(parents=True)
    (aside / "a").write_text("old")
    if is_there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("new")
    sweep(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == ("new" if is_there else "old")


KILLED = """
import os, sys
from pathlib import Path
from sparsepass.graph.support.files import replaced_folder, replaced_file
place, step = Path(sys.argv[1]), sys.argv[2]
if step == "file":
    with replaced_file(place / "file") as beside:
        beside.write_text("half")
        os.kill(os.getpid(), 9)
real = os.replace
def replace(*names):
    if step == "before": os.kill(os.getpid(), 9)
    real(*names)
    if step == "after": os.kill(os.getpid(), 9)
import sparsepass.graph.support.files as files
if step in ("before", "after"):
    files._exchange, os.replace = (lambda *_: False), replace
with replaced_folder(place / "out", force=True) as staging:
    (staging / "a").write_text("new")
    if step == "writing": os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("step", ["writing", "before", "after", "file", "none"])
def test_a_killed_writer_leaves_the_old_result(tmp_path: Path, step: str) -> None:
    with replaced_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("old")
    (tmp_path / "file").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), step], check=False)
    assert done.returncode == (0 if step == "none" else -signal.SIGKILL)
    check_free(tmp_path / "out", force=True)
    check_place(tmp_path / "file")
    assert (tmp_path / "out" / "a").read_text() == ("new" if step == "none" else "old")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"], "nothing is left beside"
    assert changed_files(tmp_path / "out") == ()


def test_two_folders_change_places_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replaced_folder(tmp_path / "out") as staging:
        (staging / "a").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("there is a moment without a result"))
    monkeypatch.setattr("sparsepass.graph.support.files.write_checksums", lambda folder: None)
    with replaced_folder(tmp_path / "out", force=True) as staging:
        (staging / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_not_taken_twice(tmp_path: Path) -> None:
    with held_by_another(tmp_path):
        assert lock_now(tmp_path) is None
        with pytest.raises(SparsepassError, match="another process is at work in"), alone_in(tmp_path):
            pytest.fail("the block must not run")
    with alone_in(tmp_path / "new" / "folder"), waiting_for(tmp_path):
        pass
    with alone_in(None):
        pass


ADDING = """
import sys
from pathlib import Path
from sparsepass.graph.support.checksums import checksums_follow
from sparsepass.graph.support.files import write_text
for _ in range(20):
    with checksums_follow(Path(sys.argv[1]), ["list"]):
        known = Path(sys.argv[1], "list").read_text()
        write_text(Path(sys.argv[1], "list"), known + sys.argv[2])
"""


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as staging:
        (staging / "list").write_text("")
    writers = [subprocess.Popen([sys.executable, "-c", ADDING, str(tmp_path / "out"), word]) for word in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    text = (tmp_path / "out" / "list").read_text()
    assert (text.count("a"), text.count("b")) == (20, 20)
    assert changed_files(tmp_path / "out") == ()


def test_checksums_do_not_make_an_edit_good_in_passing(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as staging:
        for name in ("report.json", "report.md", "other"):
            (staging / name).write_text("1")
    (tmp_path / "out" / "report.json").write_text("edited")
    with checksums_follow(tmp_path / "out", ["report.json", "report.md", "figures"]):
        for name in ("report.json", "report.md", "figures"):
            with replaced_file(tmp_path / "out" / name) as beside:
                beside.write_text("2")
    assert [change.file for change in changed_files(tmp_path / "out")] == ["report.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format": 1}', '{"format": 1, "files": []}', '{"format": "x", "files": {}}', "\udcff"]
    + [f'{{"format": 1, "files": {{"{name}": {{"bytes": 1, "sha256": ""}}}}}}' for name in ("../a", "/a", "a//b", "./a")]
    + ["[" * 20_000],
)
def test_damaged_checksums_are_said(tmp_path: Path, text: str) -> None:
    (tmp_path / CHECKSUMS_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SparsepassError, match=rf"{CHECKSUMS_FILE} is damaged"):
        changed_files(tmp_path)


def test_each_kind_of_change_is_named(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as staging:
        (staging / "sub").mkdir()
        for name in ("a", "b", "sub/c", "same"):
            (staging / name).write_text("1")
    out = tmp_path / "out"
    (out / "a").write_text("2")
    (out / "b").unlink()
    (out / "sub" / "d").write_text("1")
    (out / ".DS_Store").write_text("1")
    os.truncate(out / "sub" / "c", 0)
    assert [(change.file, change.kind) for change in changed_files(out)] == [
        ("a", "changed"),
        ("b", "missing"),
        ("sub/c", "changed"),
        ("sub/d", "added"),
    ]
    assert [change.file for change in changed_files(out, ["a", "b", "same"])] == ["a"]
