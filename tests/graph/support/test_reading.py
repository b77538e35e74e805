"""Files that others made: each kind of damage is one error of ours that names the file, and nothing else is caught."""

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter
from safetensors.torch import save

from sparsepass.graph.support import (
    INFINITIES,
    SparsepassError,
    check_as,
    check_tensors,
    load_tensors,
    parse_json,
    read_as,
    read_by,
    read_json,
    read_object,
    shown,
)
from sparsepass.graph.support.reading import weight_map

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Expecting value"),
    "cut off": (b'{"a": [1, 2', "Expecting"),
    "no JSON": (b"a: 1", "Expecting value"),
    "more behind it": (b"{} {}", "Extra data"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
    "no UTF-8": (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
    "NaN": (b'{"a": NaN}', "it holds NaN"),
    "infinity": (b'{"a": -Infinity}', "it holds -Infinity"),
    "a number too large": (b'{"a": 1e999}', "the number 1e999 is too large"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "a number has 5000 digits"),
    "10,000 levels of lists": (b"[" * 10_000 + b"]" * 10_000, "nested deeper than 100 levels"),
    "10,000 levels of objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested deeper than 100 levels"),
    "101 levels": (b"[" * 101 + b"]" * 101, "nested deeper than 100 levels"),
    "half a character": (b'{"a": "\\ud800"}', "half of a character"),
    "zero bytes": (b"\0" * 64, "Expecting value"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_json_is_refused_with_its_file_and_the_reason(damage: str, tmp_path: Path) -> None:
    content, reason = DAMAGED[damage]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SparsepassError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} cannot be read as JSON (")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_json_can_hold_is_read() -> None:
    content = '{"a": [1, -2.5e3, "\\ud83d\\ude00 \\u0000", null, true], "b": ' + "[" * 98 + "]" * 98 + "}"
    assert parse_json(content, "it") == json.loads(content)
    assert parse_json("[Infinity]", "it", allowed=INFINITIES) == [float("inf")]


def test_a_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match=r"a\.json is missing; copy it again"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(SparsepassError, match=r"b\.json is no regular file"):
        read_json(tmp_path / "b.json")
    os.mkfifo(tmp_path / "c.json")
    with pytest.raises(SparsepassError, match=r"c\.json is no regular file"):
        read_json(tmp_path / "c.json")
    with pytest.raises(SparsepassError, match="no regular file"):
        read_json(Path("/dev/zero"))
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(SparsepassError, match=r"d\.json holds a list where an object is expected"):
        read_object(tmp_path / "d.json")


def test_a_type_is_checked_strictly(tmp_path: Path) -> None:
    kind = TypeAdapter(dict[str, tuple[int, str]])
    assert check_as(kind, {"a": [1, "b"]}, "it") == {"a": (1, "b")}
    wrong: Any
    for wrong in ({"a": ["1", "b"]}, {"a": [1]}, {"a": [True, "b"]}, {"a": None}, [], None, {"a": [1.5, "b"]}):
        (tmp_path / "x.json").write_text(json.dumps(wrong))
        with pytest.raises(SparsepassError, match=r"x\.json: "):
            read_as(kind, tmp_path / "x.json")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}']
)
def test_an_index_without_a_map_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SparsepassError, match=r"model\.safetensors\.index\.json: "):
        weight_map(tmp_path / "model.safetensors.index.json")


def test_only_what_the_library_raises_is_caught() -> None:
    with (
        pytest.raises(SparsepassError, match=r"a\.onnx cannot be read by onnx \(KeyError: 'b'\)"),
        read_by("onnx", "a.onnx", KeyError),
    ):
        raise KeyError("b")
    with pytest.raises(TypeError), read_by("onnx", "a.onnx", KeyError):
        raise TypeError("a defect of ours")


def test_a_path_is_shown_in_one_line() -> None:
    assert shown(os.fsdecode(b"a\xff\n\x1b[2J")) == "a\\xff\\n\\x1b[2J"


def _safetensors(header: "dict[str, Any] | bytes", data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(shape: "list[Any]", first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


_A = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "no length": b"1234567",
    "a length beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
    "the largest length": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "no header": _safetensors(b""),
    "a list": _safetensors(b"[]"),
    "10,000 levels": _safetensors(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "a tensor twice": _safetensors(b'{"a":%b,"a":%b}' % (_A, _A), b"0000"),
    "tensors over each other": _safetensors({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, b"0000"),
    "a gap": _safetensors({"a": _entry([1], 4, 8)}, bytes(8)),
    "bytes behind": _safetensors({"a": _entry([1], 0, 4)}, bytes(8)),
    "beyond the file": _safetensors({"a": _entry([2], 0, 8)}, bytes(4)),
    "more than its bytes": _safetensors({"a": _entry([3], 0, 8)}, bytes(8)),
    "a negative length": _safetensors({"a": _entry([-1], 0, 4)}, bytes(4)),
    "a length that is none": _safetensors({"a": _entry([True], 0, 4)}, bytes(4)),
    "5,000 axes": _safetensors({"a": _entry([1] * 5000, 0, 4)}, bytes(4)),
    "no memory has it": _safetensors({"a": _entry([0, 1 << 62, 1 << 62], 0, 0)}),
    "an unknown type": _safetensors({"a": _entry([1], 0, 4, "F31")}, bytes(4)),
    "no entry": _safetensors({"a": None}),
    "metadata that is no text": _safetensors({"__metadata__": {"a": 1}}),
    "a mask of other bytes": _safetensors({"a": _entry([4], 0, 4, "BOOL")}, b"\0\1\2\3"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_safetensors_file_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(HEADERS[damage])
    with pytest.raises(SparsepassError, match=r"a\.safetensors"):
        load_tensors(tmp_path / "a.safetensors")


def test_whole_safetensors_files_are_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([True, False]),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(1),
    }
    (tmp_path / "a.safetensors").write_bytes(save(tensors, {"x": "y"}))
    found = load_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {name: entry["shape"] for name, entry in check_tensors(tmp_path / "a.safetensors").items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


@settings(max_examples=150)
@given(data=st.data())
def test_no_change_of_bytes_comes_through_as_another_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = save({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}, {"x": "y"})
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "double", "noise"]))
    changed = bytearray(whole)
    if kind == "flip":
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[place:]
    elif kind == "double":
        changed[place:place] = whole[:place]
    else:
        changed[place : place + 16] = data.draw(st.binary(min_size=16, max_size=16))
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(bytes(changed))
    with contextlib.suppress(SparsepassError):
        load_tensors(path)


@settings(max_examples=150)
@given(
    content=st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789.eE-+truefalsnNaI\\ud ', max_size=60).map(str.encode)
)
def test_any_bytes_are_json_or_refused(content: bytes) -> None:
    with contextlib.suppress(SparsepassError):
        assert json.loads(json.dumps(found := parse_json(content, "it"))) == found
