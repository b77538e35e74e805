"""The pass `permute_channels`: input channels in an order in which N:M keeps more.

Shape suffixes: E experts, O out, I in, C channels of a group, P flat positions along its axes, R rows.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.channels import ChannelFlow, ChannelGroup, ChannelPlace, channel_flow, permuted
from sparsepass.graph.support import nearest
from sparsepass.passes.base import Facts, GroupContext, Needs, Pass, matches
from sparsepass.passes.conditions import Condition
from sparsepass.passes.criteria import CRITERIA, Criterion, criteria_table
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import NMPattern, PermutationMethod, best_order, kept_score
from sparsepass.passes.nm_sparsify import NMSparsify

_Places: TypeAlias = NDArray[np.int64]
_LEAST_GAIN = 1e-6
"""Share of a layer's score: sums in another order differ by less."""
_MOST_ROWS = 1 << 15
"""Rows that an order is searched with. More are compared, but do not change which order is found by much."""


@dataclass(frozen=True, kw_only=True)
class PermuteChannels(Pass):
    """Put input channels into an order in which N:M keeps more of the criterion's score, without any effect on the outputs.

    1. Rewrites layers that `nm_sparsify` would prune, where channel flow finds who makes the channels that they read: MLPs,
       heads of values, experts, the residual stream. Everything that makes or reads a channel moves with it: rows of the
       layers before, norms, embeddings, and layers that are not pruned.
    2. Channels move as channel flow allows: anywhere, or within their head or expert.
    3. Where several layers read the same channels, the sum of the shares that they keep counts, each a share of its own score.
    4. An order that keeps no more than the given one is not taken, so what is kept never falls.
    5. Leaves groups of channels alone that do not fill whole groups of M, or that a layer to be ignored makes or reads.
    6. Refuses programs with masks, whose pattern it would destroy: it stands before `nm_sparsify`.

    Args:
        pattern: N:M, as for `nm_sparsify`.
        criterion: Whose score: ``magnitude``, ``wanda``, ``ria``, or that of another package. By default ``ria`` with
            calibration and ``magnitude`` without.
        method: ``assignment``: RIA's, channels dealt out, then assigned anew until that gains nothing; ``greedy``: once, each
            channel where it adds most.
        targets: Layers whose score counts; see `Pass`.
        ignore: Layers in which no channel moves.

    Raises:
        SparsepassError: If the pattern cannot be, or the criterion is unknown or has no score.

    Source: RIA (Zhang et al., ICLR 2024), section on channel permutation; the greedy form is our own.

    Exactness: values move and are never computed anew, so outputs are equal but for the order in which sums are taken: 1e-9 in
    float64 and 1e-5 in float32, relative, measured on the outputs.
    """

    name = "permute_channels"
    promise = "exact"
    prepares = True
    keeps_hidden_states = False

    pattern: str = "2:4"
    criterion: str | None = None
    method: PermutationMethod = "assignment"

    def __post_init__(self) -> None:
        super().__post_init__()
        NMPattern.parse(self.pattern)
        if self.method not in get_args(PermutationMethod):
            raise SparsepassError(f"method expects one of {', '.join(get_args(PermutationMethod))}, got {self.method!r}")
        if self.criterion is not None and self.criterion not in CRITERIA:
            known = criteria_table()
            if self.criterion not in known:
                raise SparsepassError(f"unknown criterion {self.criterion!r}{nearest(self.criterion, list(known))}")
        if self.criterion is not None and self._criterion.score is None:
            scored = [name for name, row in criteria_table().items() if row.score is not None]
            raise SparsepassError(
                f"the criterion {self.criterion!r} has no score that an order could keep more of; choose one of "
                f"{', '.join(scored)} here, whatever nm_sparsify has"
            )

    def resolve(self, *, has_calibration: bool) -> Self:
        """Choose the criterion: RIA with calibration, magnitude without."""
        return replace(self, criterion=self.criterion or ("ria" if has_calibration else "magnitude"))

    @property
    def needs(self) -> Needs:
        """What the criterion needs."""
        return self._criterion.needs

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Masks, zeros that are in the weights already, and weights that are rounded."""
        why = "another order of channels would destroy the N:M pattern"
        rounded = "another order of channels would tear the groups that share a scale"
        return {Condition.MASKED: why, Condition.FOLDED: why, Condition.QUANTIZED: rounded}

    @property
    def _criterion(self) -> Criterion:
        assert self.criterion is not None, "resolve() runs before anything else"
        return CRITERIA.get(self.criterion) or criteria_table()[self.criterion]

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers that `nm_sparsify` would not prune, and those whose channels cannot move."""
        pruning = NMSparsify(pattern=self.pattern, criterion=self.criterion)
        return pruning.refusal(site, program) or self._unmovable(site, program)

    def groups(self, program: Program, sites: Sequence[Site]) -> list[SiteGroup]:
        """Layers that read the same channels, wherever in the model they stand."""
        known = _known(program)
        found: list[tuple[set[int], list[Site]]] = []
        for site in sites:
            mine, members = {id(channels) for channels in known.read_by(site)}, [site]
            for other in [other for other in found if other[0] & mine]:
                found.remove(other)
                mine, members = mine | other[0], other[1] + members
            found.append((mine, members))
        return [SiteGroup(sites=tuple(members)) for _, members in found]

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Find an order for each group of channels that these layers read, and move them."""
        known = _known(program)
        channels = {id(found): found for site in group.sites for found in known.read_by(site) if not self._stays(found, known)}
        pattern = NMPattern.parse(self.pattern)
        # The score of one layer at a time is held: together they may be as large as the model.
        score_of = functools.lru_cache(maxsize=1)(functools.partial(self._score, program, context))
        kept = {site.name: kept_score(score_of(site).flatten(0, -2).T, pattern) for site in group.sites}
        after, moved = dict(kept), dict.fromkeys(kept, 0)
        orders: list[tuple[ChannelGroup, _Places]] = []
        for found in channels.values():
            readers = [
                _ScoredLayer(site=site, place=place, score_of=score_of)
                for site in group.sites
                for place in _places_read(site, found)
            ]
            order = self._search(readers)
            gains = [self._kept(reader, order) - self._kept(reader, np.arange(len(order))) for reader in readers]
            if sum(gains) <= _LEAST_GAIN * len(readers) or not (order != np.arange(len(order))).any():
                continue
            orders.append((found, order))
            for reader, gain in zip(readers, gains, strict=True):
                after[reader.site.name] += gain
                moved[reader.site.name] += int((order != np.arange(len(order))).sum())
        for found, order in orders:
            for place in found.places:
                program.write_tensor(place.tensor, permuted(program.tensor(place.tensor).detach(), place, order))
        for name in [name for name, number in moved.items() if not number]:
            context.unchanged[name] = f"no order was found that keeps more than its own, which keeps {kept[name]:.2%}"
        return {
            name: {"kept_before": kept[name], "kept_after": after[name], "channels_moved": number}
            for name, number in moved.items()
            if number
        }

    def _unmovable(self, site: Site, program: Program) -> str | None:
        """Why no channel that a layer reads can move, or None if some can."""
        known = _known(program)
        found = known.read_by(site)
        if not found:
            refused = channel_flow(program).refused
            reasons = [refused[site.weight, axes] for axes in _axes(site) if (site.weight, axes) in refused]
            return reasons[0] if reasons else "no two channels that it reads can change places"
        stays = [self._stays(channels, known) for channels in found]
        return None if None in stays else stays[0]

    def _stays(self, channels: ChannelGroup, known: "_Known") -> str | None:
        """Why a group of channels stays as it is."""
        m = NMPattern.parse(self.pattern).m
        sites = [known.sites[place.tensor] for place in channels.places if place.tensor in known.sites]
        for site in sites:
            if any(matches(pattern, site) for pattern in self.ignore):
                return f"{site.name} makes or reads the same channels and is to be ignored"
        pruned = [site for site in sites if self.left_out(site) is None and site.in_features % m == 0]
        if _slots([place for site in pruned for place in _places_read(site, channels)], m) is None:
            return f"the {channels.num_channels} channels that may change places do not fill whole groups of {m}"
        return None

    def _score(self, program: Program, context: GroupContext, site: Site) -> Tensor:
        """Scores of a layer as shares of their sum, shaped as `Site.to_matrix` says."""
        matrix = site.to_matrix(program.tensor(site.weight).detach())
        statistics = context.by_weight.get(site.weight, ())
        function, by_magnitude = self._criterion.score, CRITERIA["magnitude"].score
        assert function is not None
        assert by_magnitude is not None
        if matrix.dim() == 3 and statistics:  # as nm_sparsify does, by magnitude where no token came
            pairs = zip(matrix, statistics, strict=True)
            scores = [_shares((function if known.num_tokens else by_magnitude)(one, known)) for one, known in pairs]
            return torch.stack(scores) / len(scores)
        return _shares(function(matrix, statistics[0] if statistics else None))

    def _kept(self, reader: "_ScoredLayer", order: _Places) -> float:
        """The share of a layer's score that is kept of the channels of a group, in some order."""
        pattern = NMPattern.parse(self.pattern)
        slots = _slots([reader.place], pattern.m)
        assert slots is not None
        return sum(kept_score(reader.scores(column), pattern) for column in reader.place.positions[order[slots]].T)

    def _search(self, readers: "Sequence[_ScoredLayer]") -> _Places:
        """The best order that is found for the channels of a group."""
        pattern = NMPattern.parse(self.pattern)
        slots = _slots([reader.place for reader in readers], pattern.m)
        assert slots is not None
        step = math.ceil(sum(reader.num_rows * reader.place.positions.shape[1] for reader in readers) / _MOST_ROWS)
        parts = [reader.scores(column, step).cpu() for reader in readers for column in reader.place.positions[slots].T]
        order = slots.copy()
        order[slots] = slots[best_order(torch.cat(parts, dim=1), pattern, self.method).numpy()]
        return order


