"""The pass `awq_scale`: channels with large inputs get larger weights, so that rounding the weights costs less.

Tensor shapes: E experts, O out, I in, F factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsepass.graph import Program, Site
from sparsepass.graph.channels import ScaleGroup, channel_flow, scaled, taken
from sparsepass.graph.program import masked_weight, write_weight
from sparsepass.graph.rounding import RoundingGrid
from sparsepass.graph.support import item_to_text
from sparsepass.passes.base import Facts, GroupContext, Pass, matches
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import EXPONENTS, InputStatistics, awq_factors, output_size, rounding_error

_NOT_LOWERED = "no factors lower the error that rounding makes"


@dataclass(frozen=True, kw_only=True)
class AWQScale(Pass):
    """Move factors from the inputs of layers into their weights, so that rounding to few bits moves the outputs less.

    1. Rewrites every layer whose input channels can carry factors, wherever they are made: channel flow finds the norm before
       q/k/v and before gate/up, the rows of v before o, of up before down, and so on. What makes a channel is divided by its
       factor, and the columns of all that read it are multiplied. Where query heads share a value head, as in grouped-query
       attention, they share its factors.
    2. Factors are ``a^r``, with a the root mean square of a channel on the calibration data, and its mean over the places where
       the channel is read. For each group of channels r is what leaves the least output error of its readers, when their
       weights are rounded to the nearest, of 0, 0.05, ..., 0.95.
    3. Leaves a group as it is where no r but 0 lowers the error, with that reason.
    4. Leaves layers alone whose inputs can carry no factors, with the reason from channel flow, and where a layer that makes or
       reads the same channels is to be ignored.
    5. Runs once over a layer, since a second search would begin from the scaled weights.

    Weights are not rounded here, and masks stay as they are, so that pruned weights stay zero. Routers and output heads take up
    factors but do not count in the error, unless they are targets.

    Args:
        bits: Of the integers that weights are going to be rounded to, 4 or 8.
        group_size: Input channels that will share a scale; 0 for one scale a row.
        symmetric: Whether there will be no zero points.
        targets: See `Pass`.
        ignore: See `Pass`.

    Source: AWQ, arXiv 2306.00978, with two differences: the error is that of the layers' own outputs, from Gram matrices, and a
    is the root mean square, which these have anyway, and not the mean magnitude.

    Exactness: equal but for rounding: 1e-9 in float64 and 1e-5 in float32, relative, measured on the outputs. Weights of 16
    bits are computed in float64 and rounded once; how far that moves the outputs is in the report.
    """

    name = "awq_scale"
    promise = "exact"
    needs = "gram"
    prepares = True

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.grid  # complains of values out of range

    @property
    def grid(self) -> RoundingGrid:
        """What weights are going to be rounded to."""
        return RoundingGrid(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Weights that are rounded."""
        return {Condition.QUANTIZED: "scales were fitted to the weights as they are"}

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers whose input channels carry no factors, or have been scaled before."""
        if site.groups > 1:
            return f"a convolution in {site.groups} groups has no statistics for each group"
        scalings = _read_by([site], program)
        if not scalings:
            unscaled = channel_flow(program).unscaled.items()
            reasons = [why for (tensor, axes), why in unscaled if tensor == site.weight and site.nm_axis in axes]
            return reasons[0] if reasons else "nothing that makes its input can carry factors"
        if self.has_run(site, program, _NOT_LOWERED):
            return f"an earlier {self.name} has searched its factors"
        touched = {place.tensor for scaling in scalings for place in scaling.places}
        for other in program.sites() if self.ignore else ():
            if other.weight in touched and any(matches(pattern, other) for pattern in self.ignore):
                return f"{other.name} makes or reads the same channels and is to be ignored"
        return None

    def groups(self, program: Program, sites: Sequence[Site]) -> list[SiteGroup]:
        """Sites that read channels in common."""
        found: list[tuple[list[Site], set[str]]] = []
        for site in sites:
            tensors = {place.tensor for scaling in _read_by([site], program) for place in scaling.places if place.reads}
            same = [known for known in found if known[1] & tensors]
            found = [known for known in found if not known[1] & tensors]
            found.append(([*(one for known in same for one in known[0]), site], tensors.union(*(known[1] for known in same))))
        return [SiteGroup(sites=tuple(its)) for its, _ in found]

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Search the factors of all channels that a group of sites reads, one after the other, and put them in their places."""
        layers = [_SearchedLayer.of(program, site, context.by_weight[site.weight]) for site in group.sites]
        before = [layer.error(self.grid) for layer in layers]
        chosen: dict[str, list[float]] = {site.name: [] for site in group.sites}
        found: list[tuple[ScaleGroup, Tensor]] = []
        for scaling in _read_by(group.sites, program):
            exponent, factors_F = self._search(scaling, layers)
            for index, layer in enumerate(layers):
                if layer.reads(scaling):
                    chosen[layer.site.name].append(exponent)
                    layers[index] = layer.behind(scaling, factors_F)
            if exponent:
                found.append((scaling, factors_F))
        facts: dict[str, Facts] = {}
        for layer, start in zip(layers, before, strict=True):
            exponents = chosen[layer.site.name]
            if not any(exponents):
                context.unchanged[layer.site.name] = f"{_NOT_LOWERED}, which is {layer.relative(start):.3g}"
            facts[layer.site.name] = {
                "exponent": exponents[0] if len(exponents) == 1 else ", ".join(map(str, exponents)),
                "error_before": layer.relative(start),
                "error_after": layer.relative(layer.error(self.grid)),
            }
        for scaling, factors_F in found:  # the layers above hold the weights themselves, so not before
            self._absorb(program, scaling, factors_F)
        return facts

    def _search(self, scaling: ScaleGroup, layers: Sequence["_SearchedLayer"]) -> tuple[float, Tensor]:
        """The exponent that leaves the least error, and the factors that go into what makes the channels."""
        readers = [layer for layer in layers if layer.reads(scaling)]
        sizes_F = _sizes(scaling, readers)
        best = EXPONENTS[0], torch.ones_like(sizes_F)
        least = sum(layer.error(self.grid) for layer in readers)
        for exponent in EXPONENTS[1:]:
            factors_F = 1 / awq_factors(sizes_F, exponent)
            error = sum(layer.behind(scaling, factors_F).error(self.grid) for layer in readers)
            if error < least:
                best, least = (exponent, factors_F), error
        return best

    def _absorb(self, program: Program, scaling: ScaleGroup, factors_F: Tensor) -> None:
        """Multiply what makes the channels, and divide what reads them."""
        for place in scaling.places:
            tensor = program.tensor(place.tensor).detach()
            values = scaled(tensor.double(), place, factors_F.double()).to(tensor.dtype)
            write_weight(program, place.tensor, values, item_to_text(self.name, self))


