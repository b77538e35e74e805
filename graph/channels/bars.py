"""What more is asked of channels that are to be mixed or taken out than of those that change places.

Mixed by an orthogonal matrix: whatever they meet on their way has to be linear, the same for all of them, and free of
constants; a sum of their squares, as in RMS norm, stays as it is. Taken out where they are zero: whatever they meet has to
leave zero zero, and must not count them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.channels import ops
from sparsepass.graph.channels.values import Channels, Leaf, distinct, rows_met, varying
from sparsepass.graph.channels.walk import Walk, is_tensor
from sparsepass.graph.nodes import op_name


def bar(walk: Walk, labels: Tensor, reason: str, *, mixing: bool = True, removal: bool = True) -> None:
    """Channels may not be mixed, or not be taken out, or neither."""
    reason += walk.here
    if mixing:
        walk.places.bar("mixing", labels.numpy(), reason)
    if removal:
        walk.places.bar("removal", labels.numpy(), reason)


def only_positive(walk: Walk, scales: Tensor) -> None:
    """Factors have to be positive to go through."""
    walk.scales.bar("negative factors", scales.numpy(), f"{op_name(walk.node)} lets only positive factors through{walk.here}")


def squares(walk: Walk, args: Sequence[Any]) -> bool:
    """Whether an operation squares the channels that it gets."""
    name, node = op_name(walk.node), walk.node
    if name == "mul":
        return len(node.args) == 2 and node.args[0] is node.args[1]
    return name == "square" or (name == "pow" and not is_tensor(args[1]) and args[1] == 2)


def curved(walk: Walk, value: Channels, others: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Channels meet a function element by element."""
    name = op_name(walk.node)
    at_zero = walk.node.target(torch.zeros(1), *others, **kwargs)  # type: ignore[operator]
    bar(walk, value.places, f"{name} is not linear", mixing=not squares(walk, [value, *others]), removal=False)
    bar(walk, value.places, f"{name} of zero is not zero", mixing=False, removal=bool(at_zero.any()))


def added(walk: Walk, places: Tensor, terms: Sequence[Any], *, has_constant: bool) -> None:
    """Channels are added to others, or chosen among them: all terms have to be made of the same channels.

    Args:
        walk: Where the reasons go.
        places: Labels of the result.
        terms: Values and parameters.
        has_constant: Whether there are other numbers among the terms than zero.
    """
    if has_constant:
        bar(walk, places, "a constant is added to it")
    if op_name(walk.node) in ("maximum", "minimum"):
        bar(walk, places, f"{op_name(walk.node)} is not linear", removal=False)
    for term in terms:
        if isinstance(term, Channels):
            labels = term.places.expand(places.shape)
            beside = places if varying(labels) != varying(places) else torch.where(labels == 0, places, 0)
            bar(walk, beside, "it is added to what is not made of the same channels")
        elif isinstance(term, Leaf):
            along = set(varying(term.index.expand(places.shape))) & set(varying(places))
            if term.offset != 0 or not along:
                bar(walk, places, f"{term.name} is added to it, and is not a number for each channel as it is stored")


def multiplied(walk: Walk, places: Tensor, factors: Sequence[Any]) -> None:
    """Channels are multiplied or divided: by the same number each, if they are to be mixed."""
    axes, rank = varying(places), places.dim()
    alike = [f for f in factors if isinstance(f, Channels) and varying(f.places.expand(places.shape)) == axes]
    divides = op_name(walk.node) == "div" and is_tensor(factors[-1])
    if divides and any(factor is factors[-1] for factor in alike):
        bar(walk, places, "it divides")
    elif len(alike) > 1 and not squares(walk, factors):
        bar(walk, places, "it is multiplied by other channels", removal=False)
    for factor in factors:
        if isinstance(factor, Leaf) and factor.offset is None:
            bar(walk, places, f"{factor.name} is not applied as it is stored", removal=False)
        if not isinstance(factor, Channels) or any(factor is one for one in alike):
            continue
        shape = [1] * (rank - factor.places.dim()) + list(factor.shape)
        own = varying(factor.places.expand(places.shape))
        if any(shape[axis] > 1 and axis not in own for axis in axes):  # numbers that are not followed: any two may differ
            numbers = torch.rand(shape, generator=torch.Generator().manual_seed(walk.salt)).expand(places.shape)
            walk.places.tell_apart(*rows_met(places, numbers, walk.salt), mixed_only=True)
            bar(walk, places, "it is multiplied by numbers that are not followed", mixing=False)


