"""GGUF files: what their header says, and the files that one belongs together with."""

import re
import struct
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any, BinaryIO

from sparsepass.graph.support import SparsepassError, how_to_install

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def check_gguf(path: Path, name: str) -> None:
    """Make sure that a file is a whole GGUF file that describes a model.

    Args:
        path: The file; it is there.
        name: The model's name, for messages.

    Raises:
        SparsepassError: If the package gguf is missing, or the file is none, is damaged, is one part of a file that was
            split, or does not say of which architecture it is.
    """
    if util.find_spec("gguf") is None:
        raise SparsepassError(f"model {name} is a GGUF file, and the package gguf is missing: {how_to_install('gguf')}")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise SparsepassError(f"{path} is not a GGUF file (it begins with {magic!r}); it is damaged, download it again")
        try:
            facts = _facts(file)
        except (struct.error, KeyError, ValueError, OSError, OverflowError, MemoryError) as error:
            raise SparsepassError(f"{path}: the file may be truncated, its header cannot be read; download it again") from error
    count, number = facts.get("split.count", 0), facts.get("split.no", 0)
    if count > 1 or ("split.tensors.count" in facts and "general.architecture" not in facts):
        raise SparsepassError(
            f"{path} is part {number + 1} of {count} of a GGUF file that was split, and transformers reads whole files: put "
            f"the parts together first, llama-gguf-split --merge {_first_part(path)} whole.gguf, and load that"
        )
    if "general.architecture" not in facts:
        raise SparsepassError(f"{path} does not say of which architecture its model is; it holds no whole model")


def split_parts(names: Iterable[str]) -> bool:
    """Whether all of several GGUF files are parts of one, by their names.

    Example:
        >>> split_parts(["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]), split_parts(["q4.gguf", "q8.gguf"])
        (True, False)
    """
    found = [_SPLIT.fullmatch(name) for name in names]
    return len({(match["stem"], match["count"]) if match else None for match in found} - {None}) == 1 and all(found)


def _first_part(path: Path) -> str:
    match = _SPLIT.fullmatch(path.name)
    return f"{match['stem']}-00001-of-{match['count']}.gguf" if match else "THE-FIRST-PART"


def _facts(file: BinaryIO) -> dict[str, Any]:
    """The key-value pairs of a header, without its arrays."""
    version, _, number = struct.unpack("<IQQ", file.read(20))
    if version < 2:
        raise KeyError("version 1")
    facts = {}
    for _ in range(number):
        key = _string(file).decode()
        (kind,) = struct.unpack("<I", file.read(4))
        value = _value(file, kind)
        if kind != _ARRAY:
            facts[key] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return facts


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        if inner in _NUMBERS:
            file.seek(struct.calcsize(_NUMBERS[inner]) * length, 1)
        else:
            for _ in range(length):
                _value(file, inner)
        return None
    (value,) = struct.unpack(_NUMBERS[kind], file.read(struct.calcsize(_NUMBERS[kind])))
    return value


def _string(file: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    found = file.read(min(length, 1 << 30))
    if len(found) != length:
        raise KeyError("truncated")
    return found
