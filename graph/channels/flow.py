"""Channel flow: where the channels of a program are made, who reads them, and what can be done to them without any effect."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from weakref import WeakKeyDictionary

import numpy as np
from torch import fx

from sparsepass.graph.channels.labels import Barred, Classes, Ints, mixed
from sparsepass.graph.channels.places import ChannelPlace, taken
from sparsepass.graph.channels.rules import RULES
from sparsepass.graph.channels.walk import Slot, Walk
from sparsepass.graph.program import Program

_NO_REASON: Final = "it is not both made and read by weights, or no other channel meets the same things"

Order = Literal["free", "within blocks", "pairs"]


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
        gains: Those of them that are multiplied into what they meet, element by element, as the gain of a norm is.
        terms: Those that are only added to what they meet, element by element, as the bias of a norm is.
        positive: Why no factor may be negative or zero, as where a ReLU is on the way; None where it may.
    """

    places: tuple[ChannelPlace, ...]
    gains: tuple[ChannelPlace, ...]
    terms: tuple[ChannelPlace, ...]
    positive: str | None

    @property
    def num_factors(self) -> int:
        """Factors that can be chosen."""
        return len(self.places[0].positions)


@dataclass(frozen=True, kw_only=True)
class RotationGroup:
    """Channels that may be mixed by one orthogonal matrix.

    Attributes:
        places: Every stored tensor that has to follow.
        gains: Where parameters are multiplied into the channels: each of them has to hold one number for all channels, as the
            gain of a norm does once it has been folded into what reads it. See `uneven_gains`.
        keeps_mean: Whether the matrix has to leave the vector of ones as it is, since a mean over the channels is subtracted.
    """

    places: tuple[ChannelPlace, ...]
    gains: tuple[ChannelPlace, ...]
    keeps_mean: bool

    @property
    def num_channels(self) -> int:
        """Channels that can be mixed."""
        return len(self.places[0].positions)


@dataclass(frozen=True, kw_only=True)
class RemovalGroup:
    """Channels that can be taken out, each by itself, where they are zero: where all that makes them holds zeros.

    Attributes:
        places: Every stored tensor that becomes narrower.
    """

    places: tuple[ChannelPlace, ...]

    @property
    def num_channels(self) -> int:
        """Channels that could be taken out."""
        return len(self.places[0].positions)


@dataclass(frozen=True, kw_only=True)
class ChannelFlow:
    """What can be done to the channels of a program.

    Attributes:
        permutations: Groups whose channels may change places.
        scalings: Groups whose channels may carry factors.
        rotations: Groups whose channels may be mixed.
        removals: Groups whose channels can be taken out where they are zero.
        refused: Tensor and axes -> why channels there stay in their places.
        unscaled: Tensor and axes -> why channels there carry no factor.
        unmixed: Tensor and axes -> why channels there are not mixed.
        kept: Tensor and axes -> why channels there are not taken out.
    """

    permutations: tuple[ChannelGroup, ...]
    scalings: tuple[ScaleGroup, ...]
    rotations: tuple[RotationGroup, ...]
    removals: tuple[RemovalGroup, ...]
    refused: Mapping[tuple[str, tuple[int, ...]], str]
    unscaled: Mapping[tuple[str, tuple[int, ...]], str]
    unmixed: Mapping[tuple[str, tuple[int, ...]], str]
    kept: Mapping[tuple[str, tuple[int, ...]], str]

    def lines(self) -> list[str]:
        """A line for each group: what may be done, how many channels, who makes them, and who reads them."""
        found = [f"permute, {group.order}: {_line(group.places)}" for group in self.permutations]
        found += [f"scale{', positive' * bool(group.positive)}: {_line(group.places)}" for group in self.scalings]
        for group in self.rotations:
            gains = ", ".join(place.tensor for place in group.gains)
            words = ", keeping the mean" * group.keeps_mean + f", if even: {gains}" * bool(gains)
            found.append(f"rotate{words}: {_line(group.places)}")
        return found + [f"remove: {_line(group.places)}" for group in self.removals]


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
    rotations, unmixed = _rotations(walk, slots, places)
    removals, kept = _removals(walk, slots, places)
    return ChannelFlow(
        permutations=tuple(groups),
        scalings=tuple(_scaling(walk, found, scales) for found in factors),
        rotations=rotations,
        removals=removals,
        refused=_reasons(slots, places, [slot.places for slot in slots], orders),
        unscaled=_reasons(slots, scales, [slot.scales for slot in slots], factors),
        unmixed=unmixed,
        kept=kept,
    )


_Reasons = dict[tuple[str, tuple[int, ...]], str]


def _scaling(walk: Walk, places: tuple[ChannelPlace, ...], classes: Classes) -> ScaleGroup:
    """Factors, with what is asked of them, and how what makes the channels is applied."""
    first = places[0]
    its = classes.of_label[walk.slots[first.tensor, first.axes, first.reads].scales[first.positions[:, 0]]].tolist()
    known = classes.barred["negative factors"]
    makers = [place for place in places if not place.reads]
    gains = tuple(place for place in makers if (place.tensor, place.axes) in walk.factors)
    terms = tuple(place for place in makers if (place.tensor, place.axes) in walk.terms - walk.factors)
    return ScaleGroup(places=places, gains=gains, terms=terms, positive=next((known[one] for one in its if one in known), None))


