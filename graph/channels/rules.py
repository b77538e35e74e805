"""What each kind of operation does to channels. A rule takes the walk and the operation's arguments, and returns its result."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from sparsepass.graph.channels import bars, ops
from sparsepass.graph.channels.layouts import layout
from sparsepass.graph.channels.matmuls import attention, convolution, embedding, grouped, linear, matmul
from sparsepass.graph.channels.values import Channels, Leaf, shape_of, varying
from sparsepass.graph.channels.walk import Walk, is_tensor
from sparsepass.graph.nodes import op_name

Rule = Callable[[Walk, tuple[Any, ...], Mapping[str, Any]], Any]


def _wrapper(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A weight behind its mask: the mask lies along the same channels."""
    mask = walk.node.args[1]
    if not isinstance(args[0], Leaf) or not isinstance(mask, fx.Node) or mask.op != "get_attr":
        return NotImplemented
    walk.masks[args[0].name] = str(mask.target)
    return args[0]


def _same(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Nothing changes but the type or the sign."""
    if isinstance(args[0], Tensor):
        return walk.node.target(args[0], *(torch.empty(shape_of(x)) if is_tensor(x) else x for x in args[1:]), **kwargs)  # type: ignore[operator]
    if isinstance(args[0], Leaf) and op_name(walk.node) == "neg":
        return replace(args[0], offset=None)
    return args[0]


def _positive(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if not isinstance(args[0], Channels) or len(args) > 1:
        return _curved(walk, args, kwargs)
    bars.curved(walk, args[0], (), kwargs)
    bars.only_positive(walk, args[0].scales)
    return args[0]


def _curved(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Element by element: channels go through, factors do not."""
    value, *others = args
    if any(is_tensor(leaf) for leaf in others):
        return NotImplemented
    if isinstance(value, Leaf):
        return replace(value, offset=None)
    walk.pin_scales(value, f"{op_name(walk.node)} is not linear")
    bars.curved(walk, value, others, kwargs)
    return replace(value.without_scales(), is_squared=bars.squares(walk, args))


def _operands(walk: Walk, args: Sequence[Any], *, are_factors: bool = False) -> tuple[list[Channels], list[float]]:
    """Channels and numbers that an operation meets element by element; parameters take the others' channels."""
    tensors = [leaf for leaf in args if is_tensor(leaf)]
    shape = torch.broadcast_shapes(*(shape_of(leaf) for leaf in tensors))
    places = torch.zeros(shape, dtype=torch.int64)
    for leaf in tensors:
        if isinstance(leaf, Channels):
            places = walk.combine(places, leaf.places)
    stored = next((leaf for leaf in tensors if isinstance(leaf, Leaf)), None)
    if stored is not None and not varying(places):
        places = walk.of_itself(stored, shape)
    channels: list[Channels] = []
    for leaf, source in [pair for pair in zip(args, walk.node.args, strict=True) if is_tensor(pair[0])]:
        if isinstance(leaf, Leaf):
            is_gain = are_factors and any(isinstance(one, Channels) for one in tensors)
            channels.append(walk.adopt(leaf, places, is_factor=are_factors, is_gain=is_gain))
        elif isinstance(leaf, Channels):
            channels.append(Channels(places, leaf.scales.expand(shape)))
        else:
            walk.meet_data(places, leaf, source)
    return channels, [leaf for leaf in args if isinstance(leaf, int | float) and not isinstance(leaf, bool)]


def _stored_alone(walk: Walk, args: tuple[Any, ...]) -> Any:
    """A parameter and numbers, such as ``1 + weight``."""
    stored = [leaf for leaf in args if isinstance(leaf, Leaf)]
    if len(stored) != 1 or any(isinstance(leaf, Tensor | Channels) for leaf in args):
        return None
    number = next((leaf for leaf in args if isinstance(leaf, int | float)), None)
    known = op_name(walk.node) == "add" and number is not None and stored[0].offset is not None
    return replace(stored[0], offset=float(stored[0].offset or 0) + float(number or 0) if known else None)


def _sum(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """All that is added carries the same factor, and what is not zero and carries none takes it from the others."""
    if (alone := _stored_alone(walk, args)) is not None:
        return alone
    name = op_name(walk.node)
    condition = args[0] if name == "where" else args[1] if name == "masked_fill" else None
    if name in ("addcmul", "addcdiv", "lerp") or isinstance(condition, Channels | Leaf):
        return NotImplemented
    channels, numbers = _operands(walk, args)
    places = channels[0].places
    terms = [pair for pair in zip(args, walk.node.args, strict=True) if pair[0] is not condition]
    fixed = any(numbers) or any(walk.may_hold_numbers(leaf, source) for leaf, source in terms)
    bars.added(walk, places, [leaf for leaf in args if isinstance(leaf, Channels | Leaf)], has_constant=fixed)
    scales = channels[0].scales
    for other in channels[1:]:
        walk.scales.join(scales.numpy(), other.scales.numpy())
        _pin_beside(walk, scales, other.scales)
        _pin_beside(walk, other.scales, scales)
        scales = torch.where(other.scales > 0, scales, 0)
    if name in ("maximum", "minimum"):
        bars.only_positive(walk, scales)
    result = Channels(places, scales)
    if fixed:
        walk.pin_scales(result, "a constant is added to it")
        return result.without_scales()
    return result


def _pin_beside(walk: Walk, scales: Tensor, other: Tensor) -> None:
    """What is added to something without a factor carries none."""
    walk.scales.pin(scales.numpy()[other.numpy() == 0], f"it is added to what carries no factor{walk.here}")


def _product(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One of the factors' factors goes through; the last, so that a gate is the one that stays."""
    if kwargs.get("rounding_mode") is not None:
        return NotImplemented
    if (alone := _stored_alone(walk, args)) is not None:
        return alone
    channels, _ = _operands(walk, args, are_factors=True)
    bars.multiplied(walk, channels[0].places, args)
    squared = bars.squares(walk, args)
    channels = [Channels(v.places, torch.from_numpy(walk.scales.unpinned(v.scales.numpy()))) for v in channels]
    divides = op_name(walk.node) == "div" and not isinstance(args[1], int | float | Tensor)
    chosen: Channels | None = None
    for value in channels:
        if divides and value is channels[-1]:
            walk.pin_scales(value, "it divides")
        elif chosen is None or not bool(chosen.scales.any()):
            chosen = value
        elif bool(value.scales.any()):
            walk.pin_scales(chosen, "it is multiplied by what carries a factor itself")
            if np.intersect1d(chosen.scales.numpy(), value.scales.numpy()).any():
                walk.pin_scales(value, "it is multiplied by itself")
                value = value.without_scales()
            chosen = value
    return replace(chosen if chosen is not None else channels[0].without_scales(), is_squared=squared)


def _axes(value: Channels, asked: Any) -> list[int]:
    rank = value.places.dim()
    asked = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    return [axis % rank for axis in asked]


def _reduction(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value, name = args[0], op_name(walk.node)
    if not isinstance(value, Channels) or (name in ("max", "min", "norm") and len(args) > 1):
        return NotImplemented
    names = [argument.name for argument in walk.node.target._schema.arguments]  # type: ignore[union-attr]
    bound = dict(zip(names, args, strict=False)) | dict(kwargs)
    axes, keeps = _axes(value, bound.get("dim")), bool(bound.get("keepdim", False))
    reduced = [axis for axis in axes if axis in varying(value.places)]
    scales_vary = set(varying(value.scales)) & set(axes)
    if reduced:
        places, overlap = walk.blocks(value.places, reduced)
        if overlap:
            value, reduced = _one_result(walk, value, reduced), []
            places, scales_vary = value.places, set()
    else:
        places = value.places
    bars.reduced(walk, value, axes, along_channels=bool(reduced))
    for axis in axes:
        places = places.narrow(axis, 0, 1)
    if name in ops.LINEAR_REDUCTIONS and not scales_vary and not reduced:
        scales = value.scales
        for axis in axes:
            scales = scales.narrow(axis, 0, 1)
    else:
        walk.pin_scales(value, f"{name} runs over channels")
        scales = torch.zeros_like(places)
    shape = [1 if axis in axes else size for axis, size in enumerate(value.places.shape)]
    places, scales = places.expand(shape), scales.expand(shape)
    if not keeps:
        for axis in sorted(axes, reverse=True):
            places, scales = places.squeeze(axis), scales.squeeze(axis)
    return Channels(places, scales, is_squared=value.is_squared and not reduced)


def _one_result(walk: Walk, value: Channels, reduced: Sequence[int]) -> Channels:
    """Different channels are added up to one, as those of several experts: they are joined, over all places of each."""
    for axis in reduced:
        first = walk.flattened(value, axis)
        value = Channels(first.places.expand(value.shape), first.scales.expand(value.shape))
    for axis in varying(value.places):
        parts = [np.unique(part.numpy()) for part in value.places.unbind(axis)]
        if sum(map(len, parts)) > len(np.unique(np.concatenate(parts))):
            first = walk.flattened(value, axis)
            value = Channels(first.places.expand(value.shape), first.scales.expand(value.shape))
    return value


def _softmax(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    if not isinstance(value, Channels):
        return NotImplemented
    (axis,) = _axes(value, args[1])
    if axis in varying(value.places):
        _, overlap = walk.blocks(value.places, [axis])
        if overlap:
            return NotImplemented
    walk.pin_scales(value, "softmax is not linear")
    bars.bar(walk, value.places, "softmax is not linear, and counts them")
    return value.without_scales()


def _norm(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Layer norm or RMS norm as one operation: gain and bias take up factors of their own."""
    value, gains = args[0], [leaf for leaf in args[2:4] if leaf is not None]
    if len(args[1]) != 1 or isinstance(value, Leaf) or not all(isinstance(leaf, Leaf | float) for leaf in gains):
        return NotImplemented
    stored = [leaf for leaf in gains if isinstance(leaf, Leaf)]
    if isinstance(value, Tensor):
        if not stored:
            return NotImplemented
        places = walk.of_itself(stored[0], value.shape)
        walk.meet_data(places, value, walk.node.args[0])
        bars.bar(walk, places, "it is multiplied by an input of the model")
    else:
        places = value.places
        walk.pin_scales(value, f"{op_name(walk.node)} divides it by its own size")
        if places.dim() - 1 in varying(places) and walk.blocks(places, [places.dim() - 1])[1]:
            return NotImplemented
        bars.normalized(walk, value)
    gain = args[2] if len(args) > 2 else None
    taken = [walk.adopt(leaf, places, is_factor=leaf is gain, is_gain=leaf is gain) for leaf in stored]
    if any(leaf.offset != 0 for leaf in stored):
        bars.bar(walk, places, "a gain or bias is not applied as it is stored")
    scales = torch.zeros_like(places)
    if isinstance(gain, Leaf):
        scales = taken[0].scales
        for other in taken[1:]:
            walk.scales.join(scales.numpy(), other.scales.numpy())
    found = Channels(places, scales)
    nothing = torch.zeros(*places.shape[:-1], 1, dtype=torch.int64)
    statistics = Channels(nothing, nothing)
    return (found, statistics, statistics) if op_name(walk.node) == "native_layer_norm" else found


def _cat(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Along an axis of channels they stand side by side; along another, all parts hold the same channels."""
    parts, sources = list(args[0]), list(walk.node.args[0])  # type: ignore[arg-type]
    stack = op_name(walk.node) == "stack"
    rank = len(shape_of(parts[0])) + stack
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    if stack:
        parts = [_unsqueezed(part, axis) for part in parts]
    known = [part for part in parts if isinstance(part, Channels)]
    if not known:
        return NotImplemented
    along = any(axis in varying(part.places) for part in known) or (stack and len(known) > 1)
    first = next((part for part in known if varying(part.places)), known[0])
    found: list[Channels] = []
    for part, source in zip(parts, sources, strict=True):
        like = torch.zeros(shape_of(part), dtype=torch.int64)
        if along:
            if isinstance(part, Channels):
                found.append(part)
                continue
            places = torch.from_numpy(walk.places.fresh(like.numel())).reshape(like.shape)
            walk.places.pin(places.numpy(), "it stands beside data")
            if isinstance(part, Leaf):
                walk.lose(part, "it stands beside channels")
            found.append(Channels(places, like))
            continue
        like = first.places.narrow(axis, 0, 1).expand(like.shape)
        has_numbers = walk.may_hold_numbers(part, source)
        bars.added(walk, like, [part], has_constant=has_numbers)
        if isinstance(part, Leaf):
            part = walk.adopt(part, like)
        elif isinstance(part, Tensor):
            walk.meet_data(like, part, source)
            if has_numbers:
                walk.pin_scales(first, "it stands beside data")
                part = Channels(like, torch.zeros_like(like))
            else:
                part = Channels(like, first.scales.narrow(axis, 0, 1).expand(like.shape))
        else:
            walk.places.join(part.places.numpy(), like.numpy())
        walk.scales.join(part.scales.numpy(), first.scales.narrow(axis, 0, 1).expand(like.shape).numpy())
        _pin_beside(walk, first.scales.narrow(axis, 0, 1).expand(like.shape), part.scales)
        found.append(Channels(like, part.scales))
    return Channels(torch.cat([part.places for part in found], axis), torch.cat([part.scales for part in found], axis))


def _unsqueezed(part: Any, axis: int) -> Any:
    if isinstance(part, Leaf):
        return part.moved(lambda parameter: parameter.unsqueeze(axis))
    return part.each(lambda labels: labels.unsqueeze(axis)) if isinstance(part, Channels) else part.unsqueeze(axis)


def _picks(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The largest of something: which ones is not known here, so every index is taken in turn."""
    value, name = args[0], op_name(walk.node)
    if not isinstance(value, Channels):
        return NotImplemented
    walk.places.pin(value.places.numpy(), f"{name} picks among them")
    walk.pin_scales(value, f"{name} picks among them")
    shape = list(value.shape)
    axis = -1
    if name == "topk":
        axis = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        size, shape[axis] = shape[axis], args[1]
    else:
        size = shape[axis]
    rows = math.prod(shape) // shape[axis]
    turns = (torch.arange(rows).unsqueeze(1) + torch.arange(shape[axis])) % size
    moved = [s for place, s in enumerate(shape) if place != axis % len(shape)]
    indices = turns.reshape(*moved, shape[axis]).movedim(-1, axis)
    nothing = torch.zeros(shape, dtype=torch.int64)
    return Channels(nothing, nothing), indices


def _empty_like(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    kept = {name: value for name, value in kwargs.items() if name in ("dtype",)}
    if op_name(walk.node) == "full_like":
        return torch.full(shape_of(args[0]), args[1], **kept)
    if op_name(walk.node) == "ones_like":
        return torch.ones(shape_of(args[0]), **kept)
    return torch.zeros(shape_of(args[0]), **kept)


def _new(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return walk.node.target(torch.empty(shape_of(args[0])), *args[1:], **kwargs)  # type: ignore[operator]


def _index_put(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    base, indices, values, *rest = args
    if (rest and rest[0]) or isinstance(values, Leaf) or isinstance(base, Leaf):
        return NotImplemented
    if any(isinstance(index, Channels | Leaf) for index in indices):
        return NotImplemented
    if walk.may_hold_numbers(base, walk.node.args[0]):
        return NotImplemented
    nothing = torch.zeros(shape_of(base), dtype=torch.int64)
    base = base if isinstance(base, Channels) else Channels(nothing, nothing)
    if isinstance(values, Tensor):
        return NotImplemented
    bars.bar(
        walk,
        torch.cat([base.places.flatten(), values.places.flatten()]),
        "it is put beside others",
        mixing=bool(base.places.any()),
    )
    return Channels(torch.index_put(base.places, indices, values.places), torch.index_put(base.scales, indices, values.scales))


def _size(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    if isinstance(args[0], Channels) and args[1] % args[0].places.dim() in varying(args[0].places):
        bars.bar(walk, args[0].places, "their number is computed with", mixing=False)
    return int(shape_of(args[0])[args[1]])


def _all(rule: Rule, names: set[str]) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


RULES: Final[dict[str, Rule]] = {
    **_all(layout, ops.LAYOUT),
    **_all(_wrapper, ops.WRAPPERS),
    **_all(_same, ops.SAME),
    **_all(_positive, ops.POSITIVE),
    **_all(_curved, ops.CURVED),
    **_all(_sum, ops.SUMS),
    **_all(_product, ops.PRODUCTS),
    **_all(_reduction, ops.REDUCTIONS),
    **_all(_softmax, ops.SOFTMAX),
    **_all(_norm, ops.POINTWISE_WITH_LAYER),
    **_all(_empty_like, {"empty_like", "zeros_like", "ones_like", "full_like"}),
    **_all(_new, {"new_zeros", "new_ones", "new_full", "new_empty"}),
    **_all(_picks, {"topk", "sort", "argsort"}),
    "cat": _cat,
    "stack": _cat,
    "index_put": _index_put,
    "sym_size": _size,
    "linear": linear,
    "addmm": linear,
    "mm": matmul,
    "bmm": matmul,
    "matmul": matmul,
    "embedding": embedding,
    "conv1d": convolution,
    "conv2d": convolution,
    "scaled_dot_product_attention": attention,
    "grouped_mm_fallback": grouped,
    "_grouped_mm": grouped,
    "grouped_mm": grouped,
}
