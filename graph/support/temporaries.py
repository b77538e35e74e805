"""What is written beside its place: hidden files and folders that are locked while their owner lives.

The system gives a lock back when its owner ends, however it ends. So what is not locked was left by a run that was killed.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.native import as_utf8

PARTIAL: Final = ".partial"
OLD: Final = ".old"


@contextmanager
def temporary_folder(target: Path, room: Path, suffix: str = PARTIAL) -> Iterator[Path]:
    """Give an empty hidden folder, named after a place, that is removed in the end.

    Args:
        target: The place.
        room: Where the folder is made.
        suffix: What its name ends in; the old content of a place is kept in one that ends in ``OLD``.
    """
    path, lock = _made(target, room, suffix, is_folder=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _close(lock)


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """Give an empty hidden file beside a place, that is removed in the end if it is still there."""
    path, lock = _made(target, target.parent, PARTIAL, is_folder=False)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        _close(lock)


def sweep(target: Path) -> None:
    """Remove what killed runs left beside a place, and in it; an old result that one had moved aside is put back.

    What belongs to a run that lives stays, and so does everything where the file system knows no locks.
    """
    named = re.compile(rf"\.{re.escape(as_utf8(target.name))}\.[a-z0-9_]{{8}}({re.escape(PARTIAL)}|{re.escape(OLD)})")
    for room in (target.parent, target):
        try:
            found = [entry for entry in os.scandir(room) if named.fullmatch(entry.name) and not entry.is_symlink()]
        except OSError:  # not there, or not to be read
            continue
        for entry in found:
            remove_if_dead(Path(entry.path), target)


def lock_now(path: Path | int) -> int | None:
    """Lock a file or folder.

    Args:
        path: The file or folder, or a descriptor of it, which is left open in any case.

    Returns:
        A descriptor that holds the lock until it is closed; None if another one holds it.

    Raises:
        OSError: If it cannot be opened, or the file system knows no locks.
    """
    descriptor = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not path:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


@contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Keep a folder to ourselves, after all who came before. Where the file system knows no locks, nobody waits."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def umask() -> int:
    """The rights that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Keep a folder to ourselves, and refuse to begin while another process does. Where the file system knows no locks, all go.

    Args:
        folder: The folder, which is made if need be; None for none.

    Raises:
        SparsepassError: If another one is at work there.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock: int | None = None
    with suppress(OSError):
        lock = lock_now(folder.resolve())
        if lock is None:
            raise SparsepassError(f"another process is at work in {folder}; wait until it has ended, or choose another folder")
    try:
        yield
    finally:
        _close(lock)


def _made(target: Path, room: Path, suffix: str, *, is_folder: bool) -> tuple[Path, int | None]:
    """A hidden file or folder that is ours, and its lock."""
    prefix = f".{as_utf8(target.name)}."
    while True:
        if is_folder:
            path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=room))
        else:
            descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=room)
            os.close(descriptor)
            path = Path(name)
        try:
            lock = lock_now(path)
        except FileNotFoundError:
            continue
        except OSError:
            return path, None
        # Between its making and its locking it looked like one of the dead.
        if lock is not None and _is_still(path, lock):
            return path, lock
        _close(lock)


def _is_still(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(lock))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False


def remove_if_dead(path: Path, target: Path | None = None) -> None:
    """Remove a hidden file or folder unless a run that lives writes it.

    Args:
        path: The file or folder.
        target: Its place, where an old result is put back to.
    """
    try:
        lock = lock_now(path)
    except OSError:
        return
    if lock is None:
        return
    try:
        if target is not None and path.name.endswith(OLD):
            _put_back(path, target)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _put_back(aside: Path, target: Path) -> None:
    """Move what was kept aside to its place, where that is empty: the folder itself, or the entries of one that cannot move."""
    places = [(aside / target.name, target)] if aside.parent == target.parent else []
    if aside.parent == target:
        places = [(entry, target / entry.name) for entry in aside.iterdir()]
    for kept, place in places:
        if kept.exists() and not (place.exists() or place.is_symlink()):
            os.replace(kept, place)


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
