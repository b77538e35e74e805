"""Reading files that others made: the one place where they are opened, and where what is wrong with one becomes our error.

1. A file is a regular file. A device, a pipe or a socket is refused before it is opened: reading one may never end.
2. JSON is read strictly: UTF-8, no key twice, no NaN, no number that overflows, nothing nested deeper than `MAX_DEPTH`.
3. The header of a safetensors file is checked before the library reads it, and bytes that are no truth value are no mask.
4. What a file must hold is said by a type, which pydantic checks; see `read_as`.
5. Each error names the file and what is wrong with it. Nothing else is caught: a defect of ours stays one.
"""

import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, TypeVar

import pydantic
import safetensors
import torch
from torch import Tensor
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from sparsepass._terminal import one_line
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.native import native_path

MAX_DEPTH: Final = 100
"""How deep JSON may be nested. Real files go to about 15."""
INFINITIES: Final = ("Infinity", "-Infinity")
"""What configurations of transformers may hold."""
NON_FINITE: Final = (*INFINITIES, "NaN")
"""What our own states may hold, whose files have checksums."""
_MAX_JSON_BYTES: Final = 1 << 28
_MAX_DIGITS: Final = 40
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_AXES: Final = 64
_MAX_LENGTH: Final = 1 << 48

_HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")


class _Index(TypedDict):
    weight_map: dict[str, str]


_INDEX: Final = pydantic.TypeAdapter(_Index)
JSON = Any
T = TypeVar("T")


def read_json(
    path: Path, *, allowed: Collection[str] = (), error: type[SparsepassError] = SparsepassError, advice: str = "copy it again"
) -> JSON:
    """Read a JSON file strictly.

    Args:
        path: The file.
        allowed: Words that stand for numbers and that JSON does not have: see `INFINITIES` and `NON_FINITE`.
        error: What to raise.
        advice: What to do next, for the message.

    Raises:
        SparsepassError: If it cannot be read, is no JSON, is nested too deep, or holds a key twice, NaN or a number too large.
    """
    with opened(path, error=error, advice=advice) as file:
        if os.fstat(file.fileno()).st_size > _MAX_JSON_BYTES:
            raise error(f"{shown(path)} cannot be read as JSON (it is larger than {_MAX_JSON_BYTES >> 20} MiB); {advice}")
        content = file.read()
    return parse_json(content, shown(path), allowed=allowed, error=error, advice=advice)


def read_object(
    path: Path, *, allowed: Collection[str] = (), error: type[SparsepassError] = SparsepassError, advice: str = "copy it again"
) -> dict[str, JSON]:
    """Do as `read_json` for a file that holds an object.

    Raises:
        SparsepassError: If it holds something else, too.
    """
    document = read_json(path, allowed=allowed, error=error, advice=advice)
    if not isinstance(document, dict):
        raise error(f"{shown(path)} holds a {type(document).__name__} where an object is expected; {advice}")
    return document


def parse_json(
    content: "str | bytes",
    where: str,
    *,
    allowed: Collection[str] = (),
    error: type[SparsepassError] = SparsepassError,
    advice: str = "copy it again",
) -> JSON:
    """Do as `read_json` for content that was read already.

    Args:
        content: JSON; bytes are UTF-8.
        where: What it is, for the message.
        allowed: See `read_json`.
        error: See `read_json`.
        advice: See `read_json`.

    Raises:
        SparsepassError: See `read_json`.

    Example:
        >>> parse_json('{"a": 1, "a": 2}', "config.json")
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: config.json cannot be read as JSON (the key 'a' is given twice); copy it again
    """

    def refused(constant: str) -> float:
        if constant in allowed:
            return float(constant)
        raise ValueError(f"it holds {constant}, which is no number")

    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_object, parse_constant=refused, parse_float=_float, parse_int=_int)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(found)
        if _HALF.search(text) and _has_half(found):
            raise ValueError("it holds half of a character (a lone surrogate)")
    except UnicodeDecodeError as fault:
        raise error(f"{where} cannot be read as JSON (byte {fault.start} is no UTF-8); {advice}") from fault
    except RecursionError as fault:
        raise error(f"{where} cannot be read as JSON (it is nested deeper than {MAX_DEPTH} levels); {advice}") from fault
    except ValueError as fault:
        raise error(f"{where} cannot be read as JSON ({_short(fault)}); {advice}") from fault
    return found