def reduced(walk: Walk, value: Channels, axes: Sequence[int], *, along_channels: bool) -> None:
    """Channels are added up, or other reductions run over them or over the tokens.

    Args:
        walk: Where the reasons go.
        value: What goes in.
        axes: What is reduced.
        along_channels: Whether channels differ along these axes, and are not joined to one.
    """
    name = op_name(walk.node)
    is_linear = name in ops.LINEAR_REDUCTIONS
    if not along_channels:
        bar(
            walk,
            value.places,
            f"{name} is not linear",
            mixing=not is_linear,
            removal=name not in (*ops.LINEAR_REDUCTIONS, "amax"),
        )
        return
    if is_linear and value.is_squared:
        counted(walk, value.places, axes)
    else:
        bar(walk, value.places, f"{name} runs over its channels", removal=False)
    bar(walk, value.places, f"{name} runs over its channels, and counts them", mixing=False, removal=name != "sum")


def counted(walk: Walk, labels: Tensor, axes: Sequence[int]) -> None:
    """Channels that a sum meets more often than others are not mixed with them."""
    inside = [axis for axis in varying(labels) if axis in axes]
    rows = distinct(labels, [*[axis for axis in varying(labels) if axis not in axes], *inside])
    for row in np.unique(rows.reshape(-1, math.prod(labels.shape[axis] for axis in inside)), axis=0):
        found, times = np.unique(row, return_counts=True)
        walk.places.tell_apart(found, times.astype(np.uint64) + np.uint64(walk.salt), mixed_only=True)


def normalized(walk: Walk, value: Channels) -> None:
    """Layer norm or RMS norm over the last axis."""
    name, last = op_name(walk.node), value.places.dim() - 1
    if last not in varying(value.places):
        bar(walk, value.places, f"{name} runs over other axes than that of its channels")
        return
    counted(walk, value.places, [last])
    bar(walk, value.places, f"{name} divides by the number of channels", mixing=False)
    if name != "rms_norm":
        walk.places.bar("mixing off the mean", value.places.numpy(), f"{name} subtracts the mean{walk.here}")


def laid_out(walk: Walk, value: Channels, others: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor]) -> None:
    """Elements move: whether they would without one of the channels, by trying."""
    axes, name = varying(value.places), op_name(walk.node)
    if len(axes) > 1 or any(len(varying(result)) > 1 for result in results):
        bar(
            walk,
            torch.stack([value.places.flatten()[0], *value.places.unique()]),
            "it is a channel of one of several blocks of one size",
            mixing=False,
        )
        return
    if not axes:
        return
    (axis,) = axes
    size, parts = value.shape[axis], 1
    if name == "chunk" and size % len(results) == 0:
        parts = len(results)
        if parts > 1:
            walk.even.append(tuple(result.numpy() for result in results))
    kept = torch.tensor([index for index in range(size) if index % (size // parts)])
    gone = value.places.index_select(axis, torch.arange(0, size, size // parts)).unique()
    try:
        found = walk.node.target(value.places.index_select(axis, kept), *others, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError):
        found = None
    tried = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
    expected = [result.flatten()[~torch.isin(result.flatten(), gone)] for result in results]
    same = len(tried) == len(expected) and all(torch.equal(a.flatten(), b) for a, b in zip(tried, expected, strict=True))
    ranks = same and all(a.dim() == b.dim() for a, b in zip(tried, results, strict=True))
    if not ranks:
        bar(walk, value.places, f"{name} has the number of its channels in it", mixing=False)
