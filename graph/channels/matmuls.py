"""What operations that sum over channels do to them: linear layers, convolutions, tables, attention, experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.channels import bars
from sparsepass.graph.channels.labels import Ints
from sparsepass.graph.channels.values import Channels, Leaf, rows_met, shape_of, varying
from sparsepass.graph.channels.walk import Slot, Walk
from sparsepass.graph.nodes import op_name, tensor_of
from sparsepass.graph.sites import match_weight

_AXES = {"linear": (1, 0), "conv1d_hf": (0, 1)}
"""Layout -> the axis that is summed over, and the axis of the result."""


def linear(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A product with a stored weight."""
    use = match_weight(walk.node)
    if use is None or use.weight is None or use.layout not in _AXES:
        return NotImplemented
    where = {"linear": (0, 1, 2), "addmm": (1, 2, 0)}.get(op_name(walk.node), (0, 1, 2))
    value = args[where[0]]
    bias = args[where[2]] if len(args) > where[2] else None
    if isinstance(value, Leaf) or isinstance(bias, Tensor | Channels):
        return NotImplemented
    reads, makes = _AXES[use.layout]
    _read(walk, walk.slot(use.weight, (reads,), reads=True), value)
    made = walk.slot(use.weight, (makes,), reads=False)
    shape = (*shape_of(value)[:-1], len(made.places))
    return _with_bias(walk, walk.born(shape, made), bias)


def _read(walk: Walk, slot: Slot, value: Channels | Tensor) -> None:
    """A weight sums over the last axis of a value."""
    if isinstance(value, Tensor):
        walk.places.pin(slot.places, "it reads an input of the model")
        walk.scales.pin(slot.scales, "it reads an input of the model")
        return
    walk.places.join(value.places.numpy(), np.broadcast_to(slot.places, value.shape))
    walk.scales.join(value.scales.numpy(), np.broadcast_to(slot.scales, value.shape))
    _pin_unmade(walk, value, np.broadcast_to(slot.places, value.shape), np.broadcast_to(slot.scales, value.shape))


def _pin_unmade(walk: Walk, value: Channels, places: Ints, scales: Ints) -> None:
    """Where a weight reads what nothing takes a change up of, it takes none up either."""
    for labels, slotted, found in ((value.places, places, walk.places), (value.scales, scales, walk.scales)):
        found.pin(slotted[labels.numpy() == 0], "what it reads is not made by weights that could take a change up")


def _with_bias(walk: Walk, result: Channels, bias: Any) -> Channels:
    if isinstance(bias, Leaf):
        bars.added(walk, result.places, [bias], has_constant=False)
        taken = walk.adopt(bias, result.places)
        walk.scales.join(result.scales.numpy(), taken.scales.numpy())
    return result