@dataclass(frozen=True, kw_only=True, eq=False)
class _SearchedLayer:
    """A layer while factors are searched.

    Attributes:
        site: The layer.
        weight: Its weight as a matrix, behind its mask, float32 and not to be written into; the scaled one is
            ``weight * multiplier``.
        multiplier: ``[1, I]``, or ``[E, 1, I]``.
        statistics: Of its inputs, before any scaling.
    """

    site: Site
    weight: Tensor
    multiplier: Tensor
    statistics: tuple[InputStatistics, ...]

    @staticmethod
    def of(program: Program, site: Site, statistics: tuple[InputStatistics, ...]) -> "_SearchedLayer":
        device = statistics[0].device
        weight = site.to_matrix(masked_weight(program, site.weight)).to(device, torch.float32)
        return _SearchedLayer(site=site, weight=weight, multiplier=torch.ones_like(weight[..., :1, :]), statistics=statistics)

    def reads(self, scaling: ScaleGroup) -> bool:
        return any(place.reads and place.tensor == self.site.weight for place in scaling.places)

    def behind(self, scaling: ScaleGroup, factors_F: Tensor) -> "_SearchedLayer":
        """The layer when its inputs are multiplied by factors."""
        stored = self.site.from_matrix(self.multiplier.expand_as(self.weight))
        for place in scaling.places:
            if place.reads and place.tensor == self.site.weight:
                stored = scaled(stored, place, factors_F)
        return replace(self, multiplier=self.site.to_matrix(stored)[..., :1, :].contiguous())

    def error(self, grid: RoundingGrid) -> float:
        return rounding_error(self.weight, self.multiplier, self.statistics, grid)

    def relative(self, error: float) -> float:
        """An error relative to the layer's output."""
        parts = self.weight if self.weight.dim() == 3 else self.weight[None]
        total = sum(output_size(part, known) for part, known in zip(parts, self.statistics, strict=True) if known.num_tokens)
        return (error / total) ** 0.5 if total > 0 else 0.0


def _read_by(sites: Sequence[Site], program: Program) -> list[ScaleGroup]:
    """The groups of channels that some of these sites read."""
    weights = {site.weight for site in sites}
    return [
        scaling
        for scaling in channel_flow(program).scalings
        if any(place.reads and place.tensor in weights for place in scaling.places)
    ]


def _sizes(scaling: ScaleGroup, layers: Sequence[_SearchedLayer]) -> Tensor:
    """The root mean square of each channel: its mean over all places that read it, which count by their tokens."""
    total_F = torch.zeros(scaling.num_factors)
    tokens_F = torch.zeros(scaling.num_factors)
    for layer in layers:
        tokens = torch.tensor([float(known.num_tokens) for known in layer.statistics])
        norms = torch.stack([known.norms().cpu() for known in layer.statistics])
        sizes = norms * tokens.clamp_min(1).sqrt()[:, None]  # times the tokens: norm / sqrt(tokens) * tokens
        for values, sums_F in ((sizes, total_F), (tokens[:, None].expand_as(sizes), tokens_F)):
            matrix = values[:, None, :] if layer.weight.dim() == 3 else values
            stored = layer.site.from_matrix(matrix.expand(layer.weight.shape))
            for place in scaling.places:
                if place.reads and place.tensor == layer.site.weight:
                    sums_F += taken(stored, place).flatten(2).mean(-1).sum(-1)
    seen_F = tokens_F > 0
    mean = (total_F[seen_F] / tokens_F[seen_F]).mean() if bool(seen_F.any()) else torch.tensor(1.0)
    return torch.where(seen_F, total_F / tokens_F.clamp_min(1), mean)
