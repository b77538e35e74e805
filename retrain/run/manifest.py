"""What a checkpoint holds as JSON: its manifest, and a state that is checked when it is written, and compared when it is read.

The manifest lists every file with its size and hash, and is written last, so that damage shows.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter

from sparsepass.graph.support import NON_FINITE, SparsepassError, check_as, read_as, read_object

JSON = Any

FORMAT = 1
MANIFEST_FILE, STATE_FILE = "checkpoint.json", "state.json"
_PLAIN = ("step", "metric", "serial", "num_processes")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint on disk whose files are all there, with the sizes they should have.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken.
        metric: What it reached on the validation split, lower is better; None if it was not measured.
        serial: Counts the saves of the run; the newest checkpoint has the highest, whatever its step.
        num_processes: How many processes wrote it.
        files: Size in bytes and SHA-256 of each file.
        notes: One sentence for each damaged checkpoint that was passed over to find this one.
    """

    path: Path
    step: int
    metric: float | None
    serial: int
    num_processes: int
    files: Mapping[str, tuple[int, str]]
    notes: tuple[str, ...] = ()

    def state(self) -> JSON:
        """The run's state, as it was saved."""
        return read_object(self.path / STATE_FILE, allowed=NON_FINITE, error=DamagedError)

    def parts(self) -> list[JSON]:
        """What each process wrote: a table of its pieces of tensors, and its own state."""
        files = (part_file(self.path, rank) for rank in range(self.num_processes))
        return [asdict(read_as(_PART, file, allowed=NON_FINITE, error=DamagedError)) for file in files]

    def tensor_names(self) -> set[str]:
        """The tensors that it holds."""
        return {row["name"] for part in self.parts() for row in part["pieces"]}


class DamagedError(SparsepassError):
    """A checkpoint with files missing, or of other sizes or contents than its manifest says."""


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """The file `MANIFEST_FILE`; see `Checkpoint`."""

    format: int
    step: NonNegativeInt
    metric: FiniteFloat | None
    serial: int
    num_processes: PositiveInt
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True, kw_only=True)
class _PieceFields:
    """A row of the table that `write_pieces` made."""

    name: str
    dtype: str
    shape: list[NonNegativeInt]
    start: list[NonNegativeInt]
    size: list[NonNegativeInt]
    file: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    key: str


@dataclass(frozen=True, kw_only=True)
class _PartFields:
    """The file of a process; see `part_file`."""

    pieces: list[_PieceFields]
    local_state: Any


_MANIFEST, _PART = TypeAdapter(_Manifest), TypeAdapter(_PartFields)


def part_file(folder: Path, rank: int) -> Path:
    """The file of a checkpoint in which a process tells what it wrote."""
    return folder / f"rank-{rank:05d}.json"


def write_manifest(checkpoint: Checkpoint) -> None:
    """Write the manifest into the checkpoint's folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     here = Path(name)
        ...     write_manifest(Checkpoint(path=here, step=5, metric=None, serial=1, num_processes=1, files={}))
        ...     read_manifest(here).step
        5
    """
    manifest = {"format": FORMAT, **{name: getattr(checkpoint, name) for name in (*_PLAIN, "files")}}
    text = json.dumps({"manifest": manifest, "sha256": _digest(manifest)}, indent=1)
    (checkpoint.path / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest, and check that all its files are there with the sizes they should have.

    Raises:
        DamagedError: If they are not, or if the manifest is missing or not as it was written.
        SparsepassError: If the checkpoint is of a newer format.
    """
    unlike = DamagedError(f"{path.name} is damaged: {MANIFEST_FILE} is not as it was written")
    if not (path / MANIFEST_FILE).is_file():
        raise DamagedError(f"{path.name} is damaged: {MANIFEST_FILE} is missing")
    try:
        document = read_object(path / MANIFEST_FILE)
    except SparsepassError as error:
        raise unlike from error
    written = document.get("manifest")
    version = written.get("format") if isinstance(written, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise SparsepassError(
            f"{path} is a checkpoint of format {version}, and this version reads up to {FORMAT}; update sparsepass, or move "
            "the folder away"
        )
    if document.get("sha256") != _digest(written):
        raise unlike
    manifest = check_as(_MANIFEST, written, f"{path.name} is damaged: {MANIFEST_FILE}", error=DamagedError)
    checkpoint = Checkpoint(
        path=path,
        **{name: getattr(manifest, name) for name in _PLAIN},
        files={Path(name).name: entry for name, entry in manifest.files.items()},
    )
    for name, (size, _) in checkpoint.files.items():
        if not (path / name).is_file():
            raise DamagedError(f"{path.name} is damaged: {name} is missing")
        if (there := (path / name).stat().st_size) != size:
            raise DamagedError(f"{path.name} is damaged: {name} has {there} bytes and should have {size}")
    return checkpoint


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = (Path(name) / "a").write_bytes(b"abc")
        ...     file_hash(Path(name) / "a")[:8]
        'ba7816bf'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json_text(value: JSON, where: str) -> str:
    """Write JSON as text, refusing what would come back as something else (tuples alone come back as lists).

    Args:
        value: What to write.
        where: What it is called in errors.

    Raises:
        SparsepassError: If it holds something that is not JSON, or a key that is not a string.

    Example:
        >>> to_json_text({"seen": 640, "order": (2, 1)}, "state")
        '{"seen": 640, "order": [2, 1]}'
    """
    _check(value, where)
    return json.dumps(value)


def differences(expected: JSON, found: JSON, where: str = "") -> list[str]:
    r"""Say how two pieces of JSON differ: one sentence for each place; texts are compared by lines.

    Args:
        expected: What this run has.
        found: What the checkpoint has.
        where: Path of the place, for the sentences.

    Example:
        >>> differences({"lr": 0.1, "data": {"length": 8}}, {"lr": 0.1, "data": {"length": 9}})
        ['data.length is 8 here and 9 in the checkpoint']
        >>> differences("a: 1\nb: 2", "a: 1\nb: 3", "config")
        ["config, line 2, is 'b: 2' here and 'b: 3' in the checkpoint"]
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        keys = dict.fromkeys([*expected, *found])
        inside = [(f"{where}.{key}" if where else key, expected.get(key), found.get(key)) for key in keys]
        return [line for path, here, there in inside for line in differences(here, there, path)]
    if isinstance(expected, str) and isinstance(found, str) and "\n" in expected + found:
        here, there = expected.splitlines(), found.splitlines()
        changes = difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes()
        return [
            f"{where}, line {i + 1}, is {chr(10).join(here[i:j])!r} here and {chr(10).join(there[k:n])!r} in the checkpoint"
            for kind, i, j, k, n in changes
            if kind != "equal"
        ]
    return [] if expected == found else [f"{where} is {_short(expected)} here and {_short(found)} in the checkpoint"]


def _digest(manifest: JSON) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check(value: JSON, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SparsepassError(f"{where} has the key {key!r}; keys of JSON are strings")
            _check(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | None):
        raise SparsepassError(f"{where} is a {type(value).__name__}, which is not JSON; store tensors as tensors")


def _short(value: JSON) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
