"""The grid that weights are rounded to: a scale, and where it has one a zero point, for each group of a row.

Whatever rounds weights, and whatever asks what rounding costs, takes the grid from here.

Tensor shapes: O rows, I columns, G groups of a row, K columns of a group.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.support import SparsepassError

NumberFormat = Literal["int", "fp8"]
FORMATS: tuple[str, ...] = get_args(NumberFormat)


@dataclass(frozen=True, kw_only=True)
class RoundingGrid:
    """What weights may become.

    Attributes:
        bits: Of a number, 8 or 4; fp8 has 8.
        group_size: Columns that share a scale, the last ones of a row maybe fewer; 0 if all of a row do.
        symmetric: Whether 0 is the middle: integers are signed, and scales alone are stored. Otherwise integers begin at 0, and
            a zero point says which of them stands for 0. Both hold 0 exactly, so that a pruned weight stays pruned. Numbers of
            fp8 have a sign.
        format: ``int``, or ``fp8``: floating-point numbers with 4 bits for the exponent and 3 for the fraction, up to 448
            (e4m3, in torch ``float8_e4m3fn``).

    Raises:
        SparsepassError: If there is no such grid.

    Source: fp8: FP8 Formats for Deep Learning, arXiv 2209.05433, section 3.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    format: NumberFormat = "int"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SparsepassError(f"weights are rounded to the format {' or '.join(FORMATS)}, not to {self.format!r}")
        if self.bits not in (4, 8):
            raise SparsepassError(f"weights are rounded to 8 or 4 bits, not to {self.bits}")
        if self.group_size < 0:
            raise SparsepassError(f"group_size is a number of columns, or 0 for a whole row; it is {self.group_size}")
        if self.format == "fp8" and self.bits != 8:
            raise SparsepassError(f"format=fp8 has 8 bits, not {self.bits}; leave bits out, or give format=int")
        if self.format == "fp8" and not self.symmetric:
            raise SparsepassError(
                "format=fp8 has numbers of both signs and no zero points, so symmetric=false is for integers; leave it out, or "
                "give format=int"
            )

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest number."""
        if self.format == "fp8":
            return -448, 448
        if not self.symmetric:
            return 0, 2**self.bits - 1
        return (-127, 127) if self.bits == 8 else (-8, 7)

    @property
    def dtype(self) -> torch.dtype:
        """What holds a number: a byte, also of 4 bits."""
        if self.format == "fp8":
            return torch.float8_e4m3fn
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def kind(self) -> str:
        """What its numbers are called.

        Example:
            >>> RoundingGrid(bits=8, format="fp8").kind, RoundingGrid(symmetric=False).kind
            ('fp8', 'uint4')
        """
        return "fp8" if self.format == "fp8" else f"{'int' if self.symmetric else 'uint'}{self.bits}"

    @property
    def text(self) -> str:
        """In few words.

        Example:
            >>> RoundingGrid(bits=8, group_size=0).text, RoundingGrid(symmetric=False).text
            ('int8, one scale a row', 'uint4, groups of 64')
        """
        return f"{self.kind}, {f'groups of {self.group_size}' if self.group_size else 'one scale a row'}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """A weight as numbers of its grid.

    Attributes:
        grid: What it was rounded to.
        numbers_OGK: The numbers, in float32; the last group of a row is filled up with what stands for 0.
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
        """The numbers: int8, or uint8 where there are zero points, or float8_e4m3fn."""
        return self.numbers_OGK.flatten(-2)[..., : self.columns].to(self.grid.dtype)

    @cached_property
    def weight_OI(self) -> Tensor:  # noqa: N802
        """What they stand for, float32."""
        steps_OGK = self.numbers_OGK if self.zeros_OG is None else self.numbers_OGK - self.zeros_OG[..., None]
        return (steps_OGK * self.scales_OG.float()[..., None]).flatten(-2)[..., : self.columns]


