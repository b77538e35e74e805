"""The pass `fold_norms`: gains and biases of norms go into the layers that read them."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsepass.graph import Program, Site
from sparsepass.graph.channels import ChannelPlace, ScaleGroup, channel_flow, scaled, sums_with
from sparsepass.graph.program import masked_weight, write_weight
from sparsepass.graph.support import item_to_text
from sparsepass.passes.base import Facts, GroupContext, Pass, matches
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Multiply the gain of each norm into the layers that read it, and leave a gain of 1.

    1. Rewrites the layers whose input is made by one norm alone, whatever the norm is called: channel flow finds who reads it,
       routers and experts included. All of its readers take the gain, or none does.
    2. Where the norm has a bias and all readers have one too, the bias goes there and the norm's becomes 0, if nothing but
       layout and casts lies between. Otherwise it is divided by the gain, and a gain of 0 stays where the bias is not 0.
    3. Leaves a norm alone that something else reads than layers (a residual sum, as in post-norm models), and one whose gain
       is not positive in front of a ReLU and the like, with the reason.
    4. Leaves a mean that the norm subtracts to the norm.

    Afterwards a weight says by itself how much its input counts, and magnitudes of weights behind one norm can be compared.
    Masks stay as they are: the pass runs on dense, masked and trained programs.

    Exactness: equal but for rounding: 1e-9 in float64 and 1e-5 in float32, relative, measured on the outputs. Weights of 16
    bits are computed in float64 and rounded once; how far that moves the outputs is in the report.
    """

    name = "fold_norms"
    promise = "exact"
    needs = "nothing"
    prepares = True

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Weights that are rounded."""
        return {Condition.QUANTIZED: "scales were fitted to the weights as they are"}

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers whose input no norm makes, or a norm that something else reads."""
        group = _norm_before(site, program)
        if isinstance(group, str):
            return group
        moving = _moving(program, group)
        moved = [bias for bias in group.terms if bias.tensor in moving]
        if bool((_folded(program, group, moving) == 1).all()) and not any(_vector(program, bias).any() for bias in moved):
            return "the norm before it has nothing left to fold"
        readers = {place.tensor for place in group.places if place.reads}
        for other in program.sites():
            if other.weight in readers and any(matches(pattern, other) for pattern in self.ignore):
                return f"{other.name} reads the same norm and is to be ignored"
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fold the norm that makes the group's input."""
        del context
        found: dict[str, Facts] = {}
        for site in group.sites:
            norm = _norm_before(site, program)
            assert isinstance(norm, ScaleGroup)
            gain = fold_gain(program, norm, item_to_text(self.name, self))
            found[site.name] = {"largest_gain": float(gain.abs().max()), "smallest_gain": float(gain.abs().min())}
        return found


def _norm_before(site: Site, program: Program) -> ScaleGroup | str:
    """The factors that the norm before a layer can give away, or why it cannot."""
    flow = channel_flow(program)
    axes = (0, site.nm_axis) if site.layout.startswith("experts") else (site.nm_axis,)
    for group in flow.scalings:
        if any((place.tensor, place.axes, place.reads) == (site.weight, axes, True) for place in group.places):
            return _unfoldable(program, group) or group
    return flow.unscaled.get((site.weight, axes), "what it reads is not made by a norm")


def _unfoldable(program: Program, group: ScaleGroup) -> str | None:
    """Why what makes channels is not a norm whose gain could go into what reads them, or None if it is one."""
    makers = [place for place in group.places if not place.reads]
    vectors = [max(program.tensor(place.tensor).shape) == program.tensor(place.tensor).numel() for place in makers]
    is_each_once = all(place.positions.shape == (group.num_factors, 1) for place in makers)
    if not (all(vectors) and is_each_once and len(group.gains) + len(group.terms) == len(makers) and group.gains):
        return "what it reads is made by a layer, not by a norm"
    gain, *others = group.gains
    if others:
        return f"what it reads is made by several norms: {gain.tensor}, {', '.join(place.tensor for place in others)}"
    if group.positive is not None and bool((_vector(program, gain) <= 0).any()):
        return f"{group.positive}, and some in {gain.tensor} are not"
    return None


def norms_with_gain(program: Program) -> dict[str, ScaleGroup]:
    """Name of a norm's gain -> the factors that it can give away to what reads it, for gains that become 1 everywhere."""
    norms = [group for group in channel_flow(program).scalings if _unfoldable(program, group) is None]
    return {norm.gains[0].tensor: norm for norm in norms if not bool(_held(program, norm, _moving(program, norm)).any())}


