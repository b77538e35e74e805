"""GGUF files: what their header says, and the files that one belongs together with."""

import math
import os
import re
import struct
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any, BinaryIO, Final, final

from sparsepass._terminal import one_line
from sparsepass.graph.support import SparsepassError, first_line, how_to_install, opened

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT: Final = 32
_MAX_AXES: Final = 4
_BLOCK: Final = re.compile(r"(?:\w+\.)?blk\.([0-9]{1,6})\.")


def check_gguf(path: Path, name: str) -> int:
    """Make sure that a file is a whole GGUF file that describes a model: the library that reads it trusts its header.

    Args:
        path: The file; it is there.
        name: The model's name, for messages.

    Returns:
        Elements of all tensors.

    Raises:
        SparsepassError: If the package gguf is missing, or the file is none, is damaged, is one part of a file that was
            split, or does not say of which architecture it is.
    """
    if util.find_spec("gguf") is None:
        raise SparsepassError(f"model {name} is a GGUF file, and the package gguf is missing: {how_to_install('gguf')}")
    with opened(path, advice="download it again") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise SparsepassError(f"{path} is not a GGUF file (it begins with {magic!r}); it is damaged, download it again")
        try:
            header = _Header(file, os.fstat(file.fileno()).st_size)
            facts = header.facts()
            num_elements = 0 if "split.count" in facts else header.check_tensors(facts.get("general.alignment", _ALIGNMENT))
        except (_HeaderError, struct.error, UnicodeDecodeError) as error:
            raise SparsepassError(
                f"{path}: the file may be truncated, its header cannot be read ({first_line(error)}); download it again"
            ) from error
    count, number = facts.get("split.count", 0), facts.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        raise SparsepassError(f"{path}: the file is damaged, split.count and split.no are no numbers; download it again")
    if count > 1 or ("split.tensors.count" in facts and "general.architecture" not in facts):
        raise SparsepassError(
            f"{path} is part {number + 1} of {count} of a GGUF file that was split, and transformers reads whole files: put "
            f"the parts together first, llama-gguf-split --merge {_first_part(path)} whole.gguf, and load that"
        )
    if not isinstance(architecture := facts.get("general.architecture"), str):
        raise SparsepassError(f"{path} does not say of which architecture its model is; it holds no whole model")
    told = facts.get(f"{architecture}.block_count")
    if header.num_blocks and isinstance(told, int) and told > header.num_blocks:
        raise SparsepassError(
            f"{path} says that its model has {told} blocks ({one_line(architecture)}.block_count) and holds "
            f"{header.num_blocks}; download it again"
        )
    return num_elements


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


class _HeaderError(Exception):
    """What is wrong with a header."""


@final
class _Header:
    """Reads a header in order. Every count in it is held against the bytes that are left in the file.

    Args:
        file: Behind the magic number.
        size: Bytes of the file.

    Attributes:
        num_blocks: One more than the last block that a tensor belongs to, once the tensors are checked.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.num_blocks = 0
        version, self._num_tensors, self._num_facts = self._numbers("<IQQ")
        if not 2 <= version <= 3:
            raise _HeaderError(f"it is of version {version}, and 2 and 3 are read")

    def facts(self) -> dict[str, Any]:
        """The key-value pairs, without their arrays."""
        self._fits(self._num_facts, 13, "key-value pairs")
        facts: dict[str, Any] = {}
        for _ in range(self._num_facts):
            key = self._string().decode()
            if key in facts:
                raise _HeaderError(f"the key {key!r} is given twice")
            (kind,) = self._numbers("<I")
            value = self._value(kind, depth=0)
            facts[key] = value.decode(errors="replace") if isinstance(value, bytes) else value
        return facts

    def check_tensors(self, alignment: Any) -> int:
        """Check that each tensor has a name of its own, a type that is known, and its bytes within the file.

        Returns:
            Elements of all tensors.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise _HeaderError(f"the alignment is {alignment!r}")
        self._fits(self._num_tensors, 24, "tensors")
        places: dict[str, tuple[int, int]] = {}
        total = 0
        for _ in range(self._num_tensors):
            name = self._string().decode()
            (num_axes,) = self._numbers("<I")
            if name in places or not 0 < num_axes <= _MAX_AXES:
                raise _HeaderError(f"the tensor {name!r} is given twice, or has {num_axes} axes")
            *shape, kind, offset = self._numbers(f"<{num_axes}QIQ")
            if kind not in set(GGMLQuantizationType):
                raise _HeaderError(f"the tensor {name!r} has the type {kind}")
            block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if shape[0] % block or offset % alignment:
                raise _HeaderError(f"the tensor {name!r} has the shape {shape} and lies at {offset}")
            total += math.prod(shape)
            if belongs := _BLOCK.match(name):
                self.num_blocks = max(self.num_blocks, int(belongs[1]) + 1)
            places[name] = offset, offset + math.prod(shape) // block * num_bytes
        begin = -(-self._file.tell() // alignment) * alignment
        end = 0
        for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
            if first < end or begin + last > self._size:
                raise _HeaderError(f"the tensor {name!r} lies outside the file, or over another one")
            end = last
        return total

    def _value(self, kind: int, *, depth: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, length = self._numbers("<IQ")
            if depth > 2:
                raise _HeaderError("an array of arrays of arrays")
            if inner in _NUMBERS:
                size = struct.calcsize(_NUMBERS[inner])
                self._fits(length, size, "values")
                self._file.seek(size * length, 1)
            else:
                self._fits(length, 8, "values")
                for _ in range(length):
                    self._value(inner, depth=depth + 1)
            return None
        if kind not in _NUMBERS:
            raise _HeaderError(f"a value of type {kind}")
        return self._numbers(_NUMBERS[kind])[0]

    def _string(self) -> bytes:
        (length,) = self._numbers("<Q")
        self._fits(length, 1, "characters")
        return self._file.read(length)

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._file.read(struct.calcsize(form)))

    def _fits(self, count: int, size: int, what: str) -> None:
        if count * size > self._size - self._file.tell():
            raise _HeaderError(f"it says that {count:,} {what} follow, and {self._size - self._file.tell():,} bytes do")
