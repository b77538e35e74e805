"""Clipping: a smaller range for a group of weights, where what it loses at the ends is less than what finer steps gain.

Tensor shapes: E experts, O out, I in, G groups of a row, K columns of a group.
"""

import torch
from torch import Tensor

from sparsepass.graph.rounding import RoundingGrid, fit_scales, in_groups, round_to_nearest

SHARES = tuple(1 - step / 20 for step in range(10))
"""Of a group's range that are tried."""


def clipped_scales(weight_OI: Tensor, grid: RoundingGrid, gram_II: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points of the least error, of those that hold all or a share of each group.

    Shapes: ``[..., O, I]`` to ``[..., O, G]``; with a Gram matrix ``[O, I]`` to ``[O, G]``.

    Args:
        weight_OI: The weight, behind its mask.
        grid: What it is going to be rounded to.
        gram_II: Of the inputs: the error is then that of the group's share of the output; else that of the weights.

    Returns:
        As `fit_scales` gives them. Where no smaller range lowers the error, they hold the whole group.

    Source: AWQ's clipping, arXiv 2306.00978 and its code: a range for each output and group, 10 steps. Its error is that of one
    group's output on some inputs; by a Gram matrix it is that on all of them.

    Example:
        >>> weight = torch.tensor([[7.0, *([1.5] * 31)]])
        >>> clipped_scales(weight, RoundingGrid(group_size=0))[0], fit_scales(weight, RoundingGrid(group_size=0))[0]
        (tensor([[0.8008]], dtype=torch.bfloat16), tensor([[1.]], dtype=torch.bfloat16))
    """
    weight_OI = weight_OI.detach().float()
    blocks_GKK = None if gram_II is None else _diagonal_blocks(gram_II.to(weight_OI), grid)
    best: tuple[Tensor, Tensor | None] | None = None
    least_OG = None
    for share in SHARES:
        scales_OG, zeros_OG = fit_scales(weight_OI, grid, share)
        missing_OGK = in_groups(round_to_nearest(weight_OI, grid, scales_OG, zeros_OG).weight_OI - weight_OI, grid)
        if blocks_GKK is None:
            error_OG = missing_OGK.square().sum(-1)
        else:
            error_OG = (torch.einsum("ogk,gkl->ogl", missing_OGK, blocks_GKK) * missing_OGK).sum(-1)
        if best is None or least_OG is None:
            best, least_OG = (scales_OG, zeros_OG), error_OG
            continue
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        zeros = None if zeros_OG is None or best[1] is None else torch.where(better_OG, zeros_OG, best[1])
        best = torch.where(better_OG, scales_OG, best[0]), zeros
    assert best is not None
    return best


def _diagonal_blocks(gram_II: Tensor, grid: RoundingGrid) -> Tensor:
    """The Gram matrices of the inputs of each group, filled up with zeros."""
    rows_IGK = in_groups(gram_II, grid)
    num_groups, size = rows_IGK.shape[1:]
    rows_IGK = torch.nn.functional.pad(rows_IGK, (0, 0, 0, 0, 0, num_groups * size - len(gram_II)))
    blocks_KKG = rows_IGK.unflatten(0, (num_groups, size)).diagonal(dim1=0, dim2=2)
    return torch.movedim(blocks_KKG, -1, 0)
