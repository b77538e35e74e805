"""Nothing is read from outside of a model's folder, and nothing that would hang."""

import os
from pathlib import Path

import pytest

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.inside import check_inside, file_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "sub").mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    return place


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "..", "/dev/null", "sub/../../secret"])
@pytest.mark.parametrize("name", ["model.safetensors", "sub/deep.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, target: str, name: str) -> None:
    (folder / name).symlink_to(target if name[:3] != "sub" or target.startswith("/") else f"../{target}")
    with pytest.raises(SparsepassError, match="out of the folder"):
        check_inside(folder)
    with pytest.raises(SparsepassError, match="out of the folder"):
        file_inside(folder, name, "index.json")


def test_a_link_by_way_of_another_is_refused(folder: Path) -> None:
    (folder / "up").symlink_to("..")
    (folder / "weights.bin").symlink_to("up/secret")
    with pytest.raises(SparsepassError, match="out of the folder"):
        file_inside(folder, "weights.bin", "index.json")


def test_links_inside_are_taken(folder: Path, tmp_path: Path) -> None:
    (folder / "also.json").symlink_to("config.json")
    (folder / "sub" / "up.json").symlink_to("../config.json")
    (folder / "nothing").symlink_to("missing")
    (folder / ".git").symlink_to("/")  # is read by nobody
    check_inside(folder)
    (tmp_path / "named").symlink_to(folder)
    check_inside(tmp_path / "named")
    assert file_inside(tmp_path / "named", "also.json", "index.json").read_text() == "{}"


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo"])
def test_a_pipe_is_refused(folder: Path, kind: str) -> None:
    os.mkfifo(folder / "sub" / "pipe")
    if kind != "fifo":
        (folder / "tokenizer.json").symlink_to("sub/pipe")
    with pytest.raises(SparsepassError, match="is a pipe or a device"):
        check_inside(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "", "a\0b"])
def test_a_name_that_leads_out_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(SparsepassError, match=r"index\.json names .* outside the model's folder"):
        file_inside(folder, name, "index.json")


def test_the_cache_of_the_hub_is_taken(tmp_path: Path) -> None:
    """Snapshots are links into the blobs of the same repository, and of no other."""
    repository, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = repository / "snapshots" / "0123abc"
    for place in (snapshot / "onnx", repository / "blobs", other / "blobs"):
        place.mkdir(parents=True)
    for each in (repository, other):
        (each / "blobs" / "1f").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1f")
    (snapshot / "onnx" / "model.onnx").symlink_to("../../../blobs/1f")
    check_inside(snapshot)
    check_inside(snapshot / "onnx")
    assert file_inside(snapshot / "onnx", "model.onnx", "graph").read_text() == "{}"
    (snapshot / "model.safetensors").symlink_to("../../../models--c--d/blobs/1f")
    with pytest.raises(SparsepassError, match="out of the folder"):
        check_inside(snapshot)


def test_blobs_that_are_a_link_lead_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").symlink_to("/etc")
    (snapshot / "config.json").symlink_to("../../blobs/passwd")
    with pytest.raises(SparsepassError, match="out of the folder"):
        check_inside(snapshot)
