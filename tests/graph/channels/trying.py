"""Tries at random on a program what its channel flow allows."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsepass.graph import Program
from sparsepass.graph.channels import ChannelFlow, ChannelPlace, permuted, rotated, scaled, uneven_gains, without


def changed(program: Program, flow: ChannelFlow, seed: int = 0) -> tuple[Program, Program]:
    """The program with random permutations, and with random factors, wherever the flow allows them."""
    random = np.random.default_rng(seed)
    moved, scaled_ = copy.deepcopy(program), copy.deepcopy(program)
    for group in flow.permutations:
        order = random.permutation(group.num_channels)
        for place in group.places:
            moved.set_tensor(place.tensor, permuted(moved.tensor(place.tensor).detach(), place, order))
    for factors in flow.scalings:
        values = torch.from_numpy(random.uniform(0.5, 2.0, factors.num_factors))
        if factors.positive is None:
            values *= torch.from_numpy(random.choice([-1.0, 1.0], factors.num_factors))
        for place in factors.places:
            scaled_.set_tensor(place.tensor, scaled(scaled_.tensor(place.tensor).detach(), place, values))
    return moved, scaled_


def turned(program: Program, flow: ChannelFlow, seed: int = 0) -> Program:
    """The program with random orthogonal matrices wherever the flow allows them, whatever gains hold."""
    moved = copy.deepcopy(program)
    for number, group in enumerate(flow.rotations):
        assert not uneven_gains(program, group)
        matrix = orthogonal(group.num_channels, seed + number, keeps_mean=group.keeps_mean)
        for place in group.places:
            stored = moved.tensor(place.tensor).detach()
            moved.set_tensor(place.tensor, rotated(stored.double(), place, matrix).to(stored.dtype))
    return moved


def orthogonal(size: int, seed: int, *, keeps_mean: bool) -> Tensor:
    """A random orthogonal matrix; one that has ones for a fixed point, if it keeps the mean."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size - keeps_mean, size - keeps_mean, generator=generator, dtype=torch.float64)
    free: Tensor = torch.linalg.qr(start).Q
    if not keeps_mean:
        return free
    start = torch.cat([torch.ones(size, 1), torch.randn(size, size - 1, generator=generator)], 1).double()
    basis: Tensor = torch.linalg.qr(start).Q
    one = torch.ones(1, 1, dtype=torch.float64)
    turned_: Tensor = basis @ torch.block_diag(one, free) @ basis.T
    return turned_


def with_even_gains(program: Program, flow: ChannelFlow) -> Program:
    """The program with one number for all channels in every gain that rotations ask it of."""
    even = copy.deepcopy(program)
    for place in [place for group in flow.rotations for place in group.gains]:
        even.set_tensor(place.tensor, torch.full_like(even.tensor(place.tensor).detach(), 0.7))
    return even


def cleared_and_cut(program: Program, flow: ChannelFlow, seed: int = 0) -> tuple[Program, Program]:
    """The program with a third of the channels zero that can be taken out, and with them taken out."""
    random = np.random.default_rng(seed)
    cleared, cut = copy.deepcopy(program), copy.deepcopy(program)
    gone: dict[str, list[tuple[ChannelPlace, NDArray[np.int64]]]] = {}
    for group in flow.removals:
        channels = random.permutation(group.num_channels)[: max(1, group.num_channels // 3)]
        for place in group.places:
            gone.setdefault(place.tensor, []).append((place, channels))
            if not place.reads:
                zeros = torch.from_numpy(place.positions[channels].reshape(-1))
                stored = cleared.tensor(place.tensor).detach().clone()
                cleared.set_tensor(place.tensor, stored.index_fill_(place.axes[0], zeros, -place.offset))
    for name, its in gone.items():
        cut.set_tensor(name, without(cleared.tensor(name).detach(), its))
    return cleared, cut


def distance(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest error, relative to the largest value of each tensor."""
    return max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(expected, found, strict=True)
        if a.is_floating_point()
    )


def largest_error(program: Program, flow: ChannelFlow, inputs: dict[str, Tensor]) -> float:
    """What changes at most by random permutations, factors, matrices and removals, in a program with one output."""
    with torch.no_grad():
        expected = [program(**inputs)]
        found = [distance(expected, [other(**inputs)]) for other in changed(program, flow)]
        even = with_even_gains(program, flow)
        found.append(distance([even(**inputs)], [turned(even, flow)(**inputs)]))
        cleared, cut = cleared_and_cut(program, flow)
        return max(*found, distance([cleared(**inputs)], [cut(**inputs)]))
