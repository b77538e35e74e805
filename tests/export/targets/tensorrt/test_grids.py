"""Quantized programs for TensorRT: the grids that it takes are written as integers and built, others are refused."""

import platform
import re
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from tests.export.targets.zeros import METHODS, check_zeros
from tests.families import captured
from torch import nn

from sparsepass.export.targets import LoweringContext
from sparsepass.export.targets.tensorrt import lower as tensorrt
from sparsepass.export.targets.tensorrt.grids import check_grids
from sparsepass.export.targets.tensorrt.lower import lower_tensorrt
from sparsepass.export.targets.tensorrt.packages import find
from sparsepass.export.targets.tensorrt.target import TensorRT
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.integers import integers_of
from sparsepass.passes import apply_passes, parse_pipeline

has_no_builder = pytest.mark.skipif(
    find("tensorrt-rtx") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="tensorrt-rtx is to be had for x86-64 only",
)


WIDE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
"""Rows that groups of 64 fill twice, and others once."""


def wide(name: str, method: str, grid: str) -> Program:
    """A program of a family, quantized in one of the ways of rounding."""
    torch.manual_seed(0)
    model: nn.Module = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, intermediate_size=64, pad_token_id=0))
        if name == "llama"
        else transformers.BertModel(transformers.BertConfig(**WIDE, intermediate_size=64))
    )
    rounding = {"rtn": f"quantize{{{grid}}}", "awq": f"awq_scale{{{grid}}},quantize{{{grid}}}"}
    text = rounding.get(method, f"quantize{{method=joint,{grid}}}")
    ids = torch.randint(3, 96, (4, 8))
    calibration = None if method == "rtn" else ids
    text = f"nm_sparsify{{criterion=magnitude}},{text}"
    inputs = {"input_ids": ids}
    program = apply_passes(model.half().eval(), text, calibration=calibration, example_inputs=inputs, validate=False)
    assert check_zeros(program) > 0
    return program


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
@pytest.mark.parametrize("grid", ["bits=8,group_size=0", "bits=4,group_size=64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_zero_is_lost(name: str, method: str, grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    program, target = wide(name, method, grid), TensorRT(runtime="tensorrt-rtx", sm=(86,))
    lowered = target.lower(program, tmp_path, LoweringContext())
    file = tmp_path / "model.onnx"
    graph = ir.load(file).graph
    for weight in program.quantized:
        own, stored = integers_of(program, weight), graph.initializers[weight].const_value
        assert own is not None
        assert stored is not None
        (one,) = lowered.artifact.onnx.weights[weight]
        numbers = stored.numpy()
        assert (numbers if one.axis == 1 else numbers.T).tolist() == own.numbers_OI.tolist(), weight
    blocks = {node.attributes.get_int("block_size", 0) for node in graph if node.op_type == "DequantizeLinear"}
    assert blocks == ({64} if "bits=4" in grid else {0})
    assert {layer.conforms for layer in lowered.artifact.layers if layer.weight in program.sparse} == {"yes"}
    checks = {check.name: check for check in target.verify(program, tmp_path, lowered, LoweringContext())}
    assert {name: checks[name].held for name in ("pattern", "weights", "outputs")} == dict.fromkeys(
        ("pattern", "weights", "outputs"), True
    ), checks
    weight = next(iter(program.sparse))
    mask = program.tensor(program.sparse[weight].mask)  # type: ignore[arg-type]
    lose(file, weight, (~mask).nonzero()[0].tolist())
    checks = {check.name: check for check in target.verify(program, tmp_path, lowered, LoweringContext())}
    assert (checks["pattern"].held, checks["weights"].held) == (False, False)


def lose(file: Path, weight: str, place: list[int]) -> None:
    """Give a weight that is dropped another integer than 0."""
    model = onnx.load(file)
    (tensor,) = (each for each in model.graph.initializer if each.name == weight)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[tuple(place)] = array.dtype.type(1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, weight))
    onnx.save(model, file)


@has_no_builder
@pytest.mark.parametrize(("options", "sm"), [("bits=8,group_size=0", 86), ("bits=4,group_size=64", 86), ("format=fp8", 89)])
def test_rows_of_zeros_are_built(options: str, sm: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser wants scales above 0."""
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    first = nn.Linear(128, 32)
    with torch.no_grad():
        first.weight[3] = 0
    lower_tensorrt(quantized(options, first), tmp_path, TensorRT(runtime="tensorrt-rtx", sm=(sm,)))
    scales = ir.load(tmp_path / "model.onnx").graph.initializers["0.weight_scale"].const_value
    assert scales is not None
    assert (scales.numpy() > 0).all()


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
    said = said.replace("0.weight", "what quantize rounds")
    passes = f"nm_sparsify{{criterion=magnitude}},quantize{{{options}}}"
    with pytest.raises(SparsepassError, match=f"TensorRT cannot take .*{re.escape(said)}.*form=dense"):
        TensorRT().check_passes(parse_pipeline(passes))
    TensorRT(form="dense").check_passes(parse_pipeline(passes))


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
    with pytest.raises(SparsepassError, match=r"cannot take what quantize_embedding rounds .*: it is looked up"):
        TensorRT().check_passes(parse_pipeline("quantize_embedding"))


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
