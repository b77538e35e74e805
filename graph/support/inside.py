"""What is read from a folder lies in it: a model is a download, and names and links in it could lead anywhere."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sparsepass.graph.support.errors import SparsepassError

_NAME_BYTES: Final = 255
_PATH_LENGTH: Final = 1000
_DEPTH: Final = 3
"""Folders below a model's that are looked into: those of its modules, adapters and samples."""


def check_inside(folder: str | Path) -> None:
    """Refuse a folder of a model with links that lead out of it, or with pipes and devices, which would hang or never end.

    The hub's cache is such a folder: its files are links into the blobs of the same repository. Names that begin with a dot are
    read by nobody.

    Args:
        folder: The folder, or a link to it.

    Raises:
        SparsepassError: If there is one; it is named.
    """
    place = Path(folder)
    roots = _roots(place)
    for path in _entries(place, _DEPTH):
        _check(path, place, roots)


def file_inside(folder: Path, name: str, told_by: str) -> Path:
    """The path of a file that another file names: an index, or an ONNX graph.

    Args:
        folder: Where that other file lies.
        name: The name it gives.
        told_by: That other file, for the message.

    Raises:
        SparsepassError: If the path leads out of the folder, or to a pipe or a device.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise SparsepassError(f"{told_by} names {name!r}, which lies outside the model's folder; do not trust this download")
    if not is_file_name(name):
        raise SparsepassError(f"{told_by} names {name!r:.100}, which is no name of a file; copy or download the model again")
    _check(folder / name, folder, _roots(folder))
    return folder / name


def is_file_name(name: str) -> bool:
    r"""Whether a file may have that name: no control characters, and not too long for a file system.

    Example:
        >>> is_file_name("a/model.safetensors"), is_file_name("a\nb"), is_file_name("é" * 200)
        (True, False, False)
    """
    return (
        name.isprintable() and all(len(part.encode()) <= _NAME_BYTES for part in Path(name).parts) and len(name) < _PATH_LENGTH
    )


def _roots(folder: Path) -> tuple[Path, ...]:
    place = folder.resolve()
    snapshot = next((each for each in (place, *place.parents[:_DEPTH]) if each.parent.name == "snapshots"), None)
    return (place,) if snapshot is None else (place, snapshot.parents[1] / "blobs")


def _entries(folder: Path, depth: int) -> Iterator[Path]:
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # whoever reads it says what is wrong
        return
    for entry in found:
        if not entry.name.startswith("."):
            yield Path(entry.path)
            if depth and entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path), depth - 1)


def _check(path: Path, folder: Path, roots: tuple[Path, ...]) -> None:
    try:
        target = path.resolve()
        kind = path.stat().st_mode
    except (OSError, RuntimeError):  # a link to nothing, or in a circle; or a file that is missing, as its reader will say
        return
    if not any(target.is_relative_to(root) for root in roots):
        raise SparsepassError(
            f"{path} leads to {target}, out of the folder {folder}; copy what it leads to into the folder if you trust it"
        )
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise SparsepassError(f"{path} is a pipe or a device, and files are expected; remove it from the folder {folder}")
