"""torch_semi_structured.json and recorded times: read back as written, and refused with a reason if they were damaged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.targets.torch.torch_cpu import TIMINGS

from sparsepass.export.targets.torch.choice import ChoiceRules, parse_shapes
from sparsepass.export.targets.torch.kernels import BACKENDS, check_device, refusal, refusals
from sparsepass.export.targets.torch.record import RECORD_FILE, LayerRecord, Record, read_record, read_timings, write_record
from sparsepass.export.targets.torch.target import SemiStructured
from sparsepass.graph import SparsepassError

LAYER = LayerRecord(
    layer="a.b",
    shape=(32, 64),
    bias=True,
    sparse=True,
    eligible=True,
    state="lowered",
    reason="faster",
    backend="cutlass",
    min_tokens=8,
    k=16,
    projection="fixed",
)
RECORD = Record(
    dtype="bfloat16",
    layers=(LAYER, replace(LAYER, layer="c", state="dense", backend=None)),
    options=ChoiceRules(shapes=((1, 1), (8, 512)), sparse_only=True, compiled=True),
    measured=read_timings(TIMINGS),
)


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, measured=None)])
def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]
    assert record.summary() == "1 layers lowered, 0 to be measured on a GPU, 1 dense"


def test_times_are_read_from_a_folder_its_file_or_a_benchmark(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path)
    assert read_timings(tmp_path) == read_timings(tmp_path / RECORD_FILE) == read_timings(TIMINGS) == RECORD.measured


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 99}, r"schema 99, and this sparsepass reads up to 1; upgrade"),
        ({"layers": None}, "is damaged .* export the model again"),
        ({"layers": [{"layer": "a"}]}, "is damaged"),
        ({"layers": [{**RECORD.to_dict()["layers"][0], "state": "fast"}]}, "has the state 'fast'"),
        ({"layers": [{**RECORD.to_dict()["layers"][0], "backend": "triton"}]}, "with the backend 'triton'"),
        ({"layers": [{**RECORD.to_dict()["layers"][0], "backend": None}]}, "is lowered with the backend None"),
        ({"measured": {}}, "is damaged"),
        ({"options": {"shapes": [[0, 1]], "sparse_only": False, "compiled": False}}, "each at least 1"),
    ],
)
def test_damage_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text(json.dumps(RECORD.to_dict() | change))
    with pytest.raises(SparsepassError, match=said):
        read_record(tmp_path)


def test_what_is_no_record_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="is no folder of the target torch; write one with sparse-export --target torch"):
        read_record(tmp_path)
    for text in ("", "[1]", "{"):
        (tmp_path / RECORD_FILE).write_text(text)
        with pytest.raises(SparsepassError, match=r"is damaged|cannot be read as JSON|holds a list where|is empty"):
            read_record(tmp_path)
        with pytest.raises(SparsepassError, match=r"is damaged|cannot be read as JSON|holds a list where|is empty"):
            read_timings(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sm": 75, "name": "Tesla T4"}, r"Tesla T4 is SM75 and has no 2:4 kernels: they need Ampere \(SM80\) or newer"),
        ({"times": [{"shape": [1, 2], "bias": False, "points": [{"batch": 1}]}]}, "is damaged"),
        ({"times": 3}, "is damaged"),
    ],
)
def test_times_that_cannot_be_used_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    document = json.loads(TIMINGS.read_text())
    (tmp_path / "t.json").write_text(json.dumps({"measured": document["measured"] | change}))
    with pytest.raises(SparsepassError, match=said):
        read_timings(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ({"dense_ms": 0.0, "sparse_ms": {"cutlass": 1.0}}, "a time at 1x1 is not positive"),
        ({"dense_ms": 1.0, "sparse_ms": {"cutlass": float("nan")}}, "it holds NaN, which is no number"),
        ({"dense_ms": 1.0, "sparse_ms": {"triton": 1.0}}, "unknown backend 'triton'"),
    ],
)
def test_impossible_times_are_refused(point: dict[str, Any], said: str, tmp_path: Path) -> None:
    measured = json.loads(TIMINGS.read_text())["measured"]
    measured["times"][0]["points"][0] = {"batch": 1, "sequence": 1, **point}
    (tmp_path / "t.json").write_text(json.dumps(measured))
    with pytest.raises(SparsepassError, match=said):
        read_timings(tmp_path / "t.json")


def test_a_folder_where_nothing_was_measured_has_no_times(tmp_path: Path) -> None:
    write_record(replace(RECORD, measured=None), tmp_path)
    with pytest.raises(SparsepassError, match="holds no times, because nothing was measured"):
        read_timings(tmp_path)
    with pytest.raises(SparsepassError, match=r"nowhere.json do not exist; give a torch_semi_structured.json"):
        read_timings(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text", ["512", "1x", "ax2", "1x2x3", "1x-2", ""])
def test_sizes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(SparsepassError, match="expected BATCHxSEQUENCE"):
        parse_shapes(text)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SparsepassError, match="each at least 1"):
        SemiStructured(shapes=parse_shapes("0x4"))
    with pytest.raises(SparsepassError, match="leave shapes and compiled out"):
        SemiStructured(timings=TIMINGS, compiled=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(16, 16), (32, 64), (48, 64), (8, 64), (64, 96), (64, 40), (32, 8)])
def test_shape_rules_are_torchs_own(name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    if refusal(shape, torch.bfloat16, name):
        with pytest.raises(RuntimeError, match="shape"):
            BACKENDS[name]._validate_device_dim_dtype_shape(weight)
    else:
        assert BACKENDS[name]._validate_device_dim_dtype_shape(weight) is None
    assert refusal(shape, torch.float32, name) == "no 2:4 kernels for float32"


def test_one_backend_is_enough() -> None:
    assert refusals((48, 64), torch.bfloat16) == ""
    assert refusal((48, 64), torch.bfloat16, "cutlass") == "out_features 48 is not a multiple of 32"


def test_devices_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparsepassError, match="the device given is cpu; name a CUDA device"):
        check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparsepassError, match=r"no CUDA GPU is seen here.* load the folder on a GPU machine"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(SparsepassError, match="Tesla V100 is SM70 and has no 2:4 kernels"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert check_device(torch.device("cuda")).sm == 120