@dataclass(frozen=True, kw_only=True)
class _ScoredLayer:
    """A layer that reads channels of a group.

    Attributes:
        site: The layer.
        place: Where the channels lie in its weight.
        score_of: Gives a layer's scores.
    """

    site: Site
    place: ChannelPlace
    score_of: Callable[[Site], Tensor]

    @property
    def num_rows(self) -> int:
        """Scores of a channel."""
        return self.site.num_weights // math.prod(self.site.shape[axis] for axis in self.place.axes)

    def scores(self, positions: _Places, step: int = 1) -> Tensor:
        """Scores at flat positions along the place's axes, of every row, or of each so many. Shape: [C, R]."""
        score = self.score_of(self.site)
        if len(self.place.axes) == 2:  # [E, O, I] of experts that have channels of their own
            experts, columns = (torch.from_numpy(found) for found in np.divmod(positions, self.site.in_features))
            return score[:, ::step][experts, :, columns]
        return score.reshape(-1, self.site.in_features)[::step, torch.from_numpy(positions)].T


def _shares(score: Tensor) -> Tensor:
    """Scores that add up to one, or to zero."""
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    total = score.sum(dtype=torch.float64)
    return score / (total if total else 1)


def _axes(site: Site) -> list[tuple[int, ...]]:
    """Along which axes of a weight the channels run that it reads: experts share them, or have their own."""
    return [(site.nm_axis,), (0, site.nm_axis)] if site.layout.startswith("experts") else [(site.nm_axis,)]