def check_as(
    kind: "pydantic.TypeAdapter[T]",
    document: JSON,
    where: str,
    *,
    error: type[SparsepassError] = SparsepassError,
    advice: str = "copy it again",
) -> T:
    """Make a typed value of JSON.

    Args:
        kind: The type.
        document: What was read.
        where: What it is, for the message.
        error: What to raise.
        advice: What to do next, for the message.

    Raises:
        SparsepassError: If a field is missing or of another type.

    Example:
        >>> check_as(pydantic.TypeAdapter(dict[str, int]), {"a": "b"}, "counts.json")
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: counts.json: a: Input should be a valid integer, got 'b'; copy it again
    """
    try:
        # Through JSON, strictly: a list may become a tuple, and a text never a number.
        return kind.validate_json(json.dumps(document), strict=True)
    except pydantic.ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", got {_short(repr(first['input']))}"
        raise error(f"{where}: {f'{place}: ' if place else ''}{first['msg']}{given}; {advice}") from fault


def read_as(
    kind: "pydantic.TypeAdapter[T]",
    path: Path,
    *,
    allowed: Collection[str] = (),
    error: type[SparsepassError] = SparsepassError,
    advice: str = "copy it again",
) -> T:
    """Read a JSON file whose content has a type.

    Raises:
        SparsepassError: See `read_json` and `check_as`.
    """
    document = read_json(path, allowed=allowed, error=error, advice=advice)
    return check_as(kind, document, shown(path), error=error, advice=advice)


def weight_map(index: Path) -> dict[str, str]:
    """Read the index of a checkpoint in several files: name of a weight -> file in the index's folder.

    Raises:
        SparsepassError: If it cannot be read, or holds no such map.
    """
    return read_as(_INDEX, index)["weight_map"]


@contextmanager
def open_tensors(
    path: Path, *, error: type[SparsepassError] = SparsepassError, advice: str = "copy or download it again"
) -> Iterator[Any]:
    """Open a safetensors file, whose header is checked first.

    Args:
        path: The file.
        error: What to raise.
        advice: What to do next, for the message.

    Yields:
        What `safetensors.safe_open` gives. What it raises while the block runs becomes our error too.

    Raises:
        SparsepassError: If the file cannot be read, is truncated or damaged.
    """
    check_tensors(path, error=error, advice=advice)
    try:
        with safetensors.safe_open(native_path(path), framework="pt") as file:
            yield file
    except safetensors.SafetensorError as fault:
        _refuse_tensors(path, fault, error, advice)


def load_tensors(
    path: Path, *, error: type[SparsepassError] = SparsepassError, advice: str = "copy or download it again"
) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        SparsepassError: If it cannot be read, is truncated or damaged, or a mask in it holds bytes that are no truth values.
    """
    with open_tensors(path, error=error, advice=advice) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise error(f"{shown(path)} is damaged ({name!r} holds bytes that are neither true nor false); {advice}")
    return tensors


def check_tensors(
    path: Path, *, error: type[SparsepassError] = SparsepassError, advice: str = "copy or download it again"
) -> dict[str, JSON]:
    """Check the header of a safetensors file, without the library that reads the rest.

    Returns:
        Name of a tensor -> its dtype, shape and data_offsets.

    Raises:
        SparsepassError: If it is truncated or damaged: a tensor of no size that memory has, places that overlap or lie outside.
    """
    with opened(path, error=error, advice=advice) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            _refuse_tensors(path, f"its header has {length:,} bytes, and the file {size:,}", error, advice)
        content = file.read(length)
    header = parse_json(content, f"the header of {shown(path)}", error=error, advice=advice)
    if not isinstance(header, dict):
        _refuse_tensors(path, f"its header is a {type(header).__name__}", error, advice)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(item[1])):
        fault = _entry_fault(entry, end)
        if fault:
            _refuse_tensors(path, f"tensor {_short(repr(name))} {fault}", error, advice)
        end = entry["data_offsets"][1]
    if end != size - 8 - length:
        _refuse_tensors(path, f"its tensors take {end:,} bytes, and it has {size - 8 - length:,} for them", error, advice)
    return entries


@contextmanager
def opened(path: Path, *, error: type[SparsepassError] = SparsepassError, advice: str = "copy it again") -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes.

    Raises:
        SparsepassError: If it is not there, is no regular file, or may not be read.
    """
    try:
        # O_NONBLOCK: a pipe without a writer would be waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as fault:
        raise error(f"{shown(path)} is missing; {advice}") from fault
    except OSError as fault:
        raise error(f"{shown(path)} cannot be read ({fault.strerror}); {advice}") from fault
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{shown(path)} is no regular file, and nothing else is read; {advice}")
    with os.fdopen(descriptor, "rb") as file:
        yield file


