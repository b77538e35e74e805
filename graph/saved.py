"""The two files of a saved program: written, and read back as JSON and tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sparsepass.graph.support import ProgramFormatError, SparsepassError

FORMAT_VERSION = 2
"""Version of the folder format. A reader refuses a newer one."""

PROGRAM_FILE, TENSORS_FILE = "program.json", "program.safetensors"


def write_state(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files of a program.

    Raises:
        SparsepassError: If a tensor has no values yet.
    """
    if empty := [name for name, t in tensors.items() if t.is_meta]:
        raise SparsepassError(f"the program has no weights yet ({empty[0]} is on the meta device); fill() it before saving")
    (folder / PROGRAM_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: dict[int, str] = {}
    for name, t in plain.items():  # safetensors refuses tensors that share memory
        if t.numel() and seen.setdefault(t.untyped_storage().data_ptr(), name) != name:
            plain[name] = t.clone()
    safetensors.torch.save_file(plain, folder / TENSORS_FILE, metadata={"format": "pt"})


def read_state(place: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the two files of a program.

    Raises:
        ProgramFormatError: If they are not there, truncated, or of a newer format.
    """
    if not (place / PROGRAM_FILE).is_file():
        raise ProgramFormatError(f"{place} holds no {PROGRAM_FILE}, so it is not a saved program; check the path")
    try:
        document = json.loads((place / PROGRAM_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProgramFormatError(f"{place / PROGRAM_FILE} is damaged ({error}); save the program again") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ProgramFormatError(
            f"{place} has program format {version}, and this sparsepass reads up to {FORMAT_VERSION}; upgrade sparsepass"
        )
    try:
        tensors = safetensors.torch.load_file(place / TENSORS_FILE)
    except (safetensors.SafetensorError, OSError) as error:
        raise ProgramFormatError(
            f"{place / TENSORS_FILE} is missing, truncated or damaged ({error}); copy the folder again"
        ) from error
    return document, tensors
