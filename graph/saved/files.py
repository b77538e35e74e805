"""The two files of a saved program, written and read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sparsepass.graph.saved.schema import FORMAT_VERSION, check_document
from sparsepass.graph.support import ProgramFormatError, SparsepassError, changed_files, check_inside, load_tensors, read_json

PROGRAM_FILE, TENSORS_FILE = "program.json", "program.safetensors"


def write_state(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files of a program.

    Raises:
        SparsepassError: If a tensor has no values yet.
        ProgramFormatError: If it could not be read again.
    """
    if empty := [name for name, t in tensors.items() if t.is_meta]:
        raise SparsepassError(f"the program has no weights yet ({empty[0]} is on the meta device); fill() it before saving")
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    check_document(json.loads(text), tensors.keys(), "this program cannot be saved")
    (folder / PROGRAM_FILE).write_text(text, encoding="utf-8")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: dict[int, str] = {}
    for name, t in plain.items():  # safetensors refuses tensors that share memory
        if t.numel() and seen.setdefault(t.untyped_storage().data_ptr(), name) != name:
            plain[name] = t.clone()
    safetensors.torch.save_file(plain, folder / TENSORS_FILE, metadata={"format": "pt"})


def read_state(place: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the two files of a program, and check the first against its schema and against the names in the second.

    Raises:
        ProgramFormatError: If they are not there, truncated, of a newer format, or hold what no program holds.
    """
    check_inside(place)
    file = place / PROGRAM_FILE
    if not file.is_file():
        raise ProgramFormatError(f"{place} holds no {PROGRAM_FILE}, so it is not a saved program; check the path")
    document = read_json(file, error=ProgramFormatError, advice="save the program again")
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is not int or not 0 < version <= FORMAT_VERSION:
        raise ProgramFormatError(
            f"{place} has program format {version!r:.50}, and this sparsepass reads up to {FORMAT_VERSION}; upgrade sparsepass"
        )
    tensors = load_tensors(place / TENSORS_FILE, error=ProgramFormatError, advice="copy the folder again")
    check_document(document, tensors.keys(), f"{file} is no saved program")
    return document, tensors


def check_as_written(place: Path) -> None:
    """Refuse a program whose files are not those that were written, as far as the checksums in its folder tell.

    Raises:
        ProgramFormatError: If one is another.
    """
    if changes := changed_files(place, (PROGRAM_FILE, TENSORS_FILE)):
        raise ProgramFormatError(
            f"{place}: {'; '.join(map(str, changes))}; get the folder anew or, if you know why it changed, run "
            f"`sparsepass verify --renew {place}`"
        )