def embedding(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Rows of a table."""
    if not isinstance(args[0], Leaf) or not isinstance(args[1], Tensor):
        return NotImplemented
    slot = walk.slot(args[0].name, (1,), reads=False)
    return walk.born((*args[1].shape, len(slot.places)), slot)


def convolution(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Channels lie along axis 1; a group a channel is a product element by element."""
    use = match_weight(walk.node)
    if use is None or use.weight is None:
        return NotImplemented
    value, bias = args[0], args[2] if len(args) > 2 else None
    weight = tensor_of(walk.program.graph_module, use.weight)
    if isinstance(value, Leaf) or isinstance(bias, Tensor | Channels):
        return NotImplemented
    meta = torch.empty(shape_of(value), device="meta")
    more = [torch.empty(weight.shape, device="meta"), None, *args[3:]]
    shape = walk.node.target(meta, *more).shape  # type: ignore[operator]
    made = walk.slot(use.weight, (0,), reads=False)
    last = (shape[0], *shape[2:], shape[1])
    result = walk.born(last, made)
    if use.groups == 1:
        slot = walk.slot(use.weight, (1,), reads=True)
        _read(walk, slot, value if isinstance(value, Tensor) else value.each(lambda labels: labels.movedim(1, -1)))
    elif isinstance(value, Channels) and use.groups == weight.shape[0] == value.shape[1]:
        places = value.places.movedim(1, -1)
        walk.places.join(places.numpy(), np.broadcast_to(made.places, places.shape))
        walk.pin_scales(value, "a convolution of a group a channel reads it")
        bars.bar(walk, places, "a convolution of a group a channel reads it")
    else:
        return NotImplemented
    return _with_bias(walk, result, bias).each(lambda labels: labels.movedim(-1, 1))


def grouped(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Experts: each row of the value is multiplied by the weight of its expert."""
    use = match_weight(walk.node)
    bound = dict(zip(("input", "weight", "offs", "bias"), args, strict=False)) | dict(kwargs)
    value, ends = bound["input"], bound.get("offs")
    if use is None or use.weight is None or not isinstance(value, Channels) or not isinstance(ends, Tensor):
        return NotImplemented
    if isinstance(bound.get("bias"), Leaf | Tensor | Channels):
        return NotImplemented
    reads, makes = (2, 1) if use.layout == "experts" else (1, 2)
    experts = tensor_of(walk.program.graph_module, use.weight).shape[0]
    expert = torch.searchsorted(ends.to(torch.int64).contiguous(), torch.arange(value.shape[0]), right=True).clamp_(
        max=experts - 1
    )
    slot = walk.slot(use.weight, (0, reads), reads=True)
    places = slot.places.reshape(experts, -1)[expert.numpy()]
    scales = slot.scales.reshape(experts, -1)[expert.numpy()]
    walk.places.join(value.places.numpy(), places)
    walk.scales.join(value.scales.numpy(), scales)
    _pin_unmade(walk, value, places, scales)
    unseen = np.setdiff1d(np.arange(experts), np.unique(expert.numpy()))
    made = walk.slot(use.weight, (0, makes), reads=False)
    walk.vectors.add((made.tensor, made.axes))
    for one in (slot, made):
        bars.bar(walk, torch.from_numpy(one.places), "it is a channel of one of several experts of one size", mixing=False)
    for one in (slot, made):  # no token went to these experts
        walk.places.pin(one.places.reshape(experts, -1)[unseen], "no example token goes to this expert")
        walk.scales.pin(one.scales.reshape(experts, -1)[unseen], "no example token goes to this expert")
    for one in (slot, made):  # channels of different experts do not change places
        each = one.places.reshape(experts, -1)
        walk.places.tell_apart(each, np.broadcast_to(np.arange(1, experts + 1, dtype=np.uint64)[:, None], each.shape))
    return Channels(
        torch.from_numpy(made.places.reshape(experts, -1)[expert.numpy()]),
        torch.from_numpy(made.scales.reshape(experts, -1)[expert.numpy()]),
    )


def matmul(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A product with a stored weight, or of two values."""
    if isinstance(args[1], Leaf):
        return linear(walk, args, kwargs)
    if isinstance(args[0], Leaf) or min(len(shape_of(arg)) for arg in args[:2]) < 2:
        return NotImplemented
    return product(walk, args[0], args[1], walk.node.args[:2])


def product(walk: Walk, first: Channels | Tensor, second: Channels | Tensor, sources: Sequence[Any]) -> Channels:
    """``first [.., M, K] @ second [.., K, N]`` of two values.

    Args:
        walk: Where the reasons go.
        first: Channels or data.
        second: Channels or data.
        sources: The node's arguments that give them, None for what the rule has made itself.
    """
    first, second = (walk.any_data(one, source) for one, source in zip((first, second), sources, strict=True))
    one, two = _labelled(first), _labelled(second)
    batch = torch.broadcast_shapes(one.shape[:-2], two.shape[:-2])
    one = one.each(lambda labels: labels.expand(*batch, *labels.shape[-2:]))
    two = two.each(lambda labels: labels.expand(*batch, *labels.shape[-2:]))
    rank = len(batch) + 2
    ours, theirs = varying(one.places), varying(two.places)
    left, right = one.places[..., :1], two.places[..., :1, :]
    if isinstance(first, Tensor) and not isinstance(second, Tensor):  # each block, such as a head, meets its own
        walk.meet_data(right, first.flatten(-2).unsqueeze(-1), None)
    if isinstance(second, Tensor) and not isinstance(first, Tensor):
        walk.meet_data(left, second.flatten(-2).unsqueeze(-2), None)
    if rank - 1 in ours or rank - 2 in theirs:
        left, right = _summed(walk, one, two, first, second)
    places = walk.combine(left, right).expand(*batch, one.shape[-2], two.shape[-1])
    if isinstance(second, Tensor) and second.dim() - 1 in varying(second):
        made = walk.places.fresh(two.shape[-1])
        walk.places.pin(made, "fixed numbers make it")
        places = walk.combine(places, torch.from_numpy(made))
    scales = torch.zeros_like(places)
    kept = None
    if not (rank - 1 in ours or rank - 2 in theirs):
        if bool(two.scales.any()) and rank - 2 not in varying(two.scales):
            kept = two
            scales = two.scales[..., :1, :].expand_as(places)
        elif bool(one.scales.any()) and rank - 1 not in varying(one.scales):
            kept = one
            scales = one.scales[..., :1].expand_as(places)
    for value in (one, two):
        if value is not kept:
            walk.pin_scales(value, f"{op_name(walk.node)} sums over it, or multiplies it by what carries a factor")
    return Channels(places, scales)


def _labelled(value: Channels | Tensor) -> Channels:
    if isinstance(value, Channels):
        return value
    nothing = torch.zeros(value.shape, dtype=torch.int64)
    return Channels(nothing, nothing)


def _summed(
    walk: Walk, one: Channels, two: Channels, first: Channels | Tensor, second: Channels | Tensor
) -> tuple[Tensor, Tensor]:
    """The sum runs over channels: what is left of them is a label for each block, such as a head."""
    rank = one.places.dim()
    ours, theirs = varying(one.places), varying(two.places)
    here, there = rank - 1 in ours, rank - 2 in theirs
    tangled = (here and rank - 2 in ours) or (there and rank - 1 in theirs)
    for value, other, inside, axis in ((one, second, here, -1), (two, first, there, -2)):
        if inside and (tangled or (isinstance(other, Channels) and not (here and there))):
            walk.places.pin(value.places.numpy(), "it is summed against what has no such channels")
        elif inside and isinstance(other, Tensor):
            bars.bar(walk, value.places, "it is summed against fixed numbers")
            labels = value.places.movedim(axis, -1)[..., :1, :]
            data = other.movedim(-2, -1) if axis == -1 else other
            shape = torch.broadcast_shapes(labels.shape, data.shape)
            walk.places.tell_apart(*rows_met(labels.expand(shape), data.expand(shape), walk.salt))
    left, right = one.places[..., :1, :], two.places.transpose(-1, -2)[..., :1, :]
    met = walk.combine(left, right) if here and there else left if here else right
    if here and there and varying(left) != varying(right):
        bars.bar(walk, torch.cat([left.flatten(), right.flatten()]), "it is summed against what has other channels")
    head, overlap = walk.blocks(met, [rank - 1])
    if overlap:
        walk.places.pin(met.numpy(), "blocks of it overlap")
        head = torch.zeros((*met.shape[:-1], 1), dtype=torch.int64)
    kept_left = one.places[..., :1] if not here else torch.zeros_like(one.places[..., :1])
    kept_right = two.places[..., :1, :] if not there else torch.zeros_like(two.places[..., :1, :])
    return walk.combine(kept_left, head), walk.combine(head, kept_right)


def attention(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Scores, softmax, and the sum of values."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    bound = dict(zip(names, args, strict=False)) | dict(kwargs)
    query, key, value, mask = bound["query"], bound["key"], bound["value"], bound.get("attn_mask")
    sources = dict(zip(names, walk.node.args, strict=False)) | dict(walk.node.kwargs)
    if any(isinstance(one, Leaf) or not isinstance(one, Channels | Tensor) for one in (query, key, value)):
        return NotImplemented
    if isinstance(mask, Leaf):
        return NotImplemented
    if bound.get("enable_gqa"):
        times = shape_of(query)[-3] // shape_of(key)[-3]
        key, value = (_repeated(one, times) for one in (key, value))
    turned = key.each(lambda labels: labels.transpose(-1, -2)) if isinstance(key, Channels) else key.transpose(-1, -2)
    scores = product(walk, query, turned, (sources["query"], sources["key"]))
    places = scores.places
    if isinstance(mask, Channels):
        places = walk.combine(places, mask.places)
        walk.pin_scales(mask, "softmax is not linear")
    elif isinstance(mask, Tensor):
        walk.meet_data(places, mask, sources["attn_mask"])
    walk.pin_scales(scores, "softmax is not linear")
    return product(walk, Channels(places, torch.zeros_like(places)), value, (None, sources["value"]))


def _repeated(value: Any, times: int) -> Any:
    def repeat(labels: Tensor) -> Tensor:
        return labels.repeat_interleave(times, -3)

    return value.each(repeat) if isinstance(value, Channels) else repeat(value)