def _places_read(site: Site, channels: ChannelGroup) -> list[ChannelPlace]:
    return [place for place in channels.places if place.reads and place.tensor == site.weight and place.axes in _axes(site)]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What the graph of a program tells.

    Attributes:
        sites: Weight -> its site.
        reading: Weight and axes -> the groups of channels that it reads there.
    """

    sites: Mapping[str, Site]
    reading: Mapping[tuple[str, tuple[int, ...]], Sequence[ChannelGroup]]

    def read_by(self, site: Site) -> list[ChannelGroup]:
        """The groups of channels that a layer reads."""
        return [channels for axes in _axes(site) for channels in self.reading.get((site.weight, axes), ())]


_KNOWN: "WeakKeyDictionary[fx.Graph, tuple[ChannelFlow, _Known]]" = WeakKeyDictionary()
"""Each layer is asked for, and the graph stays the same meanwhile: so does its channel flow."""


def _known(program: Program) -> _Known:
    graph, flow = program.graph_module.graph, channel_flow(program)
    if graph not in _KNOWN or _KNOWN[graph][0] is not flow:
        reading: dict[tuple[str, tuple[int, ...]], list[ChannelGroup]] = {}
        for channels in flow.permutations:
            for place in channels.places:
                if place.reads:
                    reading.setdefault((place.tensor, place.axes), []).append(channels)
        _KNOWN[graph] = flow, _Known(sites={site.weight: site for site in program.sites()}, reading=reading)
    return _KNOWN[graph][1]


def _slots(places: Sequence[ChannelPlace], m: int) -> _Places | None:
    """The channels in the order in which they lie in weights, if each M of them fill a group of M wherever they lie."""
    slots = places[0].positions[:, 0].argsort()
    if len(slots) % m:
        return None
    for place in places:
        groups = place.positions[slots].reshape(-1, m, place.positions.shape[1]) // m
        if (groups != groups[:, :1]).any():
            return None
    return slots
