"""Channel flow: where the channels of a program are made, who reads them, and what can be done to them without any effect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import fx

from sparsepass.graph.channels.labels import Classes, Ints, mixed
from sparsepass.graph.channels.rules import RULES
from sparsepass.graph.channels.walk import Slot, Walk
from sparsepass.graph.program import Program

Order = Literal["free", "within blocks", "pairs"]


@dataclass(frozen=True, kw_only=True)
class ChannelPlace:
    """Where channels of a group lie in one stored tensor.

    Attributes:
        tensor: Its name.
        axes: The axes that the channels run along; several count as one, flat.
        reads: Whether the tensor sums over them; otherwise it makes them, or is applied element by element.
        offset: What the graph adds to the tensor before it is used, as in ``1 + weight``.
        positions: Flat positions along the axes, [channels, times]: a channel that several query heads share lies there often.
    """

    tensor: str
    axes: tuple[int, ...]
    reads: bool
    offset: float
    positions: Ints


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that may change places with each other.

    Attributes:
        places: Every stored tensor that has to follow.
        order: ``free``: any permutation; ``within blocks``: so too, and there are other blocks (heads, experts) like this one,
            with which nothing is exchanged; ``pairs``: a channel is several positions that stay together, as in rotary
            embeddings.
    """

    places: tuple[ChannelPlace, ...]
    order: Order

    @property
    def num_channels(self) -> int:
        """Channels that can be ordered anew."""
        return len(self.places[0].positions)


@dataclass(frozen=True, kw_only=True)
class ScaleGroup:
    """Positions that can carry one factor: what makes them is multiplied, what reads them divided by it.

    Attributes:
        places: Every stored tensor that takes it up; ``positions`` have one row a factor.
    """

    places: tuple[ChannelPlace, ...]

    @property
    def num_factors(self) -> int:
        """Factors that can be chosen."""
        return len(self.places[0].positions)


@dataclass(frozen=True, kw_only=True)
class ChannelFlow:
    """What can be done to the channels of a program.

    Attributes:
        permutations: Groups whose channels may change places.
        scalings: Groups whose channels may carry factors.
        refused: Tensor and axes -> why channels there stay in their places.
        unscaled: Tensor and axes -> why channels there carry no factor.
    """

    permutations: tuple[ChannelGroup, ...]
    scalings: tuple[ScaleGroup, ...]
    refused: Mapping[tuple[str, tuple[int, ...]], str]
    unscaled: Mapping[tuple[str, tuple[int, ...]], str]

    def lines(self) -> list[str]:
        """A line for each group: what may be done, how many channels, who makes them, and who reads them."""
        found = [f"permute, {group.order}: {_line(group.places)}" for group in self.permutations]
        return found + [f"scale: {_line(group.places)}" for group in self.scalings]


def channel_flow(program: Program) -> ChannelFlow:
    """Find out where the channels of a program come from, who reads them, and what they can bear.

    Works on the graph alone; names of modules and classes mean nothing to it.

    Args:
        program: Not changed. Its parameters are not read, and may be on the meta device.

    Returns:
        Groups of channels, and reasons where there are none.
    """
    graph = program.graph_module.graph
    key = hash(tuple(node.name for node in graph.nodes))
    known = _KNOWN.get(graph)
    if known is None or known[0] != key:
        known = _KNOWN[graph] = key, _walked(program)
    return known[1]


_KNOWN: "WeakKeyDictionary[fx.Graph, tuple[int, ChannelFlow]]" = WeakKeyDictionary()
"""Flow depends on the graph alone, not on values, so passes that ask at each layer find it again."""


def _walked(program: Program) -> ChannelFlow:
    walk = Walk(program)
    walk.run(RULES)
    slots = list(walk.slots.values())
    places, scales = walk.places.solve(), walk.scales.solve()
    orders = [_with_masks(found, walk.masks) for found in _groups(slots, places, [slot.places for slot in slots], apart=True)]
    factors = _groups(slots, scales, [slot.scales for slot in slots], apart=False)
    counts: dict[tuple[object, ...], int] = {}
    for found in orders:
        counts[_kind(found)] = counts.get(_kind(found), 0) + 1
    groups = []
    for found in orders:
        pairs = min(place.positions.shape[1] for place in found) > 1
        order: Order = "pairs" if pairs else "within blocks" if counts[_kind(found)] > 1 else "free"
        groups.append(ChannelGroup(places=found, order=order))
    return ChannelFlow(
        permutations=tuple(groups),
        scalings=tuple(ScaleGroup(places=found) for found in factors),
        refused=_reasons(slots, places, [slot.places for slot in slots]),
        unscaled=_reasons(slots, scales, [slot.scales for slot in slots]),
    )


def _line(places: Sequence[ChannelPlace]) -> str:
    def names(reads: bool) -> str:
        chosen = [place for place in places if place.reads == reads]
        return ", ".join(f"{place.tensor}[{','.join(map(str, place.axes))}]" for place in chosen)

    return f"{len(places[0].positions)} channels of {names(False)} -> {names(True)}"


