"""Checksums of the files in a folder that was written: what tells it from a stranger's, and an edited file from ours.

1. A folder's checksums lie in it, in `CHECKSUMS_FILE`: a table of every file below it, with size and SHA-256.
2. A folder below with checksums of its own is one entry, whose name ends in a slash; its files are left to those.
3. They protect from accidents and from edits that nobody told of. Who edits a file can write its checksum anew.
4. While files that change later (a report) are written, the table names them, so that a run that is killed in the middle leaves
   no folder that looks edited.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal, final

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.temporaries import sweep, temporary_file, umask, waiting_for

CHECKSUMS_FILE: Final = "sparsepass.sha256.json"
_FORMAT: Final = 1
_THREADS: Final = 4
_IGNORED: Final = frozenset(("lost+found", ".DS_Store", "Thumbs.db", "__pycache__"))

Entry = tuple[int, str]
"""Size in bytes, and SHA-256 in hexadecimal digits."""


@final
@dataclass(frozen=True, kw_only=True)
class FileChange:
    """A file that is not as it was written.

    Attributes:
        file: Its path in the folder.
        kind: Whether its content is another one, it is gone, or nobody wrote it here.
    """

    file: str
    kind: Literal["changed", "missing", "added"]

    def __str__(self) -> str:
        said = {
            "changed": f"is not as it was written (its SHA-256 is not that of {CHECKSUMS_FILE})",
            "missing": f"is missing ({CHECKSUMS_FILE} lists it)",
            "added": f"was added ({CHECKSUMS_FILE} does not list it)",
        }
        return f"{self.file} {said[self.kind]}"


class ChecksumWarning(UserWarning):
    """A file that was read is not as it was written."""

    __module__ = "sparsepass"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = (Path(name) / "a").write_bytes(b"abc")
        ...     file_sha256(Path(name) / "a")[:8]
        'ba7816bf'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files below a folder into it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = (Path(name) / "a").write_bytes(b"abc")
        ...     write_checksums(Path(name))
        ...     _ = (Path(name) / "a").write_bytes(b"abd")
        ...     [str(change)[:28] for change in changed_files(Path(name))]
        ['a is not as it was written (']
    """
    _write(folder, _entries(folder, _files(folder)))


def read_checksums(folder: Path) -> dict[str, Entry] | None:
    """The checksums that lie in a folder; None if it has none.

    Raises:
        SparsepassError: If they cannot be read.
    """
    found = _read(folder)
    return None if found is None else found[0]


def _read(folder: Path) -> tuple[dict[str, Entry], frozenset[str]] | None:
    """The checksums, and the files and folders that were being written when a run was killed."""
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] > _FORMAT:
            raise SparsepassError(f"{path} is of format {document['format']}, newer than this sparsepass reads; upgrade it")
        files = {_inside(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in document["files"].items()}
        return files, frozenset(_inside(name) for name in document.get("being_written", ()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, SparsepassError):
            raise
        raise SparsepassError(f"{path} is damaged ({error!r}); write the folder again") from error


def changed_files(folder: Path, names: Collection[str] | None = None, *, but: Collection[str] = ()) -> tuple[FileChange, ...]:
    """The files of a folder that are not as they were written; none if it has no checksums.

    Args:
        folder: The folder.
        names: Look at these only, and at those of them only that are there.
        but: Do not look at these.

    Raises:
        SparsepassError: If the checksums cannot be read.
    """
    table = _read(folder)
    if table is None:
        return ()
    known, being_written = table
    but = {*but, *_below(folder, being_written), *(name for name in known if PurePosixPath(name).parts[0] in being_written)}
    there = [name for name in _files(folder) if name not in but]
    asked = there if names is None else [name for name in there if name in names]
    found = _entries(folder, asked, known)
    gone = set(known).difference(there, but) if names is None else ()
    changes = [FileChange(file=name, kind="missing") for name in gone]
    changes += [
        FileChange(file=name, kind="changed" if name in known else "added") for name in asked if found[name] != known.get(name)
    ]
    return tuple(sorted(changes, key=lambda change: change.file))


def foreign_file(folder: Path) -> str | None:
    """A file below a folder that this library did not write there, hidden ones too; None if there is none."""
    known = read_checksums(folder) or {}
    return next((name for name in _files(folder, hidden=True) if name not in known), None)


@contextmanager
def checksums_follow(folder: Path, parts: Collection[str]) -> Iterator[None]:
    """Let the checksums of a folder follow what the block writes into it; others wait until it ends.

    A file that was not as it was written before the block stays one, so that nothing is made good in passing. A folder without
    checksums gets none.

    Args:
        folder: An existing folder.
        parts: The files and folders in it that the block writes.
    """
    with waiting_for(folder):
        known = read_checksums(folder)
        if known is None:
            yield
            return
        amiss = {change.file for change in changed_files(folder, _below(folder, parts))}
        _write(folder, known, being_written=parts)
        try:
            yield
        finally:
            _write(folder, known | _entries(folder, [name for name in _below(folder, parts) if name not in amiss]))


def _below(folder: Path, parts: Collection[str]) -> list[str]:
    return [name for name in _files(folder) if PurePosixPath(name).parts[0] in parts]


def _files(folder: Path, *, hidden: bool = False) -> list[str]:
    """Files below a folder, as paths in it, but for its checksums; a folder with some of its own stands for its files.

    A link counts as what it leads to: folders of the hub's cache consist of links.
    """
    found = []
    for place, folders, files in os.walk(folder):
        if Path(place) != folder and CHECKSUMS_FILE in files:
            folders.clear()
            found.append(f"{Path(place).relative_to(folder).as_posix()}/")
            continue
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        names = [name for name in sorted(files) if hidden or not name.startswith(".")]
        if hidden:
            names += [name for name in folders if (Path(place) / name).is_symlink()]
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in names]
    return [name for name in found if name != CHECKSUMS_FILE and not _IGNORED.intersection(PurePosixPath(name).parts)]


def _entries(folder: Path, names: Collection[str], expected: Mapping[str, Entry] | None = None) -> dict[str, Entry]:
    """Size and SHA-256 of files. What has another size than expected is not read."""

    def entry(name: str) -> Entry:
        path = folder / name
        if name.endswith("/"):
            return 0, "folder"
        if not path.is_file():  # no fifo is opened
            return 0, "no file"
        size = path.stat().st_size
        is_other = expected is not None and name in expected and expected[name][0] != size
        return size, "another size" if is_other else file_sha256(path)

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def _write(folder: Path, entries: Mapping[str, Entry], *, being_written: Collection[str] = ()) -> None:
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(entries.items())}
    document: dict[str, object] = {"format": _FORMAT, "files": files}
    if being_written:
        document["being_written"] = sorted(being_written)
    path = folder / CHECKSUMS_FILE
    sweep(path)
    with temporary_file(path) as beside:
        beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        beside.chmod(0o666 & ~umask())
        os.replace(beside, path)


def _inside(name: str) -> str:
    """The path of a file in the folder, as it was read."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name.removesuffix("/"):
        raise ValueError(f"{name!r} is no path in the folder")
    return name
