"""The integers and numbers of fp8 that TensorRT takes behind a DequantizeLinear.

Symmetric; 8 bits with a scale for the tensor or each row; 4 bits for the weights of matrices, in blocks of 64 or 128 that fill
a row; scales above 0. fp8 from SM89 on: tensorrt-rtx 1.7 does not build it for older ones.

Source: NVIDIA's "Working with Quantized Types" (TensorRT 10).
"""

from collections.abc import Collection, Iterable
from typing import Final

from sparsepass.graph.program import Program
from sparsepass.graph.rounding import RoundingGrid
from sparsepass.graph.support import SparsepassError
from sparsepass.passes import Pass, Quantize, QuantizeEmbedding

INT4_BLOCKS: Final = (64, 128)
_FLOAT8_SM: Final = 89
_IS_TABLE: Final = "it is looked up, and integers stand in front of a DequantizeLinear only"


def check_grids(program: Program, sms: Collection[int] = ()) -> None:
    """Refuse a program with weights that TensorRT does not take.

    Args:
        program: Not changed.
        sms: Compute capabilities that engines are built for.

    Raises:
        SparsepassError: If a weight has others; the message names it.
    """
    tables = {site.weight for site in program.sites() if site.role == "embedding"}
    for name, state in program.quantized.items():
        weight, scales = program.tensor(name), program.tensor(state.scales)
        is_row = scales.shape[-1] == 1
        reason = _IS_TABLE if name in tables else _why_no_grid(state.grid, sms, is_row=is_row)
        if not reason and state.bits == 4 and scales.dim() < weight.dim():
            reason = "4 bits are for matrices, not for convolutions"
        elif not reason and state.bits == 4 and weight.shape[state.axis] % state.group_size:
            reason = f"its {weight.shape[state.axis]} input features are no multiple of {state.group_size}"
        _refuse_grid(name, state.grid, reason)


def check_passes(passes: Iterable[Pass], sms: Collection[int] = ()) -> None:
    """Refuse passes that round weights to what TensorRT does not take, before they run.

    Args:
        passes: Those that are going to be applied.
        sms: As for `check_grids`.

    Raises:
        SparsepassError: If one of them is such; the message names it.
    """
    for item in passes:
        if isinstance(item, QuantizeEmbedding):
            _refuse_grid("what quantize_embedding rounds", item.grid, _IS_TABLE)
        elif isinstance(item, Quantize):
            reason = _why_no_grid(item.grid, sms, is_row=not item.grid.group_size)
            _refuse_grid("what quantize rounds", item.grid, reason)


def _why_no_grid(grid: RoundingGrid, sms: Collection[int], *, is_row: bool) -> str:
    """Why TensorRT takes no weight of a grid; empty if it takes some."""
    if not grid.symmetric:
        return "zero points have to be 0"
    if grid.format == "fp8" and sms and min(sms) < _FLOAT8_SM:
        return f"fp8 needs SM{_FLOAT8_SM}, and an engine is to be built for SM{min(sms)}; give sm={_FLOAT8_SM} or later"
    if grid.bits == 8 and not is_row:
        return "8 bits have one scale a row"
    if grid.bits == 4 and grid.group_size not in INT4_BLOCKS:
        return f"4 bits have groups of {' or '.join(map(str, INT4_BLOCKS))}"
    return ""


def _refuse_grid(what: str, grid: RoundingGrid, reason: str) -> None:
    if reason:
        raise SparsepassError(
            f"TensorRT cannot take {what} ({grid.text}): {reason}; quantize with quantize{{bits=8,group_size=0}} or "
            "quantize{group_size=64}, without quantize_embedding, or write floating-point values with form=dense"
        )
