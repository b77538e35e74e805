"""Rounding, and pruning at the same time: SparseGPT's loop, with one error for what is dropped and what is rounded.

Shape suffixes: O out, I in, M columns of one N:M group, K columns of a group that shares a scale, G such groups.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from sparsepass.graph.rounding import RoundingGrid, fit_scales, nearest_numbers
from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria.criterion import CriterionOptions, finished
from sparsepass.passes.criteria.sparsegpt import InverseHessian, kept_of_group, sweep_columns
from sparsepass.passes.maths import NMPattern, clipped_scales

Clip = Literal["weights", "outputs"]
_COLUMNS = 8  # entered together where there is no pattern; for speed only


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RoundedWeight:
    """A weight that was rounded while later columns made up for it.

    Attributes:
        weight_OI: On its grid, in the dtype that it came in, +0.0 where the mask is false.
        mask_OI: What is kept.
        scales_OG: bfloat16.
        zeros_OG: The integers that stand for 0, as floating values; None for a symmetric grid.
        note: What the user should know, such as a raised damping.
    """

    weight_OI: Tensor  # noqa: N815
    mask_OI: Tensor  # noqa: N815
    scales_OG: Tensor  # noqa: N815
    zeros_OG: Tensor | None  # noqa: N815
    note: str | None


@torch.no_grad()
def round_jointly(
    weight_OI: Tensor,
    hessian: InverseHessian,
    grid: RoundingGrid,
    *,
    kept: NMPattern | Tensor,
    clip: Clip | None = None,
    gram_II: Tensor | None = None,
    options: CriterionOptions | None = None,
) -> RoundedWeight:
    """Round a weight column by column, to a grid that is fitted to each group when the loop reaches it.

    At the entry of a group of columns that shares a scale, its scale is fitted to the weights as the columns before have
    changed them, without those that are going to be dropped. Then, column by column, what is kept is rounded, what is dropped
    becomes 0, and the later columns make up for both by one error. What grows within a group, to make up for what is dropped
    there, may be clipped; so weights that have been pruned before, and have grown, are better to start from.

    Shapes: ``[O, I]``.

    Args:
        weight_OI: The weight, any float dtype; computed in fp32 (fp64 for a weight in fp64).
        hessian: Of its inputs, in that dtype.
        grid: What it is rounded to.
        kept: What is kept, bool ``[O, I]``; or a pattern: then the loop chooses as SparseGPT does, at each group of M by the
            weights as they are there.
        clip: Whether each group's range may be smaller than what it holds, where that lowers the error of its weights, or of
            its share of the outputs.
        gram_II: Of the inputs, to clip by the outputs.
        options: Columns per block.

    Raises:
        SparsepassError: If M does not divide the group size, or the result does not fit the weight's dtype.

    Source: SparseGPT, arXiv 2301.00774, section 3.5 (joint sparsification and quantization). Where all is kept, it is GPTQ,
    arXiv 2210.17323.

    Exactness: equals the column-by-column definition but for rounding, whatever the block size.

    Example:
        >>> hessian = InverseHessian.of(torch.eye(4) + 1.0, 4, CriterionOptions())
        >>> kept = torch.tensor([[False, False, True, True]])
        >>> found = round_jointly(torch.tensor([[0.0, 0.0, 4.0, 5.0]]), hessian, RoundingGrid(bits=8), kept=kept)
        >>> found.weight_OI.round(decimals=1)
        tensor([[0., 0., 4., 5.]])
    """
    options = options or CriterionOptions()
    in_features = weight_OI.shape[1]
    size = min(grid.group_size, in_features) or in_features
    group = kept.m if isinstance(kept, NMPattern) else math.gcd(in_features, size, _COLUMNS)
    if size < in_features and size % group:
        raise SparsepassError(
            f"a group of {size} columns holds no whole groups of {group}; choose another group_size, or method=rtn"
        )
    unit = group if size == in_features else size
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    weight_IO = weight_OI.to(dtype, copy=True).T.contiguous()
    weight_IO[hessian.dead_I] = 0
    rounding = _Rounding(weight_IO, hessian, grid, size, kept, clip, gram_II if clip == "outputs" else None)
    sweep_columns(weight_IO, hessian, rounding, group=group, block=max(unit, options.block_size // unit * unit))
    rounded_OI = finished(
        weight_IO.T.to(weight_OI.dtype).contiguous(), "the weights that were rounded", damping=hessian.damping
    )
    return RoundedWeight(
        weight_OI=rounded_OI,
        mask_OI=rounding.kept_IO.T.contiguous(),
        scales_OG=torch.stack(rounding.scales, dim=1),
        zeros_OG=torch.stack(rounding.zeros, dim=1) if rounding.zeros else None,
        note=hessian.note,
    )


@final
class _Rounding:
    """Weights that are kept become the nearest of their grid, and the others 0."""

    def __init__(
        self,
        weight_IO: Tensor,
        hessian: InverseHessian,
        grid: RoundingGrid,
        size: int,
        kept: NMPattern | Tensor,
        clip: Clip | None,
        gram_II: Tensor | None,
    ) -> None:
        self.pattern = kept if isinstance(kept, NMPattern) else None
        self.kept_IO = torch.ones_like(weight_IO, dtype=torch.bool) if isinstance(kept, NMPattern) else kept.T.contiguous()
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self._grid, self._size, self._clip, self._gram_II = grid, size, clip, gram_II
        self._inv_diag_I1 = hessian.inv_diag_I1

    def enter(self, left: int, weight_IO: Tensor) -> None:
        """Fit the scale of a group that begins here, then choose what is kept of the first M columns."""
        if left % self._size == 0:
            self._fit(left, weight_IO)
        if self.pattern is not None:
            part = slice(left, left + self.pattern.m)
            self.kept_IO[part] = kept_of_group(weight_IO[part], self._inv_diag_I1[part], self.pattern)

    def settle(self, column: int, weight_O: Tensor, error_O: Tensor) -> None:
        """Round a column."""
        scales_O = self.scales[-1].to(weight_O.dtype)
        zeros_O = self.zeros[-1] if self.zeros else None
        numbers_O = nearest_numbers(weight_O, self._grid, scales_O, zeros_O)
        steps_O = numbers_O if zeros_O is None else numbers_O - zeros_O
        rounded_O = (steps_O * scales_O).masked_fill_(~self.kept_IO[column], 0)
        torch.sub(weight_O, rounded_O, out=error_O).mul_(self._inv_diag_I1[column])
        weight_O.copy_(rounded_O)

    def _fit(self, left: int, weight_IO: Tensor) -> None:
        part = slice(left, left + self._size)
        weight_KO, kept_KO = weight_IO[part], self.kept_IO[part]
        if self.pattern is not None:  # as it looks from here; each group of M is chosen when the loop is there
            by_group_MGO = weight_KO.unflatten(0, (-1, self.pattern.m)).movedim(1, 0)
            diag_MG1 = self._inv_diag_I1[part].unflatten(0, (-1, self.pattern.m)).movedim(1, 0)
            kept_KO = kept_of_group(by_group_MGO, diag_MG1, self.pattern).movedim(0, 1).flatten(0, 1)
        whole = replace(self._grid, group_size=0)
        kept_OK = weight_KO.masked_fill(~kept_KO, 0).T
        if self._clip is None:
            scales_O1, zeros_O1 = fit_scales(kept_OK, whole)
        else:
            gram_KK = None if self._gram_II is None else self._gram_II[part, part]
            scales_O1, zeros_O1 = clipped_scales(kept_OK, whole, gram_KK)
        self.scales.append(scales_O1[:, 0])
        if zeros_O1 is not None:
            self.zeros.append(zeros_O1[:, 0])
