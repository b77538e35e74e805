"""Timing dense against sparse: the sizes, the inputs and the break-even; and the same engines run, where there is a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import BY_NAME
from torch import nn

from sparsepass.export.stages.exporting import export
from sparsepass.export.targets.evidence import Point, break_even
from sparsepass.export.targets.onnx.artifact import OnnxGraph, OnnxValue
from sparsepass.export.targets.tensorrt import lower as tensorrt, verify as tensorrt_verify
from sparsepass.export.targets.tensorrt.build import Built
from sparsepass.export.targets.tensorrt.packages import RUNTIMES, Gpu, Installed
from sparsepass.export.targets.tensorrt.profiles import Profile, grid, inputs_of, measure
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.export.targets.tensorrt.verify import DecoderEngines, EngineFile
from sparsepass.graph import EquivalenceError
from sparsepass.graph.equivalence.comparison import assert_equivalent
from sparsepass.graph.equivalence.running import open_artifact


def value(name: str, dtype: str, *axes: str | int) -> OnnxValue:
    return OnnxValue(name=name, dtype=dtype, axes=axes)


DECODER = OnnxGraph(
    file="model.onnx",
    role="model",
    inputs=(
        value("input_ids", "int64", "batch", "sequence"),
        value("attention_mask", "int64", "batch", "total_sequence"),
        value("position_ids", "int64", "batch", "sequence"),
        value("past_key_values.0.key", "float16", "batch", 2, "past_sequence", 8),
    ),
    outputs=(),
    num_nodes=1,
)
DECODE = Profile(name="decode", ranges={"batch": (1, 1, 4), "sequence": (1, 1, 1), "past_sequence": (1, 16, 31)})


def point(tokens: int, gain: float) -> Point:
    return Point(batch=1, sequence=tokens, dense_ms=gain, sparse_ms=1.0)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({1: 0.8, 64: 0.9, 512: 1.2, 4096: 1.5}, "sparse is faster from 512 tokens at once on (1.20x there)"),
        ({1: 0.8, 64: 1.1, 512: 0.9, 4096: 1.5}, "sparse is faster from 4096 tokens at once on"),
        ({1: 1.3, 64: 1.1}, "sparse is faster everywhere in what was measured (1.10x to 1.30x)"),
        ({1: 1.3, 64: 0.9}, "no break-even in what was measured: at best 1.30x, at 1 tokens at once"),
        ({1: 1.0}, "no break-even in what was measured"),
        ({}, "nothing was measured"),
    ],
)
def test_break_even(gains: dict[int, float], said: str) -> None:
    assert break_even([point(tokens, gain) for tokens, gain in gains.items()]).startswith(said)


def test_of_two_points_with_as_many_tokens_the_worse_one_counts() -> None:
    points = [point(64, 1.5), Point(batch=64, sequence=1, dense_ms=0.5, sparse_ms=1.0)]
    assert break_even(points).startswith("no break-even")


def test_the_grid_stays_in_the_profile() -> None:
    assert grid(DECODE) == [{"batch": batch, "sequence": 1, "past_sequence": 16} for batch in (1, 2, 4)]
    prefill = Profile(name="prefill", ranges={"batch": (3, 3, 3), "sequence": (1, 50, 100)})
    assert grid(prefill) == [{"batch": 3, "sequence": length} for length in (1, 16, 64)]


def test_inputs_have_the_right_lengths_and_types() -> None:
    found = inputs_of(DECODER, {"batch": 2, "sequence": 1, "past_sequence": 5})
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        "input_ids": ((2, 1), torch.int64),
        "attention_mask": ((2, 6), torch.int64),
        "position_ids": ((2, 1), torch.int64),
        "past_key_values.0.key": ((2, 2, 5, 8), torch.float16),
    }
    assert bool((found["position_ids"] == 5).all())
    assert bool((found["attention_mask"] == 1).all())


def test_both_engines_are_timed_at_every_size() -> None:
    found = measure(DECODER, DECODE, dense=lambda inputs: 2.0 * len(inputs["input_ids"]), sparse=lambda _: 4.0)
    assert [(p["batch"], p["past"], p["dense_ms"], p["sparse_ms"]) for p in found["points"]] == [
        (1, 16, 2.0, 4.0),
        (2, 16, 4.0, 4.0),
        (4, 16, 8.0, 4.0),
    ]
    assert found["break_even"] == "sparse is faster from 4 tokens at once on (2.00x there), and slower below (1.00x at 2)"


def test_prefill_then_decode_is_one_function_of_the_prompt(tmp_path: Path) -> None:
    """With the ONNX graph on both sides: the two engines are run exactly like this."""
    from sparsepass.export.targets.onnx.lower import lower_onnx
    from sparsepass.graph import capture

    family = BY_NAME["llama"]
    program = capture(family.model(), family.inputs(2, 8))
    lower_onnx(program, tmp_path)
    inputs = {"input_ids": family.inputs(2, 8)["input_ids"]}
    one = open_artifact(tmp_path / "model.onnx")
    assert_equivalent(program, DecoderEngines(one, one), inputs)
    with pytest.raises(EquivalenceError, match="at least two tokens"):
        DecoderEngines(one, one).run({"input_ids": inputs["input_ids"][:, :1]})


def test_an_engine_without_a_gpu_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EquivalenceError, match="sees no GPU"):
        EngineFile(tmp_path / "model.engine", tmp_path / "model.onnx", "tensorrt")


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU on which builds succeed, and no engine can be opened."""

    def build(job: Any, plan: Any, **_: Any) -> Built:
        (job.out / f"{plan.name}.engine").write_bytes(b"engine")
        (job.out / f"{plan.name}.log").write_text("")
        return Built(version="1", num_layers=3, size_bytes=6, seconds=0.1)

    def cannot(folder: Path, artifact: Any) -> Any:
        raise EquivalenceError(f"{artifact.engines[0].file} cannot be loaded here")

    rtx = Installed(runtime=RUNTIMES["tensorrt-rtx"], module="tensorrt_rtx", version="1")
    monkeypatch.setattr(tensorrt, "gpus", lambda: (Gpu(name="RTX A5000", sm=86),))
    monkeypatch.setattr(tensorrt, "choose", lambda name, gpus: rtx)
    monkeypatch.setattr(tensorrt.EngineJob, "build", build)
    monkeypatch.setattr(tensorrt, "engine_files", cannot)
    monkeypatch.setattr(tensorrt_verify, "engine_files", cannot)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return monkeypatch