def round_to_nearest(
    weight_OI: Tensor, grid: RoundingGrid, scales_OG: Tensor | None = None, zeros_OG: Tensor | None = None
) -> Rounded:
    """Round a weight to a grid.

    Shapes: ``[..., O, I]``.

    Args:
        weight_OI: The weight, with its zeros if it has such.
        grid: What to round to.
        scales_OG: Taken as they are. By default those of `fit_scales`.
        zeros_OG: The integers that stand for 0, beside such scales; of a grid that is not symmetric.

    Returns:
        Numbers, scales and zero points. Zeros of the weight are zeros of the result, exactly, and none is -0.0.

    Raises:
        SparsepassError: If a scale is not finite.

    Exactness: what lies on the grid already comes back bit for bit; from bfloat16 too, for up to 127 steps on either side: that
    was rounded by at most 1/256, which is less than half a step there. Numbers of fp8 are 1/16 apart, or more.

    Example:
        >>> rounded = round_to_nearest(torch.tensor([[7.0, -3.4, 0.0, 1.6]]), RoundingGrid(group_size=4))
        >>> rounded.numbers_OI
        tensor([[ 7, -3,  0,  2]], dtype=torch.int8)
        >>> round_to_nearest(torch.tensor([[15.0, 3.4, 0.0, 1.6]]), RoundingGrid(symmetric=False)).weight_OI
        tensor([[15.,  3.,  0.,  2.]])
    """
    columns = weight_OI.shape[-1]
    grouped_OGK = in_groups(weight_OI.detach().float(), grid)
    if scales_OG is None:
        assert zeros_OG is None, "zero points without their scales say nothing"
        scales_OG, zeros_OG = _fitted(grouped_OGK, grid, 1.0)
    assert grid.symmetric == (zeros_OG is None), "scales without their zero points say nothing"
    scales_OG = scales_OG.to(torch.bfloat16)
    if not scales_OG.isfinite().all():
        raise SparsepassError(f"a scale of {grid.kind} is not finite; give finite ones, or leave scales out")
    return _rounded(grouped_OGK, grid, scales_OG, zeros_OG, columns)


def on_grid(weight_OI: Tensor, grid: RoundingGrid, scales_OG: Tensor, zeros_OG: Tensor | None) -> Tensor:
    """The values that `round_to_nearest` rounds a weight to, float32, for scales that are known to be finite.

    On a GPU, to look at them would be a wait for each layer.

    Example:
        >>> on_grid(torch.tensor([[7.0, -3.4]]), RoundingGrid(group_size=0), torch.ones(1, 1).bfloat16(), None)
        tensor([[ 7., -3.]])
    """
    return _rounded(in_groups(weight_OI.float(), grid), grid, scales_OG, zeros_OG, weight_OI.shape[-1]).weight_OI


