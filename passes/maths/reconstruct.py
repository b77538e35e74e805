"""Training a few tensors so that a block gives the outputs it should. Knows no graph.

Shape suffixes: B batch, T tokens, F features.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

_BETAS = (0.9, 0.95)
_WARM_UP = 0.1
_HELD_OUT = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """One tensor to train.

    Args:
        start: The value it starts from, any float dtype; it is trained in fp32 (fp64 if it is fp64).
        mask: Which entries are kept, the others being zero; None for a tensor without a mask.
        refresh: Makes a new mask of the trained value, if the mask moves.
    """

    start: Tensor
    mask: Tensor | None = None
    refresh: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What training came to.

    Args:
        values: Name -> the trained value in the dtype it started in, zero behind its mask.
        masks: Name -> its mask, for those that have one.
        before: Relative error on the held-out batches at the start.
        after: The same at the end.
        is_better: Whether the end is better; if not, values and masks are those of the start.
    """

    values: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    before: float
    after: float
    is_better: bool


def token_error(output: Tensor, target: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """The mean over tokens of ``||y - t||^2 / ||t||^2``.

    Each token counts the same. In language models the outputs of a few tokens are a thousand times as large as those of the
    others, so that a plain mean over all outputs would measure these few only.

    Shapes: both ``[..., F]``; ``[B, T]``.

    Args:
        output: What a block gives, any float dtype; computed in fp32 at least.
        target: What it should give.
        valid_BT: Which tokens count, where the first two axes are batch and tokens.

    Returns:
        A scalar.

    Example:
        >>> token_error(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([[2.0, 0.0], [0.0, 9.0]]))
        tensor(0.1250)
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    target = target.to(dtype)
    squares = (output.to(dtype) - target).square().sum(-1)
    totals = target.square().sum(-1)
    ratio = squares / totals.clamp(min=torch.finfo(dtype).tiny)
    ratio = ratio.masked_fill((totals == 0) & (squares == 0), 0)
    if valid_BT is not None and ratio.shape[:2] == valid_BT.shape:
        ratio = ratio[valid_BT.to(ratio.device)]
    return ratio.mean()


def held_out(num_batches: int) -> tuple[list[int], list[int]]:
    """Divide batches into those to train on and every eighth, at least one, to judge by.

    Raises:
        SparsepassError: If there are fewer than two.

    Example:
        >>> held_out(4)
        ([0, 1, 3], [2])
    """
    if num_batches < 2:
        raise SparsepassError(
            f"reconstruction trains on one part of the calibration data and judges by another, and got {num_batches} batch; "
            "give more calibration sequences, or fewer to a batch"
        )
    num_held = max(1, num_batches // _HELD_OUT)
    judging = [(2 * index + 1) * num_batches // (2 * num_held) for index in range(num_held)]
    return [index for index in range(num_batches) if index not in set(judging)], judging


def step_size(step: int, steps: int) -> float:
    """The learning rate as a fraction of its peak: up over the first tenth, then down along a cosine.

    Example:
        >>> [round(step_size(step, 20), 2) for step in (0, 1, 10, 19)]
        [0.5, 1.0, 0.54, 0.01]
    """
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))


def fit(
    error: Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    tensors: Mapping[str, Trained],
    num_batches: int,
    *,
    steps: int,
    lr: float,
    refresh_steps: int,
    seed: int,
    advance: Callable[[str], None] = lambda _: None,
) -> Fit:
    """Train tensors by AdamW, one batch a step, and keep the better of the start and the end.

    With a fixed mask only what is kept trains. With a moving one the gradient reaches everything (the straight-through
    estimator is the caller's `error`), what stands behind the mask starts at zero, and the mask is made anew of the values
    every ``refresh_steps`` steps, but not in the last fifth, where the values settle.

    Args:
        error: Batch, name -> value and name -> mask -> relative error, differentiable in the values.
        tensors: What to train.
        num_batches: Of them, `held_out` tells those that are judged by.
        steps: AdamW steps.
        lr: Peak step, as a fraction of the root mean square of a tensor's kept entries, so that one value serves layers of
            any scale.
        refresh_steps: Steps between refreshes of moving masks.
        seed: Of the order of batches.
        advance: Called after each step.

    Returns:
        The values to use.

    Raises:
        SparsepassError: If there are fewer than two batches.

    Exactness: deterministic, given the number of threads.

    Example:
        >>> start = Trained(start=torch.tensor([2.0, 5.0]), mask=torch.tensor([True, False]))
        >>> goal = lambda batch, values, masks: (values["w"].sum() - 3.0).square()
        >>> found = fit(goal, {"w": start}, 2, steps=100, lr=0.1, refresh_steps=10, seed=0)
        >>> found.is_better, found.values["w"].round(decimals=1)
        (True, tensor([3., 0.]))
    """
    training, judging = held_out(num_batches)
    masters: dict[str, Tensor] = {}
    masks = {name: one.mask for name, one in tensors.items() if one.mask is not None}
    groups = []
    for name, one in tensors.items():
        value = one.start.detach().to(torch.promote_types(one.start.dtype, torch.float32), copy=True)
        if one.mask is not None:
            value.masked_fill_(~one.mask, 0)
        kept = value.numel() if one.mask is None else int(one.mask.sum())
        scale = float(value.square().sum() / max(kept, 1)) ** 0.5
        masters[name] = value.requires_grad_()
        groups.append({"params": [masters[name]], "lr": lr * scale, "peak": lr * scale})
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)

    def values() -> dict[str, Tensor]:
        found = {}
        for name, one in tensors.items():
            value = masters[name]
            if one.mask is not None and one.refresh is None:
                value = torch.where(one.mask, value, 0)
            found[name] = value.to(one.start.dtype)
        return found

    @torch.no_grad()
    def judge() -> float:
        return sum(float(error(index, values(), masks)) for index in judging) / len(judging)

    before = judge()
    start_masks = dict(masks)
    order = _order(training, steps, seed)
    for step, index in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * step_size(step, steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = error(index, values(), masks)
            loss.backward()
        optimizer.step()
        if (step + 1) % refresh_steps == 0 and step + 1 <= 0.8 * steps:
            for name, one in tensors.items():
                if one.refresh is not None and bool(masters[name].isfinite().all()):
                    masks[name] = one.refresh(masters[name].detach())
        advance(f"error {float(loss.detach()) ** 0.5:.3g}")
    after = judge()
    is_better = after < before  # false for NaN too
    if not is_better:
        masks = start_masks
    result = {}
    with torch.no_grad():
        for name, one in tensors.items():
            value = masters[name].detach().to(one.start.dtype) if is_better else one.start.detach().clone()
            result[name] = torch.where(masks[name], value, 0) if name in masks else value
    return Fit(values=result, masks=masks, before=before**0.5, after=after**0.5, is_better=is_better)


def _order(training: Sequence[int], steps: int, seed: int) -> list[int]:
    """Which batch each step takes: all of them in a new order each time round."""
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < steps:
        order += generator.sample(list(training), len(training))
    return order[:steps]