def _with_masks(found: tuple[ChannelPlace, ...], masks: Mapping[str, str]) -> tuple[ChannelPlace, ...]:
    """Masks are permuted with their weights."""
    return (*found, *(replace(place, tensor=masks[place.tensor]) for place in found if place.tensor in masks))


def _kind(found: Sequence[ChannelPlace]) -> tuple[object, ...]:
    return tuple((place.tensor, place.axes, place.reads) for place in found)


def _groups(slots: Sequence[Slot], classes: Classes, labels: Sequence[Ints], *, apart: bool) -> list[tuple[ChannelPlace, ...]]:
    """Classes that lie in the same tensors as often, and meet the same things."""
    count = len(classes.color)
    color = classes.color.copy() if apart else np.zeros(count, dtype=np.uint64)
    members = [classes.of_label[found] for found in labels]
    makes, reads = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    for number, (slot, found) in enumerate(zip(slots, members, strict=True)):
        times = np.bincount(found, minlength=count).astype(np.uint64)
        with np.errstate(over="ignore"):
            color += np.where(times > 0, mixed(times * np.uint64(2_654_435_761) + np.uint64(number + 1)), np.uint64(0))
        (reads if slot.reads else makes)[found] = True
    open_ = np.ones(count, dtype=np.bool_) & makes & reads
    open_[list(classes.pinned)] = False
    open_[classes.of_label[0]] = False
    if apart:
        open_ &= ~classes.has_children
    chosen = np.flatnonzero(open_)
    by_color: dict[int, list[int]] = {}
    for one, shade in zip(chosen.tolist(), color[chosen].tolist(), strict=True):
        by_color.setdefault(shade, []).append(one)
    groups = []
    for group in by_color.values():
        if apart and len(group) < 2:
            continue
        number_of = np.full(count, -1, dtype=np.int64)
        number_of[group] = np.arange(len(group))
        places, known = [], set()
        for slot, found in zip(slots, members, strict=True):
            numbers = number_of[found]
            positions = np.flatnonzero(numbers >= 0)
            if not positions.size or (slot.tensor, slot.axes) in known:
                continue  # a tied embedding lies there twice
            known.add((slot.tensor, slot.axes))
            ordered = positions[np.argsort(numbers[positions], kind="stable")].reshape(len(group), -1)
            places.append(
                ChannelPlace(tensor=slot.tensor, axes=slot.axes, reads=slot.reads, offset=slot.offset, positions=ordered)
            )
        groups.append(tuple(places))
    return groups


def _reasons(slots: Sequence[Slot], classes: Classes, labels: Sequence[Ints]) -> dict[tuple[str, tuple[int, ...]], str]:
    found = {}
    for slot, its in zip(slots, labels, strict=True):
        for one in np.unique(classes.of_label[its]).tolist():
            if one in classes.pinned:
                found[slot.tensor, slot.axes] = classes.pinned[one]
                break
    return found


def taken(tensor: torch.Tensor, place: ChannelPlace) -> torch.Tensor:
    """What stands at the places of a group in a stored tensor: [channels, times], then the tensor's other axes.

    Args:
        tensor: As the program holds it, or anything of that shape.
        place: Where the channels lie in it.
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    return moved.reshape(-1, *moved.shape[len(axes) :])[torch.from_numpy(place.positions)]


def permuted(tensor: torch.Tensor, place: ChannelPlace, order: Ints) -> torch.Tensor:
    """A stored tensor with the channels of a group in another order.

    Args:
        tensor: As the program holds it.
        place: Where the channels lie in it.
        order: ``order[i]``: which channel comes to the place of channel i.
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    flat = moved.reshape(-1, *moved.shape[len(axes) :]).clone()
    source = flat[torch.from_numpy(place.positions[order].reshape(-1))]
    flat[torch.from_numpy(place.positions.reshape(-1))] = source
    return flat.reshape(moved.shape).movedim(tuple(range(len(axes))), axes)


def scaled(tensor: torch.Tensor, place: ChannelPlace, factors: torch.Tensor) -> torch.Tensor:
    """A stored tensor that takes up factors of a group: multiplied where it makes the channels, divided where it reads them.

    Args:
        tensor: As the program holds it.
        place: Where the channels lie in it.
        factors: One for each, [factors].
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    flat = moved.reshape(-1, *moved.shape[len(axes) :]).clone()
    positions = torch.from_numpy(place.positions)
    each = factors.to(flat).unsqueeze(1).expand(positions.shape).reshape(-1, *([1] * (flat.dim() - 1)))
    rows = flat[positions.reshape(-1)]
    changed = rows / each if place.reads else (rows + place.offset) * each - place.offset
    flat[positions.reshape(-1)] = changed
    return flat.reshape(moved.shape).movedim(tuple(range(len(axes))), axes)
