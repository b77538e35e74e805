"""The manifest of a checkpoint: it lists every file with its size and hash, and is written last, so that damage shows."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepass.graph.support import SparsepassError

JSON = Any

FORMAT = 1
MANIFEST_FILE = "checkpoint.json"


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


class DamagedError(SparsepassError):
    """A checkpoint with files missing, or of other sizes or contents than its manifest says."""


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
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "metric": checkpoint.metric,
        "serial": checkpoint.serial,
        "num_processes": checkpoint.num_processes,
        "files": {name: list(entry) for name, entry in checkpoint.files.items()},
    }
    text = json.dumps({"manifest": manifest, "sha256": _digest(manifest)}, indent=1)
    (checkpoint.path / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest, and check that all its files are there with the sizes they should have.

    Raises:
        DamagedError: If they are not, or if the manifest is missing or not as it was written.
        SparsepassError: If the checkpoint is of a newer format.
    """
    unlike = DamagedError(f"{path.name} is damaged: {MANIFEST_FILE} is not as it was written")
    try:
        document = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest = document["manifest"]
        if manifest["format"] > FORMAT:
            raise SparsepassError(
                f"{path} is a checkpoint of format {manifest['format']}, and this version reads up to {FORMAT}; update "
                "sparsepass, or move the folder away"
            )
        if document["sha256"] != _digest(manifest):
            raise unlike
        checkpoint = Checkpoint(
            path=path,
            step=manifest["step"],
            metric=manifest["metric"],
            serial=manifest["serial"],
            num_processes=manifest["num_processes"],
            files={Path(name).name: (size, digest) for name, (size, digest) in manifest["files"].items()},
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path.name} is damaged: {MANIFEST_FILE} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise unlike from error
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


def _digest(manifest: JSON) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
