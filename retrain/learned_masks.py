"""Masks that are learned (MaskLLM): how they are drawn at each step, the norm that is rewarded, and how settled they are.

Everything here works on what a process holds of the logits and weights: of sharded ones its own shard, whole rows.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.soft_masks import Draw, kept_norm, largest_probabilities, noise_key
from sparsepass.passes.maths import NMPattern
from sparsepass.retrain.masks import local
from sparsepass.retrain.run import local_box

DECIDED = 0.99
"""A group counts as decided when its largest probability is above this."""


@dataclass(frozen=True, kw_only=True)
class LearnedSite:
    """A weight whose mask is being learned.

    Attributes:
        site: What it is in the graph.
        pattern: Its N:M pattern.
        weight: The weight, which stays as it is.
        mask: The hard mask of the logits, as of the last refresh.
        logits: What is trained.
        control: What the forward pass reads: scale, temperature and key of the noise.
    """

    site: Site
    pattern: NMPattern
    weight: Tensor
    mask: Tensor
    logits: Tensor
    control: Tensor


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How far masks have settled, in sums, so that those of shards and layers add up.

    Attributes:
        num_decided: Groups whose largest probability is above `DECIDED`.
        num_groups: Groups in all.
        kept: Squared norm of the weights that the hard masks keep.
        whole: Squared norm of all weights.
    """

    num_decided: float
    num_groups: float
    kept: float
    whole: float


class LearnedMasks:
    """All masks that are learned in a run. Final.

    Args:
        sites: By weight name; empty for other methods.
        seed: Of the noise.
    """

    def __init__(self, sites: Mapping[str, LearnedSite], *, seed: int) -> None:
        self.sites = dict(sites)
        self._seed = seed
        self._draws: dict[str, Draw] = {}

    @torch.no_grad()
    def draw(self, step: int, *, scale: float, temperature: float) -> None:
        """Let the forward passes of a step draw soft masks. Noise is a function of seed, step, weight name and place alone.

        Args:
            step: 0 for the first step.
            scale: ``kappa``.
            temperature: ``tau``.
        """
        for name, known in self.sites.items():
            key = noise_key(self._seed, step, zlib.crc32(name.encode()))
            self._draws[name] = Draw(scale=scale, temperature=temperature, key=key)
            _write(known.control, scale, temperature, key)

    @contextlib.contextmanager
    def hard(self) -> Iterator[None]:
        """Let forward passes use the hard masks."""
        for known in self.sites.values():
            _write(known.control, 1.0, 0.0, 0)
        try:
            yield
        finally:
            for name, found in self._draws.items():
                _write(self.sites[name].control, found.scale, found.temperature, found.key)

    @torch.no_grad()
    def reward_norm(self, factor: float) -> None:
        """Add the gradient of ``- factor * sum ||W .* soft mask||^2`` to those of the logits.

        Once a step, after the backward passes: the soft masks are those of the step, drawn again.

        Source: MaskLLM, arXiv 2409.17481, section 3.
        """
        for name, known in self.sites.items():
            if factor and known.logits.grad is not None:
                weight, logits = local(known.weight).movedim(known.site.nm_axis, -1), local(known.logits)
                rows_before = local_box(known.logits).start[0] * math.prod(logits.shape[1:-2])
                found = replace(self._draws[name], first_row=rows_before)
                kept_norm(weight, logits, known.pattern.n, known.pattern.m, found, local(known.logits.grad), -factor)

    @torch.no_grad()
    def settled(self) -> list[Settled]:
        """How far each site's masks have settled, in this process's shards; norms are of the hard masks."""
        found = []
        for name, known in self.sites.items():
            weight, mask = local(known.weight), local(known.mask)
            scale = self._draws[name].scale if name in self._draws else 1.0
            decided, groups = largest_probabilities(local(known.logits), scale, DECIDED)
            squares = weight.square()
            whole = float(squares.sum(dtype=torch.float64))
            kept = float(squares.mul_(mask).sum(dtype=torch.float64))
            found.append(Settled(num_decided=decided, num_groups=groups, kept=kept, whole=whole))
        return found


def check_method(program: Program, method: str) -> None:
    """Make sure that masks are learned where the method learns masks, and nowhere else.

    Raises:
        SparsepassError: If they are not.
    """
    learned = [weight for weight, state in program.sparse.items() if state.learned is not None]
    if method != "maskllm":
        if learned:
            raise SparsepassError(
                f"the program's masks are to be learned (learn_masks, {len(learned)} weights), and method: {method} trains "
                "weights; use method: maskllm, or leave learn_masks out of the passes"
            )
        return
    if not learned:
        raise SparsepassError("method: maskllm learns masks, and the program has no logits to learn; apply learn_masks first")
    if branches := [weight for weight, state in program.sparse.items() if state.branch is not None]:
        raise SparsepassError(
            f"{branches[0]} has a SLoRB branch, and method: maskllm trains nothing but masks; add slorb when they are learned"
        )


@torch.no_grad()
def _write(control: Tensor, scale: float, temperature: float, key: int) -> None:
    control.copy_(torch.tensor([scale, temperature, key], dtype=torch.float64))
