"""Quantized programs for TensorRT: the grids that it takes are written as integers and built, others are refused."""

import platform
import re
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from tests.export.targets.zeros import METHODS, rounded
from tests.families import captured
from torch import nn

from sparsepass.export.targets.tensorrt import lower as tensorrt
from sparsepass.export.targets.tensorrt.lower import check_grids, lower_tensorrt
from sparsepass.export.targets.tensorrt.packages import find
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.integers import integers_of
from sparsepass.passes import apply_passes

has_no_builder = pytest.mark.skipif(
    find("tensorrt-rtx") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="tensorrt-rtx is to be had for x86-64 only",
)


def quantized(options: str, first: nn.Module | None = None, shape: tuple[int, ...] = (4, 128)) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(first or nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16)).half()
    inputs = torch.randn(shape).half()
    text = f"nm_sparsify{{criterion=magnitude}},quantize{{{options}}}"
    return apply_passes(model, text, example_inputs=inputs, validate=False)


@has_no_builder
@pytest.mark.parametrize(
    ("options", "kind", "sm"),
    [
        ("bits=8,group_size=0", "INT8", 86),
        ("bits=4,group_size=64", "INT4", 86),
        ("format=fp8", "FLOAT8E4M3FN", 89),
        ("format=fp8", "FLOAT8E4M3FN", 120),
    ],
)
def test_numbers_are_built_into_an_engine(
    options: str, kind: str, sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    artifact = lower_tensorrt(quantized(options), tmp_path, TensorRT(runtime="tensorrt-rtx", sm=(sm,)))
    graph = ir.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph].count("DequantizeLinear") == 1
    stored = graph.initializers["0.weight"].const_value
    assert stored is not None
    assert stored.dtype.name == kind
    assert (tmp_path / "model.engine").stat().st_size == artifact.engines[0].size_bytes > 1000
    assert [layer.conforms for layer in artifact.layers if layer.weight == "0.weight"] == ["yes"]


@has_no_builder
@pytest.mark.parametrize("method", METHODS)
def test_no_zero_is_lost(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    program = rounded("bert", method, 8, True, 0)
    artifact = lower_tensorrt(program, tmp_path, TensorRT(runtime="tensorrt-rtx", sm=(86,), dtype="float16"))
    graph = ir.load(tmp_path / "model.onnx").graph
    for name in program.quantized:
        own, stored = integers_of(program, name), graph.initializers[name].const_value
        assert own is not None
        assert stored is not None
        (one,) = artifact.onnx.weights[name]
        numbers = stored.numpy()
        assert (numbers if one.axis == 1 else numbers.T).tolist() == own.numbers_OI.tolist(), name
    assert {layer.conforms for layer in artifact.layers if layer.weight in program.sparse} == {"yes"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("bits=8,group_size=0,symmetric=false", "0.weight (uint8, one scale a row): zero points have to be 0"),
        ("bits=4,group_size=64,symmetric=false", "zero points have to be 0"),
        ("bits=8,group_size=64", "8 bits have one scale a row"),
        ("bits=4,group_size=32", "4 bits have groups of 64 or 128"),
        ("bits=4,group_size=0", "4 bits have groups of 64 or 128"),
        ("format=fp8,group_size=64", "8 bits have one scale a row"),
    ],
)
def test_other_grids_are_refused(options: str, said: str) -> None:
    with pytest.raises(SparsepassError, match=f"TensorRT cannot take .*{re.escape(said)}.*form=dense"):
        check_grids(quantized(options))


def test_fp8_is_refused_for_gpus_without_it() -> None:
    check_grids(quantized("format=fp8"), (89, 120))
    with pytest.raises(SparsepassError, match="fp8 needs SM89, and an engine is to be built for SM80; give sm=89 or later"):
        check_grids(quantized("format=fp8"), (80, 89))


def test_other_layers_of_four_bits_are_refused() -> None:
    with pytest.raises(SparsepassError, match="its 96 input features are no multiple of 64"):
        check_grids(quantized("group_size=64", nn.Linear(96, 32), (4, 96)))
    with pytest.raises(SparsepassError, match="4 bits are for matrices, not for convolutions"):
        check_grids(quantized("group_size=64", nn.Conv1d(128, 8, 3), (2, 128, 34)))


def test_a_table_that_is_looked_up_is_refused() -> None:
    """tensorrt-rtx 1.7: a quantized constant is only allowed before a DequantizeLinear."""
    program = apply_passes(captured("llama"), "quantize_embedding", validate=False)
    with pytest.raises(SparsepassError, match=r"cannot take model\.embed_tokens\.weight .*: it is looked up"):
        check_grids(program)


@has_no_builder
def test_they_are_refused_before_anything_is_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    options = TensorRT(runtime="tensorrt-rtx", sm=(86,))
    program = quantized("group_size=16")
    with pytest.raises(SparsepassError, match=r"TensorRT cannot take 0\.weight"):
        lower_tensorrt(program, tmp_path, options)
    assert not list(tmp_path.iterdir())


def test_forms_of_other_targets_are_refused() -> None:
    with pytest.raises(SparsepassError, match="form=matmulnbits is not known to the target tensorrt; expected qdq or dense"):
        TensorRT(form="matmulnbits")
