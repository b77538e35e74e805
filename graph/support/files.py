"""Writing folders so that an interruption leaves the old content or none."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sparsepass.graph.support.errors import SparsepassError


@contextmanager
def replaced_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into, and move it to ``out`` when the block ends without an error.

    Args:
        out: Where the folder is to stand in the end.
        force: Whether a folder that stands there and is not empty is replaced.

    Yields:
        A folder beside ``out`` that is removed if the block raises (Ctrl-C included).

    Raises:
        SparsepassError: If ``out`` is a file, or a folder that is not empty and ``force`` is false, or a folder that we
            are in, before anything is written; or if the disk is full.
    """
    target = Path(out).absolute()
    check_free(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _swap(staging, target)
    except Exception as error:
        _tell_if_no_room(error, target)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, and move what is there to ``path`` when the block ends without an error.

    Yields:
        A path beside ``path``; what is there is removed if the block raises.

    Raises:
        SparsepassError: If the disk is full.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replaced_file(Path(folder, "a.txt")) as beside:
        ...         _ = beside.write_text("new")
        ...     Path(folder, "a.txt").read_text()
        'new'
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.partial")
    try:
        yield beside
        os.replace(beside, target)
    except Exception as error:
        _tell_if_no_room(error, target)
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file beside its place and move it over what stands there, so that it is never half there.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "a.txt"), "new")
        ...     Path(folder, "a.txt").read_text()
        'new'
    """
    with replaced_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_free(out: str | Path, *, force: bool = False) -> None:
    """Raise unless a folder can be written at ``out``: nothing there, an empty folder, or any folder with ``force``.

    Raises:
        SparsepassError: If something stands there.
    """
    target = Path(out).absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SparsepassError(f"output {target} exists and is not a folder; choose another name")
    if target.exists() and target.resolve() in (inside := Path.cwd(), *inside.parents, Path.home()):
        raise SparsepassError(
            f"output folder {target} would be replaced as a whole, and it is your home or holds the folder you are in; "
            "name a folder inside it"
        )
    if not force and target.is_dir() and any(target.iterdir()):
        raise SparsepassError(
            f"output folder {target} is not empty; choose another one, or pass --force (force=True) to replace it"
        )


def _swap(staging: Path, target: Path) -> None:
    old = None
    if target.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.replace(target, old / target.name)
    try:
        os.replace(staging, target)
    except BaseException:
        if old is not None:
            os.replace(old / target.name, target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _tell_if_no_room(error: Exception, target: Path) -> None:
    """Raise a message of ours where the disk is full; nothing if the error is another one.

    Native writers (safetensors, protobuf) raise errors of their own that only quote the system's words.
    """
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk is full",
        errno.EFBIG: "a file may not grow so large here (ulimit -f, or the file system)",
    }
    for code, reason in reasons.items():
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            raise SparsepassError(
                f"{reason}: {target} was not written, and what stood there is untouched; free some space or "
                "choose another place"
            ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


WEIGHTS_FILE: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"


def weights_index(folder: Path) -> Path | None:
    """The index by which `from_pretrained` finds the weights of a folder: model.safetensors wins over an index beside it.

    Args:
        folder: The folder.

    Returns:
        The index; None if the one file stands there, or neither.
    """
    index = folder / WEIGHTS_INDEX
    return index if index.is_file() and not (folder / WEIGHTS_FILE).is_file() else None