def nearest_numbers(values: Tensor, grid: RoundingGrid, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The numbers of a grid that come nearest to values, in their floating type; never -0.0.

    Args:
        values: Of any shape.
        grid: Its ends are held.
        scales: As the values, or of sizes that are spread over theirs; so are zeros.
        zeros: The integers that stand for 0; None for a symmetric grid.

    Example:
        >>> nearest_numbers(torch.tensor([-0.2, 1.4, 99.0]), RoundingGrid(), torch.tensor(0.5), None)
        tensor([0., 3., 7.])
        >>> nearest_numbers(torch.tensor([-1e-4, 17.0, 999.0]), RoundingGrid(bits=8, format="fp8"), torch.tensor(1.0), None)
        tensor([  0.,  16., 448.])
    """
    numbers = values / _divisor(scales)
    if grid.format == "fp8":  # held first, since what lies beyond the largest becomes no number
        return numbers.clamp_(*grid.ends).to(grid.dtype).to(numbers.dtype) + 0.0
    numbers.round_()
    numbers += 0.0 if zeros is None else zeros.float()
    return numbers.clamp_(*grid.ends)


def fit_scales(weight_OI: Tensor, grid: RoundingGrid, share: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
    """Choose scales and zero points by what each group holds.

    Shapes: ``[..., O, I]`` to ``[..., O, G]``.

    Args:
        weight_OI: The weight.
        grid: What it is going to be rounded to.
        share: Of a group's range that is to be held; what lies beyond is clipped. One for all groups, or one for each.

    Returns:
        Scales, each the least bfloat16 that clips nothing within that range; and the integers that stand for 0, as floating
        values, None for a symmetric grid.

    Example:
        >>> fit_scales(torch.tensor([[7.0, -3.4, 0.0, 1.6]]), RoundingGrid(), share=0.5)[0]
        tensor([[0.5000]], dtype=torch.bfloat16)
    """
    return _fitted(in_groups(weight_OI.detach().float(), grid), grid, share)


def held_share(weight_OI: Tensor, grid: RoundingGrid, scales_OG: Tensor) -> Tensor:
    """The share of each group's range that scales hold, so that `fit_scales` gives them back for this weight.

    Shapes: ``[..., O, I]`` to float32 ``[..., O, G]``.

    Args:
        weight_OI: The weight that they belong to.
        grid: What it is rounded to.
        scales_OG: Such as a search for clipping has found.

    Returns:
        Exactly 1 for scales that `fit_scales` finds by itself, and where a scale or all of a group is 0.

    Exactness: `fit_scales` with these shares gives the scales bit for bit, but for groups that hold nothing.

    Example:
        >>> held_share(torch.tensor([[7.0, -3.4, 0.0, 1.6]]), RoundingGrid(), torch.tensor([[0.5]])).round(decimals=2)
        tensor([[0.5000]])
    """
    grouped_OGK = in_groups(weight_OI.detach().float(), grid)
    least, most = _range(grouped_OGK, grid)
    range_OG, fitted_OG = most - least, _fitted(grouped_OGK, grid, 1.0)[0]
    # A little less than the scale itself: rounding up leads to it then, whatever the rounding of the product.
    share_OG = scales_OG.float() * (1 - 2**-12) * grid.ends[1] / range_OG
    return share_OG.where((scales_OG != fitted_OG) & (scales_OG > 0) & (range_OG > 0), 1.0)


def in_groups(weight_OI: Tensor, grid: RoundingGrid) -> Tensor:
    """A weight with its columns in groups that share a scale; the last one is filled up with zeros.

    Shapes: ``[..., O, I]`` to ``[..., O, G, K]``.

    Example:
        >>> in_groups(torch.ones(2, 40), RoundingGrid(group_size=16)).shape
        torch.Size([2, 3, 16])
    """
    columns = weight_OI.shape[-1]
    size = min(grid.group_size, columns) or columns
    grouped: Tensor = functional.pad(weight_OI, (0, -columns % size)).unflatten(-1, (-1, size))
    return grouped


def as_rows(weight: Tensor, axis: int, dims: int) -> Tensor:
    """A stored weight as rows to be rounded, as `Site.to_matrix` gives them: its axis of sums at the end.

    Args:
        weight: As it is stored.
        axis: The one that the layer sums over.
        dims: Axes of the result, and of its scales: 3 for experts, else 2 (a convolution's positions are columns).

    Example:
        >>> as_rows(torch.ones(8, 4, 3, 3), 1, 2).shape, as_rows(torch.ones(2, 8, 4), 1, 3).shape
        (torch.Size([8, 36]), torch.Size([2, 4, 8]))
    """
    rows: Tensor = weight.movedim(axis, -1).flatten(dims - 1)
    return rows


def from_rows(rows: Tensor, axis: int, like: Tensor) -> Tensor:
    """Undo `as_rows`: contiguous, with the shape of ``like``."""
    moved: Tensor = rows.reshape(like.movedim(axis, -1).shape).movedim(-1, axis)
    return moved.contiguous()


def num_groups(columns: int, group_size: int) -> int:
    """Scales of a row.

    Example:
        >>> num_groups(576, 128), num_groups(576, 0)
        (5, 1)
    """
    return -(-columns // group_size) if group_size else 1


def _rounded(grouped_OGK: Tensor, grid: RoundingGrid, scales_OG: Tensor, zeros_OG: Tensor | None, columns: int) -> Rounded:
    zeros_OG1 = None if zeros_OG is None else zeros_OG[..., None]
    return Rounded(
        grid=grid,
        numbers_OGK=nearest_numbers(grouped_OGK, grid, scales_OG[..., None], zeros_OG1),
        scales_OG=scales_OG,
        zeros_OG=None if zeros_OG is None else zeros_OG.float(),
        columns=columns,
    )


def _fitted(grouped_OGK: Tensor, grid: RoundingGrid, share: float | Tensor) -> tuple[Tensor, Tensor | None]:
    least, most = grid.ends
    low_OG, high_OG = (end_OG * share for end_OG in _range(grouped_OGK, grid))
    scales_OG = _rounded_up((high_OG - low_OG) / most)
    return scales_OG, None if grid.symmetric else (-low_OG / _divisor(scales_OG)).round_().clamp_(least, most)


def _range(grouped_OGK: Tensor, grid: RoundingGrid) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group, with 0 among them; of a symmetric grid 0 and the largest magnitude."""
    if grid.symmetric:
        largest_OG = grouped_OGK.abs().amax(-1)
        return torch.zeros_like(largest_OG), largest_OG
    return grouped_OGK.amin(-1).clamp_max(0), grouped_OGK.amax(-1).clamp_min(0)


def _divisor(scales: Tensor) -> Tensor:
    """Scales in float32, with 1 for groups of zeros."""
    return scales.float().where(scales != 0, 1.0)


def _rounded_up(scales: Tensor) -> Tensor:
    """The least bfloat16 that is not below each of some numbers, which are not negative."""
    return (scales.view(torch.int32) + 0xFFFF >> 16).to(torch.int16).view(torch.bfloat16)