def _rotations(walk: Walk, slots: Sequence[Slot], classes: Classes) -> tuple[tuple[RotationGroup, ...], _Reasons]:
    """Channels that change places, and that all they meet is linear in and treats alike."""
    barred = _barred(walk, slots, classes, "mixing")
    for slot in slots:
        if (slot.tensor, slot.axes) in walk.gains & walk.vectors:
            barred |= dict.fromkeys(_members(slot, classes), f"{slot.tensor} is both added and multiplied")
    shaded = replace(classes, color=classes.color + mixed(classes.mixed_color))
    off_mean, found = classes.barred["mixing off the mean"], []
    for places in _groups(slots, shaded, [slot.places for slot in slots], apart=True, barred=barred):
        # A channel lies in one place, or in several blocks that are laid out alike.
        starts = [place.positions - place.positions[:, :1] for place in places]
        if any((start != start[0]).any() for start in starts) or min(start.shape[1] for start in starts) > 1:
            continue
        gains = tuple(place for place in places if (place.tensor, place.axes) in walk.gains)
        others = tuple(place for place in places if (place.tensor, place.axes) not in walk.gains)
        first = next(slot for slot in slots if (slot.tensor, slot.axes) == (places[0].tensor, places[0].axes))
        its = classes.of_label[first.places[places[0].positions[:, 0]]]
        found.append(RotationGroup(places=others, gains=gains, keeps_mean=not off_mean.keys().isdisjoint(its.tolist())))
    return tuple(found), _why_not(slots, classes, barred, [group.places + group.gains for group in found])


def _removals(walk: Walk, slots: Sequence[Slot], classes: Classes) -> tuple[tuple[RemovalGroup, ...], _Reasons]:
    """Channels that nothing on their way counts."""
    barred = _barred(walk, slots, classes, "removal")
    for slot in slots:
        if len(slot.axes) > 1:
            barred = dict.fromkeys(_members(slot, classes), "it lies along several axes of a tensor") | barred
    for parts in walk.even:
        counts = [np.bincount(classes.of_label[part.reshape(-1)], minlength=len(classes.color)) for part in parts]
        uneven = np.flatnonzero(np.any([count != counts[0] for count in counts], axis=0)).tolist()
        barred = dict.fromkeys(uneven, "it is in one of several parts of one size") | barred
    barred = dict.fromkeys(np.flatnonzero(classes.has_children).tolist(), "others move with it") | barred
    groups = _groups(slots, classes, [slot.places for slot in slots], apart=False, barred=barred)
    return tuple(RemovalGroup(places=found) for found in groups), _why_not(slots, classes, barred, groups)


def _members(slot: Slot, classes: Classes) -> list[int]:
    found: list[int] = np.unique(classes.of_label[slot.places]).tolist()
    return found


def _barred(walk: Walk, slots: Sequence[Slot], classes: Classes, what: Barred) -> dict[int, str]:
    barred = dict(classes.barred[what])
    for slot in slots:
        if slot.tensor in walk.masks:
            barred |= dict.fromkeys(_members(slot, classes), f"{slot.tensor} stands behind a mask")
    return barred


def _why_not(
    slots: Sequence[Slot], classes: Classes, barred: Mapping[int, str], groups: Sequence[Sequence[ChannelPlace]]
) -> _Reasons:
    """A reason for each tensor and axes that no group has."""
    taking_part = {(place.tensor, place.axes) for places in groups for place in places}
    found: _Reasons = {}
    for slot in slots:
        if (slot.tensor, slot.axes) in taking_part or (slot.tensor, slot.axes) in found:
            continue
        its = _members(slot, classes)
        reasons = [known[one] for known in (classes.pinned, barred) for one in its if one in known]
        found[slot.tensor, slot.axes] = reasons[0] if reasons else _NO_REASON
    return found


def uneven_gains(program: Program, group: RotationGroup) -> list[str]:
    """The parameters that keep the channels of a group from being mixed, since they hold different numbers for them.

    Args:
        program: Whose values are looked at.
        group: From the channel flow of its graph.
    """
    found = []
    for place in group.gains:
        values = taken(program.tensor(place.tensor).detach(), place)
        if bool((values != values[:1, :1]).any()):
            found.append(place.tensor)
    return found


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


def _groups(
    slots: Sequence[Slot], classes: Classes, labels: Sequence[Ints], *, apart: bool, barred: Collection[int] = ()
) -> list[tuple[ChannelPlace, ...]]:
    """Classes that lie in the same tensors as often, and meet the same things; barred ones are left out."""
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
    open_[[*classes.pinned, *barred]] = False
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
        known: dict[tuple[str, tuple[int, ...]], ChannelPlace] = {}
        for slot, found in zip(slots, members, strict=True):
            numbers = number_of[found]
            positions = np.flatnonzero(numbers >= 0)
            if not positions.size:
                continue
            ordered = positions[np.argsort(numbers[positions], kind="stable")].reshape(len(group), -1)
            place = ChannelPlace(tensor=slot.tensor, axes=slot.axes, reads=slot.reads, offset=slot.offset, positions=ordered)
            if not known.setdefault((slot.tensor, slot.axes), place).reads or slot.reads:
                continue
            known[slot.tensor, slot.axes] = place  # a tied embedding lies there twice: it makes them, too
        groups.append(tuple(known.values()))
    return groups


def _reasons(
    slots: Sequence[Slot], classes: Classes, labels: Sequence[Ints], groups: Sequence[Sequence[ChannelPlace]]
) -> _Reasons:
    """A reason for each tensor and axes that have a channel that is held, or that no group has."""
    taking_part = {(place.tensor, place.axes) for places in groups for place in places}
    found: _Reasons = {}
    for slot, its in zip(slots, labels, strict=True):
        key = slot.tensor, slot.axes
        held = [classes.pinned[one] for one in np.unique(classes.of_label[its]).tolist() if one in classes.pinned]
        if held:
            found[key] = held[0]
        elif key not in taking_part:
            found.setdefault(key, _NO_REASON)
    return found
