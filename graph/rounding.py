"""The grid of integers that weights are rounded to: a scale, and where it has one a zero point, for each group of a row.

Whatever rounds weights, and whatever asks what rounding costs, takes the grid from here.

Tensor shapes: O rows, I columns, G groups of a row, K columns of a group.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.support import SparsepassError


@dataclass(frozen=True, kw_only=True)
class RoundingGrid:
    """What weights may become.

    Attributes:
        bits: Of an integer, 8 or 4.
        group_size: Columns that share a scale, the last ones of a row maybe fewer; 0 if all of a row do.
        symmetric: Whether 0 is the middle: integers are signed, and scales alone are stored. Otherwise integers begin at 0, and
            a zero point says which of them stands for 0. Both hold 0 exactly, so that a pruned weight stays pruned.

    Raises:
        SparsepassError: If there is no such grid.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SparsepassError(f"weights are rounded to 8 or 4 bits, not to {self.bits}")
        if self.group_size < 0:
            raise SparsepassError(f"group_size is a number of columns, or 0 for a whole row; it is {self.group_size}")

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest integer."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        return (-127, 127) if self.bits == 8 else (-8, 7)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """A weight as integers.

    Attributes:
        grid: What it was rounded to.
        numbers_OGK: The integers, as floating values; the last group of a row is filled up with what stands for 0.
        scales_OG: bfloat16.
        zeros_OG: The integers that stand for 0, as floating values; None where that is 0.
        columns: Columns of the weight.
    """

    grid: RoundingGrid
    numbers_OGK: Tensor  # noqa: N815
    scales_OG: Tensor  # noqa: N815
    zeros_OG: Tensor | None  # noqa: N815
    columns: int

    @property
    def numbers_OI(self) -> Tensor:  # noqa: N802
        """The integers: int8, or uint8 where there are zero points."""
        return self.numbers_OGK.flatten(-2)[..., : self.columns].to(torch.int8 if self.grid.symmetric else torch.uint8)

    @cached_property
    def weight_OI(self) -> Tensor:  # noqa: N802
        """What they stand for, float32."""
        steps_OGK = self.numbers_OGK if self.zeros_OG is None else self.numbers_OGK - self.zeros_OG[..., None]
        return (steps_OGK * self.scales_OG.float()[..., None]).flatten(-2)[..., : self.columns]


def round_to_nearest(weight_OI: Tensor, grid: RoundingGrid, scales_OG: Tensor | None = None) -> Rounded:
    """Round a weight to a grid.

    Shapes: ``[..., O, I]``.

    Args:
        weight_OI: The weight, with its zeros if it has such.
        grid: What to round to.
        scales_OG: Of a symmetric grid. By default each is the least bfloat16 that does not clip its group.

    Returns:
        Integers, scales and zero points. Zeros of the weight are zeros of the result, exactly.

    Raises:
        SparsepassError: If a scale is not finite.

    Example:
        >>> rounded = round_to_nearest(torch.tensor([[7.0, -3.4, 0.0, 1.6]]), RoundingGrid(group_size=4))
        >>> rounded.numbers_OI
        tensor([[ 7, -3,  0,  2]], dtype=torch.int8)
        >>> round_to_nearest(torch.tensor([[15.0, 3.4, 0.0, 1.6]]), RoundingGrid(symmetric=False)).weight_OI
        tensor([[15.,  3.,  0.,  2.]])
    """
    columns = weight_OI.shape[-1]
    size = min(grid.group_size, columns) or columns
    grouped_OGK = functional.pad(weight_OI.detach().float(), (0, -columns % size)).unflatten(-1, (-1, size))
    least, most = grid.ends
    zeros_OG = None
    if grid.symmetric:
        scales_OG = _rounded_up(grouped_OGK.abs().amax(-1) / most) if scales_OG is None else scales_OG.to(torch.bfloat16)
    else:
        assert scales_OG is None, "scales without their zero points say nothing"
        low_OG, high_OG = grouped_OGK.amin(-1).clamp_max(0), grouped_OGK.amax(-1).clamp_min(0)
        scales_OG = _rounded_up((high_OG - low_OG) / most)
        zeros_OG = (-low_OG / _divisor(scales_OG)).round_().clamp_(least, most)
    if not scales_OG.isfinite().all():
        raise SparsepassError(f"a scale of int{grid.bits} is not finite; give finite ones, or leave scales out")
    numbers_OGK = (grouped_OGK / _divisor(scales_OG)[..., None]).round_()
    if zeros_OG is not None:
        numbers_OGK += zeros_OG[..., None]
    return Rounded(
        grid=grid, numbers_OGK=numbers_OGK.clamp_(least, most), scales_OG=scales_OG, zeros_OG=zeros_OG, columns=columns
    )


def _divisor(scales: Tensor) -> Tensor:
    """Scales in float32, with 1 for groups of zeros."""
    return scales.float().where(scales != 0, 1.0)


def _rounded_up(scales: Tensor) -> Tensor:
    """The least bfloat16 that is not below each of some numbers, which are not negative."""
    return (scales.view(torch.int32) + 0xFFFF >> 16).to(torch.int16).view(torch.bfloat16)
