"""Where something may be written: never over an input, never over what another wrote."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from sparsepass.graph.support.checksums import CHECKSUMS_FILE, foreign_file
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.temporaries import sweep

LOST_AND_FOUND: Final = "lost+found"
"""What a file system of its own has in its topmost folder."""

Inputs = Iterable[str | Path | None]
"""What a command reads. Texts that name nothing here, such as hub ids, and None are passed over."""


def path_named(text: str) -> Path | None:
    """The path that a text names, if something is there. A text that is too long to be a name, or no name at all, names none.

    Example:
        >>> path_named("a" * 100_000) is None, path_named(".")
        (True, PosixPath('.'))
    """
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, the home of nobody
        return None


def check_free(out: str | Path, *, force: bool = False, inputs: Inputs = ()) -> None:
    """Raise unless a folder can be written at ``out``: nothing there, an empty folder, or with ``force`` one that we wrote.

    What a killed run left there is removed first.

    Args:
        out: Where a folder is to be written.
        force: Whether a folder that this library wrote is replaced.
        inputs: Files and folders that are read. ``out`` may be none of them, and lie neither in nor around one.

    Raises:
        SparsepassError: If something else stands there, or the place cannot be written to.
    """
    target = Path(out).absolute()
    check_apart(target, inputs)
    sweep(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SparsepassError(f"output {target} exists and is not a folder; choose another name")
    if target.exists() and target.resolve() in (inside := Path.cwd(), *inside.parents, Path.home()):
        raise SparsepassError(
            f"output folder {target} would be replaced as a whole, and it is your home or holds the folder you are in; "
            "name a folder inside it"
        )
    if target.is_dir() and any(entry.name != LOST_AND_FOUND for entry in target.iterdir()):
        if not force:
            raise SparsepassError(
                f"output folder {target} is not empty; choose another one, or pass force=True to replace what sparsepass wrote"
            )
        _check_ours(target)
    if not stays(target):
        _check_room(target)


def check_place(
    file: str | Path, *, force: bool = True, inputs: Inputs = (), is_ours: Callable[[Path], bool] | None = None
) -> None:
    """Raise unless a file can be written at a path: nothing there, an empty file, or one that may be replaced.

    What a killed run left there is removed first.

    Args:
        file: Where a file is to be written.
        force: Whether a file that stands there is replaced.
        inputs: See `check_free`.
        is_ours: Tells whether a file is one that this library wrote; by default any is taken for one.

    Raises:
        SparsepassError: If something else stands there, or the folder cannot be written to.
    """
    target = Path(file).absolute()
    check_apart(target, inputs)
    if target.is_dir():
        raise SparsepassError(f"output {target} is a folder, and a file is to be written; name a file in it")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise SparsepassError(
            f"output {target} is a link, a pipe or a device, and no file takes its place; choose another name"
        )
    if not force and target.exists():
        raise SparsepassError(f"{file} exists; choose another name, or pass force=True to replace it")
    if is_ours is not None and target.exists() and target.stat().st_size and not is_ours(target):
        raise SparsepassError(
            f"output {target} is a file that sparsepass did not write; choose another name, or remove it yourself"
        )
    _check_room(target)
    sweep(target)


def check_writable(folder: str | Path, *, inputs: Inputs = ()) -> None:
    """Raise unless files can be written into a folder, which is there or can be made.

    Args:
        folder: The folder.
        inputs: See `check_free`.

    Raises:
        SparsepassError: If the first of the folder and those above it that exists is no folder, or is read-only.
    """
    target = Path(folder).absolute()
    check_apart(target, inputs)
    _check_room(target / "file")


def check_apart(out: str | Path, inputs: Inputs) -> None:
    """Raise if an output is one of the inputs, lies in one, or lies around one, by whatever name they are given.

    Args:
        out: Where something is to be written.
        inputs: Files and folders that are read.

    Raises:
        SparsepassError: If it is so.
    """
    target = Path(out).absolute()
    place = _real(target)
    above = [identity for folder in (place, *place.parents) if (identity := _identity(folder)) is not None]
    for given in inputs:
        source = None if given is None else path_named(str(given))
        if source is None:
            continue
        found = _real(source.absolute())
        # By its name it may lie elsewhere than what it leads to: what stands there goes with the folder around it.
        named = _real(source.absolute().parent) / source.name
        relation = None
        if _identity(found) in above:
            relation = "is" if _identity(found) == _identity(place) else "lies in"
        elif (own := _identity(place)) is not None and own in {_identity(p) for path in (found, named) for p in path.parents}:
            relation = "holds"
        if relation is not None:
            raise SparsepassError(f"output {target} {relation} the input {given}; choose a place apart from what is read")


def stays(target: Path) -> bool:
    """Whether a folder can be written into, and not be moved itself: a mount point, or in a folder that is read-only."""
    if not target.is_dir() or not os.access(target, os.W_OK | os.X_OK):
        return False
    return target.is_mount() or not os.access(target.parent, os.W_OK | os.X_OK)


def _check_ours(target: Path) -> None:
    """Raise unless everything in a folder was written by this library."""
    advice = "choose another place, or remove it yourself"
    if not (target / CHECKSUMS_FILE).is_file():
        raise SparsepassError(
            f"output folder {target} holds no {CHECKSUMS_FILE}: sparsepass did not write it, and does not replace it; {advice}"
        )
    if (name := foreign_file(target)) is not None:
        raise SparsepassError(
            f"output folder {target} holds {name}, which sparsepass did not write there; move it away, or {advice}"
        )


def _check_room(target: Path) -> None:
    """Raise unless something can be written beside ``target``, in the first folder above it that exists."""
    above = next(folder for folder in target.parents if folder.exists() or folder.is_symlink())
    if not above.is_dir():
        raise SparsepassError(f"output {target} lies below {above}, which is no folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SparsepassError(
            f"output {target} cannot be written: {above} is read-only for you; choose another place, or change its permissions"
        )


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a circle of links
        return path


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or folder from all others; None if nothing is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
