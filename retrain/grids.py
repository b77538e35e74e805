"""Grids of integers while a program is trained behind them: scales follow the weights.

The forward pass computes with the rounded weights, and gradients go straight through to the weights behind the rounding. After
each step the scales are fitted anew to what the masks keep of the weights: so they are a function of weights and masks alone,
no weight ever lies beyond its grid because its scale is old, and nothing has to be said of when they were fitted last.

Everything here works on what a process holds of a tensor: of a sharded one its own shard, which holds whole rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.ops import where_kept
from sparsepass.graph.records import QuantizedState
from sparsepass.graph.rounding import as_rows, fit_scales, held_share
from sparsepass.retrain.masks import row_pieces
from sparsepass.retrain.run import local


@dataclass(frozen=True, kw_only=True)
class QuantizedSite:
    """A quantized weight in training.

    Attributes:
        state: Its grid, and along which axis it runs.
        weight: What is trained, as a whole.
        mask: True where it is kept; None for a dense one. Shaped and sharded like the weight.
        scales: bfloat16; sharded by rows, as the weight is.
        zero_points: uint8, like the scales; None for a symmetric grid.
    """

    state: QuantizedState
    weight: Tensor
    mask: Tensor | None
    scales: Tensor
    zero_points: Tensor | None

    @property
    def rows(self) -> Tensor:
        """What this process holds of the weight, as the rows that are rounded."""
        return self._as_rows(local(self.weight).detach())

    @property
    def mask_rows(self) -> Tensor | None:
        """The mask as such rows."""
        return None if self.mask is None else self._as_rows(local(self.mask))

    def _as_rows(self, tensor: Tensor) -> Tensor:
        return as_rows(tensor, self.state.axis, self.scales.dim())


class FollowingGrids:
    """The grids of all quantized weights, fitted anew together. Final.

    What share of each group's range its scale holds at the start is kept: 1 where scales were fitted to the largest weight,
    less where `quantize` clipped.

    Args:
        sites: By weight name; empty where nothing is quantized.
    """

    def __init__(self, sites: Mapping[str, QuantizedSite]) -> None:
        self.sites = dict(sites)
        self._shares = {name: _shares(known) for name, known in self.sites.items() if known.weight.requires_grad}

    @torch.no_grad()
    def refit(self) -> bool:
        """Fit scales and zero points to the weights and masks as they are now; those of weights that are not trained stay.

        Returns:
            Whether all scales of this process are finite, as weights that are not have none.
        """
        finite = torch.ones((), dtype=torch.bool)
        for name, share in self._shares.items():
            known = self.sites[name]
            scales, zeros = local(known.scales), None if known.zero_points is None else local(known.zero_points)
            for rows, weight, *mask in row_pieces(known.rows, *([] if known.mask_rows is None else [known.mask_rows])):
                found, found_zeros = fit_scales(
                    where_kept(weight, *mask) if mask else weight, known.state.grid, 1.0 if share is None else share[rows]
                )
                scales[rows].copy_(found)
                if zeros is not None and found_zeros is not None:
                    zeros[rows].copy_(found_zeros)
            finite = finite.to(scales.device).logical_and_(scales.isfinite().all())
        return bool(finite)


def quantized_sites(program: Program, tensor: Callable[[str], Tensor]) -> dict[str, QuantizedSite]:
    """The quantized weights of a program, by name.

    Args:
        program: Its states are read.
        tensor: Gives a tensor of it by its name, where that is in training.
    """
    found = {}
    for name, state in program.quantized.items():
        sparse = program.sparse.get(name)
        found[name] = QuantizedSite(
            state=state,
            weight=tensor(name),
            mask=None if sparse is None or sparse.mask is None else tensor(sparse.mask),
            scales=tensor(state.scales),
            zero_points=None if state.zero_points is None else tensor(state.zero_points),
        )
    return found


def grid_tensors(sites: Mapping[str, QuantizedSite]) -> dict[str, Tensor]:
    """What a checkpoint holds of the grids, by name."""
    found = {f"scales/{name}": known.scales for name, known in sites.items()}
    return found | {f"zero_points/{name}": known.zero_points for name, known in sites.items() if known.zero_points is not None}


def check_quantize(is_quantized: bool, quantize: bool) -> None:
    """Make sure that a quantized program is trained behind its rounding, and no other one is.

    Args:
        is_quantized: Whether the program is.
        quantize: The setting of that name.

    Raises:
        SparsepassError: If the two differ.
    """
    if is_quantized and not quantize:
        raise SparsepassError(
            "the program is quantized, and rounded weights are not trained as if they were not: set train.quantize: true to "
            "train behind the rounding, or retrain the program as it was before the pass quantize, then quantize it"
        )
    if quantize and not is_quantized:
        raise SparsepassError(
            "train.quantize: true trains a quantized program behind its rounding, and this program is not quantized: apply the "
            "pass quantize first (after nm_sparsify), or leave quantize out"
        )


def _shares(known: QuantizedSite) -> Tensor | None:
    """What share of each group's range the scales hold; None where it is all, in every group."""
    mask = known.mask_rows
    kept = known.rows if mask is None else where_kept(known.rows, mask)
    share = held_share(kept, known.state.grid, local(known.scales))
    return None if bool((share == 1).all()) else share
