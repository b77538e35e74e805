"""Writing folders so that an interruption leaves the old content or none."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sparsepass._terminal import one_line
from sparsepass.graph.support.checksums import write_checksums
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.inside import file_inside, is_file_name
from sparsepass.graph.support.native import native_path
from sparsepass.graph.support.places import LOST_AND_FOUND, Inputs, check_free, stays
from sparsepass.graph.support.reading import INFINITIES, read_object, weight_map
from sparsepass.graph.support.temporaries import OLD, sweep, temporary_file, temporary_folder, umask

_HERE: Final = -100
"""AT_FDCWD: names are those of the folder that the process is in."""
_RENAME_EXCHANGE: Final = 2


@contextmanager
def replaced_folder(out: str | Path, *, force: bool = False, inputs: Inputs = (), checksums: bool = True) -> Iterator[Path]:
    """Give an empty folder to write into, and move it to ``out`` when the block ends without an error.

    Every folder that this library writes is written through here. The old content stays until the new one is whole.

    Args:
        out: Where the folder is to stand in the end.
        force: Whether a folder that stands there and is not empty is replaced, if this library wrote it.
        inputs: What is read; see `check_free`.
        checksums: Whether the folder gets checksums, by which it is known as one of ours. False for folders in a folder of
            ours that are known by something else; what stands there is replaced then, whatever it is.

    Yields:
        A folder beside ``out`` (in it, if ``out`` is a mount point) that is removed if the block raises (Ctrl-C included).

    Raises:
        SparsepassError: If ``out`` is not free, before anything is written; or if the disk is full.
    """
    target = Path(out).absolute()
    if checksums:
        check_free(target, force=force, inputs=inputs)
    else:
        sweep(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # What cannot be moved itself gets its content moved in: a mount point (a container's volume), a folder in one of others.
    room = target if stays(target) else target.parent
    try:
        with temporary_folder(target, room) as staging:
            yield native_path(staging)
            if checksums:
                write_checksums(staging)
            _open_by_umask(staging)
            _check_nobody_came(target, force=force)
            _swap(staging, target)
    except Exception as error:
        _tell_if_no_room(error, target)
        raise


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, and move what is there to ``path`` when the block ends without an error.

    A file that stood there is not written to, so its other names (hard links) keep the old content.

    Yields:
        A path beside ``path``; what is there is removed if the block raises.

    Raises:
        SparsepassError: If the disk is full, or what stands there is no file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replaced_file(Path(folder, "a.txt")) as beside:
        ...         _ = beside.write_text("new")
        ...     Path(folder, "a.txt").read_text()
        'new'
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise SparsepassError(f"{target} is no plain file, and is not replaced by one; move it away, or choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    try:
        with temporary_file(target) as beside:
            yield native_path(beside.parent) / beside.name
            beside.chmod(0o666 & ~umask())
            try:
                os.replace(beside, target)
            except OSError as error:
                if error.errno != errno.EBUSY:  # a file that is mounted by itself can be written, not moved over
                    raise
                shutil.copyfile(beside, target)
    except Exception as error:
        _tell_if_no_room(error, target)
        raise


def _open_by_umask(folder: Path) -> None:
    """Let others read what was written as far as the umask lets them: safetensors, for one, keeps its files to their owner."""
    kept_away = umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | ((0o777 if path.is_dir() else 0o666) & ~kept_away))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file beside its place and move it over what stands there, so that it is never half there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "a.txt"), "new")
        ...     Path(folder, "a.txt").read_text()
        'new'
    """
    with replaced_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _check_nobody_came(target: Path, *, force: bool) -> None:
    """Refuse to replace what another process has written since we looked."""
    if not force and target.is_dir() and not stays(target) and any(target.iterdir()):
        raise SparsepassError(f"output folder {target} was written by another process meanwhile; choose another one")


def _swap(staging: Path, target: Path) -> None:
    if staging.parent == target:
        _move_in(staging, target)
        return
    if not target.is_dir():
        os.replace(staging, target)
        return
    if _exchange(staging, target):
        return
    with temporary_folder(target, target.parent, OLD) as old:
        try:
            os.replace(target, old / target.name)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            _move_in(staging, target)  # a mount that is_mount does not see
            return
        try:
            os.replace(staging, target)
        except BaseException:
            os.replace(old / target.name, target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that one of them always stands; False if that cannot be."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux, glibc 2.28 and later
    if rename is None:
        return False
    names = (ctypes.c_int(_HERE), os.fsencode(one), ctypes.c_int(_HERE), os.fsencode(other))
    return bool(rename(*names, ctypes.c_uint(_RENAME_EXCHANGE)) == 0)


def _move_in(staging: Path, target: Path) -> None:
    """Put the content of one folder in the place of another's, entry by entry; if that fails, the old content is put back."""
    moved: list[Path] = []
    with temporary_folder(target, target, OLD) as aside:
        try:
            for entry in sorted(target.iterdir()):
                if entry not in (staging, aside) and entry.name != LOST_AND_FOUND:
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
        is_named = is_file_name(named) and named.endswith((".safetensors", ".safetensors.index.json"))
        if not is_named or not path.is_file() or ".." in path.parts:
            raise SparsepassError(
                f"{folder / 'config.json'} says that the weights lie in {one_line(named[:200])} (transformers_weights): "
                "expected a safetensors file, or the index of several, that is in the folder; copy it there, or take that line "
                "out"
            )
        return path
    return next((path for path in (folder / WEIGHTS_FILE, folder / WEIGHTS_INDEX) if path.is_file()), None)


def _named_weights(folder: Path) -> str | None:
    path = folder / "config.json"
    named = read_object(path, allowed=INFINITIES).get("transformers_weights") if path.exists() else None
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
    found: dict[Path, list[str]] = {}
    for name, file in sorted(weight_map(entry).items(), key=lambda pair: pair[1]):
        found.setdefault(file_inside(entry.parent, file, entry.name), []).append(name)
    missing = [str(path.relative_to(entry.parent)) for path in found if not path.is_file()]
    if missing or not found:
        raise SparsepassError(
            f"{entry.parent} is incomplete: {entry.name} names {len(found)} files, and {', '.join(missing) or 'all'} "
            f"{'is' if len(missing) == 1 else 'are'} missing; "
            "copy or download the model again"
        )
    return found
