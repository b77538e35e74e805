"""The pass `fold_norms`: gains and biases of norms go into the layers that read them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsepass.graph import Program, Site
from sparsepass.graph.channels import ChannelPlace, ScaleGroup, channel_flow, scaled
from sparsepass.graph.program import masked_weight
from sparsepass.passes.base import Facts, GroupContext, Pass, matches
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup


@dataclass(frozen=True, kw_only=True)
class FoldNorms(Pass):
    """Multiply the gain of each norm into the layers that read it, and leave a gain of 1.

    1. Rewrites the layers whose input is made by a norm alone, whatever the norm is called: channel flow finds who reads it,
       routers and experts included. All of its readers take the gain, or none does.
    2. Where the norm has a bias and all readers have one too, the bias goes there and the norm's becomes 0. Otherwise it is
       divided by the gain.
    3. Leaves a norm alone that something else reads than layers (a residual sum, as in post-norm models), with the reason.

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
        if bool((_gain(program, group) == 1).all()) and not any(
            _vector(program, bias).any() for bias in _moving(program, group)
        ):
            return "the norm before it has a gain of 1 already"
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
            gain = fold_gain(program, norm)
            found[site.name] = {"largest_gain": float(gain.abs().max()), "smallest_gain": float(gain.abs().min())}
        return found


def _norm_before(site: Site, program: Program) -> ScaleGroup | str:
    """The factors that the norm before a layer can give away, or why it cannot."""
    flow = channel_flow(program)
    axes = (0, site.nm_axis) if site.layout.startswith("experts") else (site.nm_axis,)
    for group in flow.scalings:
        if not any((place.tensor, place.axes, place.reads) == (site.weight, axes, True) for place in group.places):
            continue
        if _is_made_by_norm(program, group):
            return group
        return "what it reads is made by a layer, not by a norm"
    return flow.unscaled.get((site.weight, axes), "what it reads is not made by a norm")


def norms_with_gain(program: Program) -> dict[str, ScaleGroup]:
    """Name of a norm's gain -> the factors that it can give away to what reads it."""
    groups = [group for group in channel_flow(program).scalings if _is_made_by_norm(program, group)]
    return {next(place.tensor for place in group.places if not place.reads): group for group in groups}


def _is_made_by_norm(program: Program, group: ScaleGroup) -> bool:
    makers = [place for place in group.places if not place.reads]
    vectors = [max(program.tensor(place.tensor).shape) == program.tensor(place.tensor).numel() for place in makers]
    return all(vectors) and all(place.positions.shape == (group.num_factors, 1) for place in makers)


def _vector(program: Program, place: ChannelPlace) -> Tensor:
    """What stands at the places of a group in a stored vector, in float64, with what the graph adds to it."""
    stored = program.tensor(place.tensor).detach().double().reshape(-1)
    return stored[torch.from_numpy(place.positions[:, 0])] + place.offset


def _gain(program: Program, norm: ScaleGroup) -> Tensor:
    """The gain is met before the bias."""
    return _vector(program, next(place for place in norm.places if not place.reads))


def fold_gain(program: Program, norm: ScaleGroup) -> Tensor:
    """Multiply the gain of a norm into what reads it, and leave a gain of 1.

    Args:
        program: Changed in place.
        norm: From `norms_with_gain`.

    Returns:
        The gain as it was, in float64, one number for each factor.
    """
    gain = _gain(program, norm)
    place, *biases = [place for place in norm.places if not place.reads]
    moves = [bias.tensor for bias in _moving(program, norm)]
    # A gain of 0 cannot be divided out of a bias that stays: such channels keep both.
    kept = torch.zeros_like(gain, dtype=torch.bool)
    for bias in biases:
        if bias.tensor not in moves:
            kept |= (gain == 0) & (_vector(program, bias) != 0)
    factors = torch.where(kept, 1.0, gain)
    for bias in biases:
        values = _vector(program, bias)
        if bias.tensor in moves:
            for site in _readers(program, norm):
                assert site is not None
                _add_to_bias(program, site, norm, values)
            values = torch.zeros_like(values)
        _write(program, bias, torch.where(factors == 0, values, values / torch.where(factors == 0, 1.0, factors)))
    _write(program, place, torch.where(kept, gain, 1.0))
    for one in norm.places:
        if one.reads:
            tensor = program.tensor(one.tensor).detach()
            taken = scaled(tensor.double(), replace(one, reads=False), factors)
            program.write_tensor(one.tensor, taken.to(tensor.dtype))
    return gain


def _readers(program: Program, norm: ScaleGroup) -> list[Site | None]:
    by_weight = {site.weight: site for site in program.sites()}
    return [by_weight.get(place.tensor) for place in norm.places if place.reads]


def _moving(program: Program, norm: ScaleGroup) -> list[ChannelPlace]:
    """The norm's biases that its readers can take up."""
    _, *biases = [place for place in norm.places if not place.reads]
    return biases if biases and all(_takes_bias(site, program) for site in _readers(program, norm)) else []


def _takes_bias(site: Site | None, program: Program) -> bool:
    """Whether a layer has a bias of its own that can take up a constant input."""
    if site is None or site.bias is None or site.layout not in ("linear", "conv1d_hf"):
        return False
    return len([other for other in program.sites() if other.bias == site.bias]) == 1 and len(site.nodes) == 1


def _add_to_bias(program: Program, site: Site, norm: ScaleGroup, values: Tensor) -> None:
    place = next(place for place in norm.places if place.reads and place.tensor == site.weight)
    constant = torch.zeros(site.in_features, dtype=torch.float64)
    constant[torch.from_numpy(place.positions.reshape(-1))] = values.repeat_interleave(place.positions.shape[1])
    assert site.bias is not None
    bias = program.tensor(site.bias).detach()
    weight = site.to_matrix(masked_weight(program, site.weight)).double()
    program.write_tensor(site.bias, (bias.double() + weight @ constant).to(bias.dtype))


def _write(program: Program, place: ChannelPlace, values: Tensor) -> None:
    tensor = program.tensor(place.tensor).detach()
    flat = tensor.double().reshape(-1).clone()
    flat[torch.from_numpy(place.positions[:, 0])] = values - place.offset
    program.write_tensor(place.tensor, flat.reshape(tensor.shape).to(tensor.dtype))
