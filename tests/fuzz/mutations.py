"""Damage that knows the structure of what it damages: bytes, JSON, the header of safetensors."""

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

_DEEP = 10_000
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, "", "x", "a.b", "..", "class", "forward",
    "self", "\x1b[2J", "[/b]", "\u2028", "../../etc/passwd", "é" * 300, [], {}, [[]], [None], {"": 0}, {"node": "nowhere"},
    {"float": "nan"}, {"dtype": "float64"},
)  # fmt: skip
"""Values that stand where others belong."""
_RAW = (
    b"", b"null", b"[]", b"{}", b"5", b"\xff\xfe", b"\x00" * 64, b"[" * _DEEP, b'{"a":' * _DEEP, b'{"a": NaN}', b'{"a": 1, "a": 2}',
    b'{"format_version": ' + b"9" * 5000 + b"}", b'"\\ud800"',
)  # fmt: skip


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut short, emptied, with some bytes changed, doubled or put in."""
    how = draw(st.sampled_from(["raw", "cut", "flip", "flip", "insert", "double"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "raw":
        return draw(st.sampled_from(_RAW))
    if how == "cut":
        return content[:place]
    if how == "double":
        return content + content[place:]
    if how == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place:]
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if found:
            found[draw(st.integers(0, len(found) - 1))] ^= draw(st.integers(1, 255))
    return bytes(found)


@st.composite
def damaged_value(draw: st.DrawFn, document: Any, others: Sequence[Any] = HOSTILE) -> Any:
    """JSON with one to three of its values changed, taken away, doubled, renamed, exchanged or nested."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        holder, key = _place(draw, found)
        if holder is None:
            return draw(st.sampled_from(others))
        value = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "double", "rename", "exchange", "nest", "near"]))
        if how == "drop":
            del holder[key]
        elif how == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "class", f"{key}x", key.upper()]))] = holder.pop(key)
        elif how == "exchange":
            other, place = _place(draw, found)
            if other is not None:
                holder[key] = copy.deepcopy(other[place])
        elif how == "nest":
            for _ in range(draw(st.sampled_from([1, 3, 70]))):
                value = [value]
            holder[key] = value
        elif how == "near" and type(value) is int:
            holder[key] = value + draw(st.sampled_from([-1, 1, 1000, -1000]))
        elif how == "near" and isinstance(value, str) and value:
            end = draw(st.integers(0, len(value) - 1))
            holder[key] = value[:end] + draw(st.sampled_from(["", ".", "\n", "_", "é"])) + value[end + 1 :]
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(others)))
    return found


def _place(draw: st.DrawFn, document: Any) -> tuple[Any, Any]:
    """A container within a document and a key of it. Each level is as likely as its siblings, so small parts are met too."""
    if not isinstance(document, list | dict) or not document:
        return None, None
    holder = document
    while True:
        keys = list(range(len(holder))) if isinstance(holder, list) else list(holder)
        key = draw(st.sampled_from(keys))
        inner = holder[key]
        if not isinstance(inner, list | dict) or not inner or draw(st.integers(0, 7)) == 0:
            return holder, key
        holder = inner


def damaged_json(content: bytes, others: Sequence[Any] = HOSTILE) -> SearchStrategy[bytes]:
    """The bytes of a JSON file, most often still JSON."""
    document = json.loads(content)
    valid = damaged_value(document, others).map(lambda value: json.dumps(value).encode())
    return st.one_of(valid, valid, valid, valid, damaged_bytes(content))


def damaged_safetensors(content: bytes) -> SearchStrategy[bytes]:
    """The bytes of a safetensors file, most often with a header that is still JSON."""
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def whole(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + rest

    return st.one_of(damaged_value(header).map(whole), damaged_bytes(content))
