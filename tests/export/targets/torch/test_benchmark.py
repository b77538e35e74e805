"""The script for a GPU, rehearsed with emulated kernels and made-up times: it has to run at the first try where a GPU is."""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.export.targets.torch.torch_cpu import CPU, GPU, emulated_kernels

from sparsepass.export.targets.torch import lower, verify
from sparsepass.export.targets.torch.record import read_timings
from sparsepass.graph import SparsepassError

ROOT = Path(__file__).parents[4]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_torch", ROOT / "benchmarks" / "gpu_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rehearsal(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Small shapes, a CPU that passes for a GPU, and a clock by which sparse is twice as fast."""
    turn: list[int] = []

    def clock(call: Any) -> float:
        call()
        turn.append(0)
        return 2.0 if len(turn) % 2 else 1.0

    with emulated_kernels():
        whole = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **options: whole(model, **{**options, "backend": "eager"}))
        for module in (lower, verify):
            monkeypatch.setattr(module, "gpu_is_here", lambda: True)
            monkeypatch.setattr(module, "_GPU", CPU)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "emulated")
        monkeypatch.setattr("sparsepass.export.targets.torch.measure.time_ms", clock)
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        small = {
            "DEVICE": CPU,
            "check_device": lambda _: GPU,
            "time_ms": clock,
            "SHAPES": {script.SMALL: {"q": (32, 64)}, script.LARGE: {"q": (64, 64)}},
            "SIZES": ((1, 1), (2, 2048)),
            "TOKENS": (1, 9),
            "PREFILLS": ((1, 4),),
            "MODELS": {script.SMALL: tiny, script.LARGE: tiny},
        }
        for name, value in small.items():
            monkeypatch.setattr(script, name, value)
        yield script


def test_it_runs_to_its_end_and_its_times_can_be_used(rehearsal: ModuleType, tmp_path: Path) -> None:
    arguments = argparse.Namespace(out=tmp_path / "results", dtype="bfloat16", mode="both", no_models=True)
    assert rehearsal.main(arguments) == 0
    assert {path.name for path in arguments.out.iterdir()} == {"gpu_torch.json", "gpu_torch-compiled.json", "gpu_torch.md"}
    for name, compiled in (("gpu_torch.json", False), ("gpu_torch-compiled.json", True)):
        document = json.loads((arguments.out / name).read_text())
        assert [verdict["held"] for verdict in document["verdicts"].values()] == [True, True, True]
        assert [row["backend"] for row in document["layers"]] == ["cutlass", "cutlass"]
        measured = read_timings(arguments.out / name)
        assert (measured.compiled, measured.points((64, 64), False)[1].tokens) == (compiled, 4096)
    page = (arguments.out / "gpu_torch.md").read_text()
    assert "| no layer slower than dense by more than 2% | yes |" in page
    assert "Llama-3-8B: q, 2 x 2048 tokens: 2.000 times as fast as dense" in page
    assert "| 64x64 | 2 / - / 1 | 2 / - / 1 |" in page
    assert "cusparselt cannot be used: cuSPARSELt is not there" in page


def test_a_whole_model_is_exported_loaded_compared_and_timed(rehearsal: ModuleType) -> None:
    found = rehearsal.whole_model(rehearsal.SMALL, "bfloat16", 1)
    assert found["failures"] == []
    assert found["layers"] == "7 layers lowered, 0 to be measured on a GPU, 1 dense"
    assert set(found["prefill"]) == {"1x4"}


def row(layer: str, *gains: float, size: tuple[int, int] = (1, 4096)) -> dict[str, Any]:
    points = [{"batch": size[0], "sequence": size[1], "dense_ms": gain, "chosen_ms": 1.0, "gain": gain} for gain in gains]
    return {"layer": layer, "chosen_against_dense": points}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("Llama-3-8B: q", 1.2), row("SmolLM2-135M: q")], [True, True, True]),
        ([row("Llama-3-8B: q", 1.2, 0.97)], [True, False, True]),
        ([row("Llama-3-8B: q", 1.2, 0.99)], [True, True, True]),
        ([row("Llama-3-8B: q", 1.1)], [True, True, False]),
        ([row("SmolLM2-135M: q", 1.2)], [True, True, False]),
        ([row("Llama-3-8B: q", 1.2, size=(8, 256))], [True, True, False]),
        ([row("Llama-3-8B: q")], [True, True, False]),
    ],
)
def test_it_judges_by_the_figures(script: ModuleType, rows: list[dict[str, Any]], expected: list[bool]) -> None:
    good = {"layer": "q", "backend": "cutlass", "failure": ""}
    assert [verdict["held"] for verdict in script.judge([good], rows).values()] == expected


def test_wrong_kernels_and_missing_ones_are_no_success(script: ModuleType) -> None:
    assert not script.judge([], [])["the kernels compute the same"]["held"]
    bad = {"layer": "q", "backend": "cutlass", "failure": "a product is off"}
    found = script.judge([bad], [], [{"model": "m", "failures": ["generate gave 0 tokens"]}])["the kernels compute the same"]
    assert (found["held"], found["said"]) == (False, "q cutlass: a product is off; m: generate gave 0 tokens")


def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparsepassError, match="no CUDA GPU is seen here"):
        script.main(argparse.Namespace(dtype="bfloat16"))