def _vector(program: Program, place: ChannelPlace) -> Tensor:
    """What stands at the places of a group in a stored vector, in float64, with what the graph adds to it."""
    stored = program.tensor(place.tensor).detach().cpu().double().reshape(-1)
    return stored[torch.from_numpy(place.positions[:, 0])] + place.offset


def norm_gain(program: Program, norm: ScaleGroup) -> Tensor:
    """The gain of a norm from `norms_with_gain` as it is: float64 on the processor, one number for each factor."""
    return _vector(program, norm.gains[0])


def _held(program: Program, norm: ScaleGroup, moving: Collection[str]) -> Tensor:
    """Where a gain of 0 stays, since it cannot be divided out of a bias that stays."""
    others = [_vector(program, bias) != 0 for bias in norm.terms if bias.tensor not in moving]
    nothing = torch.zeros(norm.num_factors, dtype=torch.bool)
    return (norm_gain(program, norm) == 0) & functools.reduce(torch.logical_or, others, nothing)


def _folded(program: Program, norm: ScaleGroup, moving: Collection[str]) -> Tensor:
    """What the readers are multiplied by."""
    return torch.where(_held(program, norm, moving), 1.0, norm_gain(program, norm))


def fold_gain(program: Program, norm: ScaleGroup, changed_by: str) -> Tensor:
    """Multiply the gain of a norm into what reads it, and leave a gain of 1.

    Args:
        program: Changed in place.
        norm: From `norms_with_gain`.
        changed_by: The pass, as text, to be noted of weights behind masks.

    Returns:
        The gain as it was, in float64, one number for each factor.
    """
    gain, moving = norm_gain(program, norm), _moving(program, norm)
    held, factors = _held(program, norm, moving), _folded(program, norm, moving)
    for bias in norm.terms:
        values = _vector(program, bias)
        if bias.tensor in moving:
            for site in _readers(program, norm):
                assert site is not None
                _add_to_bias(program, site, norm, values)
            values = torch.zeros_like(values)
        _write(program, bias, torch.where(factors == 0, values, values / torch.where(factors == 0, 1.0, factors)))
    _write(program, norm.gains[0], torch.where(held, gain, 1.0))
    for one in norm.places:
        if one.reads:
            tensor = program.tensor(one.tensor).detach()
            taken = scaled(tensor.double(), replace(one, reads=False), factors)
            write_weight(program, one.tensor, taken.to(tensor.dtype), changed_by)
    return gain


def _readers(program: Program, norm: ScaleGroup) -> list[Site | None]:
    by_weight = {site.weight: site for site in program.sites()}
    return [by_weight.get(place.tensor) for place in norm.places if place.reads]


def _moving(program: Program, norm: ScaleGroup) -> set[str]:
    """The norm's biases that its readers can take up: those that they meet in their inputs as they were added."""
    if not norm.terms:
        return set()
    readers, every = _readers(program, norm), program.sites()
    sites = [site for site in readers if site is not None and _takes_bias(site, every)]
    inputs = {site.inputs[0] for site in sites}
    return {bias.tensor for bias in norm.terms if len(sites) == len(readers) and inputs <= sums_with(program, bias.tensor)}


def _takes_bias(site: Site, every: Sequence[Site]) -> bool:
    """Whether a layer has a bias of its own that can take up a constant input."""
    if site.bias is None or site.layout not in ("linear", "conv1d_hf"):
        return False
    return len([other for other in every if other.bias == site.bias]) == 1 and len(site.nodes) == 1


def _add_to_bias(program: Program, site: Site, norm: ScaleGroup, values: Tensor) -> None:
    place = next(place for place in norm.places if place.reads and place.tensor == site.weight)
    constant = torch.zeros(site.in_features, dtype=torch.float64)
    constant[torch.from_numpy(place.positions.reshape(-1))] = values.repeat_interleave(place.positions.shape[1])
    assert site.bias is not None
    bias = program.tensor(site.bias).detach()
    weight = site.to_matrix(masked_weight(program, site.weight)).double()
    share = weight @ constant.to(weight.device)
    program.write_tensor(site.bias, (bias.double() + share.to(bias.device)).to(bias.dtype))


def _write(program: Program, place: ChannelPlace, values: Tensor) -> None:
    tensor = program.tensor(place.tensor).detach()
    flat = tensor.double().reshape(-1).clone()
    flat[torch.from_numpy(place.positions[:, 0])] = (values - place.offset).to(flat)
    program.write_tensor(place.tensor, flat.reshape(tensor.shape).to(tensor.dtype))
