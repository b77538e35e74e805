"""Programs in 2:4 and integers, by each way of rounding, and whether a mask's zeros are integers that stand for 0."""

import functools

from tests.families import BY_NAME, captured

from sparsepass.graph import Program
from sparsepass.graph.integers import integers_of
from sparsepass.passes import apply_passes

METHODS = ("rtn", "awq", "joint")
"""To the nearest; the same behind AWQ's factors; in SparseGPT's loop."""


@functools.cache
def rounded(name: str, method: str, bits: int, symmetric: bool, group_size: int = 16) -> Program:
    """A tiny program of a family."""
    grid = f"bits={bits},group_size={group_size},symmetric={str(symmetric).lower()}"
    how = {
        "rtn": f"quantize{{{grid}}}",
        "awq": f"awq_scale{{{grid}}},quantize{{{grid}}}",
        "joint": f"quantize{{method=joint,{grid}}}",
    }[method]
    calibration = None if method == "rtn" else BY_NAME[name].inputs(4, 8)["input_ids"]
    text = f"nm_sparsify{{criterion=magnitude}},{how}"
    program = apply_passes(captured(name), text, calibration=calibration, validate=False)
    if method == "awq":
        scaled = [outcome for outcome in program.history[1].outcomes if outcome.action == "rewritten"]
        assert scaled, "a family that takes no factors shows nothing"
    assert check_zeros(program) > 0
    return program


def check_zeros(program: Program) -> int:
    """Make sure that every dropped weight's integer stands for 0; return how many there are."""
    count = 0
    for name, sparse in program.sparse.items():
        own, grid = integers_of(program, name), program.quantized.get(name)
        if own is None or grid is None or sparse.mask is None or program.tensor(name).dim() != 2:
            continue
        mask = program.tensor(sparse.mask)
        dropped = ~(mask if grid.axis == 1 else mask.T)
        assert not own.weight_OI[dropped].any(), name
        count += int(dropped.sum())
    return count
