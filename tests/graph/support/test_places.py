"""An output is never an input, nor what another wrote."""

import os
from pathlib import Path

import pytest

from sparsepass.graph.support.checksums import CHECKSUMS_FILE, write_checksums
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.files import replaced_file, replaced_folder
from sparsepass.graph.support.places import check_apart, check_free, check_place, check_writable


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "project" / "text").symlink_to(tmp_path / "text.txt")
    os.link(tmp_path / "text.txt", tmp_path / "hard.txt")
    return folder


@pytest.mark.parametrize(
    ("out", "given", "relation"),
    [
        ("project/model", "project/model", "is"),
        ("project/sub/../model", "project/model", "is"),
        ("link", "project/model", "is"),
        ("project/model", "link", "is"),
        ("project/model/new", "project/model", "lies in"),
        ("link/new/deep", "project/model", "lies in"),
        ("project/model/sub", "link", "lies in"),
        ("project", "project/model", "holds"),
        (".", "link", "holds"),
        ("project", "project/text", "holds"),  # the link would go with the folder
        ("text.txt", "text.txt", "is"),
        ("hard.txt", "text.txt", "is"),
    ],
)
def test_an_output_is_apart_from_every_input(model: Path, tmp_path: Path, out: str, given: str, relation: str) -> None:
    with pytest.raises(SparsepassError, match=rf"output .* {relation} the input .*{given}; choose a place apart"):
        check_apart(tmp_path / out, [None, "organisation/name", tmp_path / given])
    with pytest.raises(SparsepassError, match="the input"):
        check_writable(tmp_path / out, inputs=[tmp_path / given])
    if not out.endswith(".txt"):
        with (
            pytest.raises(SparsepassError, match="the input"),
            replaced_folder(tmp_path / out, force=True, inputs=[tmp_path / given]),
        ):
            pytest.fail("the block must not run")
    assert (model / "config.json").read_text() == "{}"


@pytest.mark.parametrize("out", ["project/model2", "project/new", "new", "text", "models/model"])
def test_what_lies_beside_an_input_is_free(model: Path, tmp_path: Path, out: str) -> None:
    check_free(tmp_path / out, inputs=[model, tmp_path / "text.txt"])


def test_only_what_was_written_here_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced_folder(out) as staging:
        (staging / "a").write_text("1")
    assert (out / CHECKSUMS_FILE).is_file()
    with replaced_folder(out, force=True) as staging:
        (staging / "a").write_text("2")
    (out / "a").write_text("edited")  # ours, whoever edited it
    check_free(out, force=True)
    for name in ("notes.txt", ".git/config", "sub/deep.txt"):
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(SparsepassError, match=f"holds {name}, which sparsepass did not write there"):
            check_free(out, force=True)
        path.unlink()
    (out / "linked").symlink_to(tmp_path)
    with pytest.raises(SparsepassError, match="holds linked"):
        check_free(out, force=True)
    (out / "linked").unlink()
    (out / "inner").mkdir()
    (out / "inner" / "b").write_text("b")
    write_checksums(out / "inner")  # a result of its own, such as the demo's second one
    check_free(out, force=True)


def test_a_folder_of_another_is_refused_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "sparsepass-report"}')
    with pytest.raises(SparsepassError, match="sparsepass did not write it"):
        check_free(tmp_path, force=True)


def write_twice(out: Path) -> None:
    with replaced_folder(out) as second:
        (second / "a").write_text("second")
        with replaced_folder(out) as first:
            (first / "a").write_text("first")


def test_a_folder_that_came_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SparsepassError, match="by another process meanwhile"):
        write_twice(out)
    assert (out / "a").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_a_file_takes_the_place_of_files_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    (tmp_path / "file").write_text("text")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("file" if kind == "link" else "nothing"))
    with pytest.raises(SparsepassError, match="no file takes its place"):
        check_place(path, force=True)
    with pytest.raises(SparsepassError, match="no plain file"), replaced_file(path):
        pytest.fail("the block must not run")
    assert path.is_symlink() or path.is_fifo()
    assert (tmp_path / "file").read_text() == "text"


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("mine")
    with pytest.raises(SparsepassError, match="sparsepass did not write"):
        check_place(path, is_ours=lambda path: False)
    check_place(path, is_ours=lambda path: True)
    path.write_text("")
    check_place(path, is_ours=lambda path: False)


def test_other_names_of_a_file_keep_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "b")
    with replaced_file(tmp_path / "a") as beside:
        beside.write_text("new")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new", "old"]
