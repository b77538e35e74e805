"""The statistics of a site's input, added up batch by batch.

Shape suffixes: B batch, T tokens, E experts, I in, K kernel positions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparsepass.graph import Site
from sparsepass.passes.data import CalibrationBatch
from sparsepass.passes.maths import InputStatistics

_aten = torch.ops.aten


def empty_statistics(site: Site, *, gram: bool, device: torch.device) -> tuple[InputStatistics, ...]:
    """Statistics of no tokens yet: one, or one for each expert."""
    features = site.in_features
    if site.layout in ("conv1d", "conv2d"):
        features = site.num_weights // site.shape[0]
    count = site.shape[0] if site.layout.startswith("experts") else 1
    return tuple(InputStatistics.zeros(features, gram=gram, device=device) for _ in range(count))


def add_inputs(
    statistics: tuple[InputStatistics, ...],
    site: Site,
    reader: fx.Node,
    argument: Callable[[int], Any],
    batch: CalibrationBatch,
) -> None:
    """Add what a site reads in one batch to its statistics. Padding is left out.

    Args:
        statistics: From `empty_statistics`.
        site: The site.
        reader: The operation that reads its weight, and has not run yet.
        argument: Index of one of the operation's arguments -> its value.
        batch: The batch.

    Raises:
        SparsepassError: If a value is NaN or Inf.
    """
    x = argument(1 if reader.target is _aten.addmm.default else 0)
    if site.layout.startswith("experts"):
        _update_experts(statistics, x, argument(2))
        return
    if site.layout in ("conv1d", "conv2d"):
        x = _unfolded(x, site, argument, reader)
    elif batch.valid_BT is not None:
        x = _without_padding(x, batch.valid_BT.to(x.device))
    statistics[0].update(x.reshape(-1, x.shape[-1]))


def _without_padding(x: Tensor, valid_BT: Tensor) -> Tensor:
    if x.dim() >= 2 and x.shape[:2] == valid_BT.shape:
        return x[valid_BT]
    if x.dim() == 2 and x.shape[0] == valid_BT.numel():
        return x[valid_BT.reshape(-1)]
    return x


def _update_experts(statistics: tuple[InputStatistics, ...], x_TI: Tensor, offsets_E: Any) -> None:
    """Tokens are sorted by expert; the offsets say where each expert's tokens end."""
    if not isinstance(offsets_E, Tensor):
        for known in statistics:
            known.update(x_TI)
        return
    start = 0
    for known, end in zip(statistics, offsets_E.tolist(), strict=True):
        known.update(x_TI[start : int(end)])
        start = int(end)


def _unfolded(x: Tensor, site: Site, argument: Callable[[int], Any], reader: fx.Node) -> Tensor:
    """What a convolution multiplies its weight with, in the order of `Site.to_matrix`: [B*T, K*I]."""
    names = ("stride", "padding", "dilation")
    bound = {name: argument(i) for i, name in enumerate(names, 3) if i < len(reader.args)} | dict(reader.kwargs)
    kernel = tuple(site.shape[2:])
    stride, dilation = bound.get("stride", 1), bound.get("dilation", 1)
    padding = bound.get("padding", 0)
    if site.layout == "conv1d":
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, dilation = ((1, _one(stride)), (1, _one(dilation)))
    if isinstance(padding, str):
        steps = dilation if isinstance(dilation, list | tuple) else (dilation, dilation)
        total = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)] if padding == "same" else [0, 0]
        left = [t // 2 for t in total]
        x = torch.nn.functional.pad(x, (left[1], total[1] - left[1], left[0], total[0] - left[0]))
        padding = (0, 0)
    elif site.layout == "conv1d":
        padding = (0, _one(padding))
    columns = torch.nn.functional.unfold(x.float(), kernel, dilation=dilation, padding=padding, stride=stride)
    batch, _, places = columns.shape
    channels = site.shape[1]
    return columns.reshape(batch, channels, -1, places).permute(0, 3, 2, 1).reshape(batch * places, -1)


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)