def written(out: Path, *sm: int) -> Any:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    found = export(model, TensorRT(sm=sm), out, passes="nm_sparsify", example_inputs=torch.randn(2, 16))
    assert (out / "model.engine").read_bytes() == b"engine", "engines are not lost when they cannot be opened"
    checks = {check["name"]: check for check in found.report["verification"]["checks"]}
    return found, checks["engine outputs"], "\n".join(found.report["artifact"]["notes"])


def test_engines_for_other_gpus_are_neither_run_nor_timed(ampere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, outputs, notes = written(tmp_path / "out", 120)
    assert (outputs["held"], found.state) == (None, "not_checked")
    assert outputs["summary"] == "not run: built for other GPUs than RTX A5000 (SM86)"
    assert found.report["sparsity"]["measured"] is None
    assert "not timed" not in notes


def test_an_engine_that_cannot_be_opened_does_not_hold(ampere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, outputs, notes = written(tmp_path / "out", 86)
    assert (outputs["held"], found.held) == (False, False)
    assert outputs["summary"] == "on RTX A5000: model.engine cannot be loaded here"
    assert "dense and sparse engines were not timed: model.engine cannot be loaded here" in notes


def test_a_gpu_with_too_little_memory_proves_nothing(ampere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(folder: Path, artifact: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ampere.setattr(tensorrt, "engine_files", full)
    ampere.setattr(tensorrt_verify, "engine_files", full)
    found, outputs, notes = written(tmp_path / "out", 86)
    assert (outputs["held"], found.state) == (None, "not_checked")
    assert outputs["summary"] == "not run: RTX A5000 has too little free memory (CUDA out of memory)"
    assert "were not timed: CUDA out of memory" in notes


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_engines_run_and_are_timed_on_a_gpu(runtime: str, tmp_path: Path) -> None:
    from sparsepass.export.targets.tensorrt.packages import find

    if find(runtime) is None or not torch.cuda.is_available():
        pytest.skip(f"{runtime} is not installed, or there is no GPU for torch")
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    result = export(
        model,
        TensorRT(runtime=runtime),
        tmp_path / "out",
        passes="nm_sparsify",
        example_inputs=torch.randn(2, 512),
    )
    checks = {check["name"]: check for check in result.report["verification"]["checks"]}
    assert checks["engine outputs"]["held"] is True, checks["engine outputs"]["summary"]
    measured = result.report["sparsity"]["measured"]["model"]
    assert [point["batch"] for point in measured["points"]] == [1, 2, 4, 8]
    assert all(point["dense_ms"] > 0 and point["sparse_ms"] > 0 for point in measured["points"])
