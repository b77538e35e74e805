"""Writing folders so that an interruption leaves the old content or none."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sparsepass.graph.support.errors import SparsepassError

_LOST_AND_FOUND: Final = "lost+found"
"""What a file system of its own has in its topmost folder."""


@contextmanager
def replaced_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into, and move it to ``out`` when the block ends without an error.

    Args:
        out: Where the folder is to stand in the end.
        force: Whether a folder that stands there and is not empty is replaced.

    Yields:
        A folder beside ``out`` (in it, if ``out`` is a mount point) that is removed if the block raises (Ctrl-C included).

    Raises:
        SparsepassError: If ``out`` is a file, or a folder that is not empty and ``force`` is false, or a folder that we
            are in, before anything is written; or if the disk is full.
    """
    target = Path(out).absolute()
    check_free(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    # What cannot be moved itself gets its content moved in: a mount point (a container's volume), a folder in one of others.
    room = target if _stays(target) else target.parent
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=room))
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
        try:
            os.replace(beside, target)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a file that is mounted by itself can be written, not moved over
                raise
            shutil.copyfile(beside, target)
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


def check_free(out: str | Path, *, force: bool = False) -> None:
    """Raise unless a folder can be written at ``out``: nothing there, an empty folder, or any folder with ``force``.

    Raises:
        SparsepassError: If something stands there, or the place cannot be written to.
    """
    target = Path(out).absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SparsepassError(f"output {target} exists and is not a folder; choose another name")
    if target.exists() and target.resolve() in (inside := Path.cwd(), *inside.parents, Path.home()):
        raise SparsepassError(
            f"output folder {target} would be replaced as a whole, and it is your home or holds the folder you are in; "
            "name a folder inside it"
        )
    if not force and target.is_dir() and any(entry.name != _LOST_AND_FOUND for entry in target.iterdir()):
        raise SparsepassError(f"output folder {target} is not empty; choose another one, or pass force=True to replace it")
    if not _stays(target):
        _check_room(target)


def check_place(file: str | Path, *, force: bool = True) -> None:
    """Raise unless a file can be written at a path: nothing there, or a file that may be replaced.

    Raises:
        SparsepassError: If something else stands there, or the folder cannot be written to.
    """
    target = Path(file).absolute()
    if target.is_dir():
        raise SparsepassError(f"output {target} is a folder, and a file is to be written; name a file in it")
    if not force and target.exists():
        raise SparsepassError(f"{file} exists; choose another name, or pass force=True to replace it")
    if not target.parent.is_dir():
        raise SparsepassError(f"output {target} lies in a folder that does not exist; create it, or choose another place")
    _check_room(target)


def check_writable(folder: str | Path) -> None:
    """Raise unless files can be written into a folder, which is there or can be made.

    Raises:
        SparsepassError: If the first of the folder and those above it that exists is no folder, or is read-only.
    """
    _check_room(Path(folder).absolute() / "file")


def _check_room(target: Path) -> None:
    """Raise unless something can be written beside ``target``, in the first folder above it that exists."""
    above = next(folder for folder in target.parents if folder.exists() or folder.is_symlink())
    if not above.is_dir():
        raise SparsepassError(f"output {target} lies below {above}, which is no folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SparsepassError(
            f"output {target} cannot be written: {above} is read-only for you; choose another place, or change its permissions"
        )


def _stays(target: Path) -> bool:
    """Whether a folder can be written into, and not be moved itself: a mount point, or in a folder that is read-only."""
    if not target.is_dir() or not os.access(target, os.W_OK | os.X_OK):
        return False
    return target.is_mount() or not os.access(target.parent, os.W_OK | os.X_OK)


def _swap(staging: Path, target: Path) -> None:
    if staging.parent == target:
        _move_in(staging, target)
        return
    old = None
    if target.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        try:
            os.replace(target, old / target.name)
        except OSError as error:
            old.rmdir()
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            _move_in(staging, target)  # a mount that is_mount does not see
            return
    try:
        os.replace(staging, target)
    except BaseException:
        if old is not None:
            os.replace(old / target.name, target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _move_in(staging: Path, target: Path) -> None:
    """Put the content of one folder in the place of another's, entry by entry; if that fails, the old content is put back."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target))
    moved: list[Path] = []
    try:
        for entry in sorted(target.iterdir()):
            if entry not in (staging, aside) and entry.name != _LOST_AND_FOUND:
                os.replace(entry, aside / entry.name)
        for entry in sorted(staging.iterdir()):
            moved.append(target / entry.name)
            shutil.move(entry, target / entry.name)
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for entry in aside.iterdir():
            os.replace(entry, target / entry.name)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def weights_entry(folder: Path) -> Path | None:
    """The file by which `from_pretrained` finds the weights of a folder: the one file, or the index of several.

    The file that config.json names (``transformers_weights``) wins over model.safetensors, and that over an index beside it.

    Args:
        folder: The folder.

    Returns:
        A .safetensors file or a .safetensors.index.json; None if there is neither.

    Raises:
        SparsepassError: If the file that config.json names is not there, or is not in the folder; or if the weights are the
            parts of a distributed run.
    """
    if parts := sorted(path.name for path in folder.glob("shard-*-model-*-of-*.safetensors")):
        raise SparsepassError(
            f"{folder} holds the parts of a distributed checkpoint ({parts[0]}), which transformers reads in place of other "
            "weights there, and sparsepass does not read; load it with transformers and save it with save_pretrained"
        )
    if named := _named_weights(folder):
        path = folder / named
        if not named.endswith((".safetensors", ".safetensors.index.json")) or not path.is_file() or ".." in path.parts:
            raise SparsepassError(
                f"{folder / 'config.json'} says that the weights lie in {named} (transformers_weights): expected a safetensors "
                "file, or the index of several, that is in the folder; copy it there, or take that line out"
            )
        return path
    return next((path for path in (folder / WEIGHTS_FILE, folder / WEIGHTS_INDEX) if path.is_file()), None)


def _named_weights(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    return named if isinstance(named, str) else None


def weights_files(entry: Path) -> dict[Path, list[str]]:
    """The weights files that an entry stands for, each with the tensors that the index puts into it (none without an index).

    Args:
        entry: What `weights_entry` found.

    Raises:
        SparsepassError: If an index cannot be read, or names files that are not there.
    """
    if entry.suffix != ".json":
        return {entry: []}
    try:
        weight_map = json.loads(entry.read_text(encoding="utf-8"))["weight_map"]
        found: dict[Path, list[str]] = {}
        for name, file in sorted(weight_map.items(), key=lambda pair: pair[1]):
            found.setdefault(entry.parent / file, []).append(str(name))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SparsepassError(
            f"{entry} is truncated or damaged and cannot be read ({type(error).__name__}: {error}): expected JSON with a "
            "weight_map from weight to file; copy or download it again"
        ) from error
    missing = [str(path.relative_to(entry.parent)) for path in found if not path.is_file()]
    if missing or not found:
        raise SparsepassError(
            f"{entry.parent} is incomplete: {entry.name} names {len(found)} files, and {', '.join(missing) or 'all'} "
            f"{'is' if len(missing) == 1 else 'are'} missing; "
            "copy or download the model again"
        )
    return found