@contextmanager
def read_by(
    library: str, path: "Path | str", *errors: type[BaseException], error: type[SparsepassError] = SparsepassError,
    advice: str = "copy it again",
) -> Iterator[None]:  # fmt: skip
    """Turn what a library raises about a file that it reads into our error. Nothing of ours belongs into the block.

    Args:
        library: Its name.
        path: The file.
        errors: What the library raises.
        error: What to raise.
        advice: What to do next, for the message.

    Example:
        >>> with read_by("zlib", "a.gz", ValueError):
        ...     int("x")
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: a.gz cannot be read by zlib (ValueError: invalid literal ...); copy it again
    """
    try:
        yield
    except SparsepassError:
        raise
    except errors as fault:
        raise error(f"{shown(path)} cannot be read by {library} ({type(fault).__name__}: {_short(fault)}); {advice}") from fault


def shown(path: "Path | str") -> str:
    r"""A path as a message shows it, in one line; what a terminal cannot show is written as escapes.

    Example:
        >>> print(shown(Path(os.fsdecode(bytes([97, 255])))))
        a\xff
    """
    return one_line(os.fsdecode(path))


def _object(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_short(repr(twice))} is given twice")
    return found


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {_short(text)} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _has_half(document: JSON) -> bool:
    try:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _check_depth(document: JSON) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError


def _short(fault: object, limit: int = 120) -> str:
    line = next(iter(str(fault).splitlines()), "")
    return line if len(line) <= limit else f"{line[:limit]}..."


def _offsets(entry: JSON) -> tuple[int, int]:
    """Where a tensor lies; nowhere, if its entry does not say it, which `_entry_fault` tells."""
    places = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if isinstance(places, list) and len(places) == 2 and all(type(place) is int for place in places):
        return places[0], places[1]
    return -1, -1


def _entry_fault(entry: JSON, end: int) -> str:
    """What is wrong with the header of a tensor that should begin where the one before it ends."""
    if _offsets(entry)[0] < 0 or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("shape"), list):
        return "has no dtype, shape and data_offsets"
    shape = entry["shape"]
    if len(shape) > _MAX_AXES or not all(type(length) is int and 0 <= length <= _MAX_LENGTH for length in shape):
        return f"has the shape {_short(shape)}"
    if math.prod(max(1, length) for length in shape) > _MAX_LENGTH:
        return f"has the shape {_short(shape)}"
    if _offsets(entry)[0] != end or _offsets(entry)[1] < end:
        return f"lies at {_short(entry['data_offsets'])}, and the one before it ends at {end}"
    return ""


def _refuse_tensors(path: Path, reason: object, error: type[SparsepassError], advice: str) -> NoReturn:
    cause = reason if isinstance(reason, BaseException) else None
    what = f"{shown(path)} is truncated or damaged ({_short(reason)}) and cannot be read as a safetensors file"
    raise error(f"{what}; {advice}") from cause
