"""Masks while a program is trained: they move with the dense weights and are refreshed now and then, or they are learned.

A mask that moves keeps the N weights of largest magnitude of every M. A learned one (MaskLLM) is drawn softly at each step; the
program holds the hard one.

Everything here works on what a process holds of a tensor: of a sharded one its own shard, which holds whole groups.

Shape suffixes: a weight as a matrix has O rows and I columns. Its N:M groups lie along a row: G groups, each of M entries.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.soft_masks import Draw, hard_mask, kept_norm, largest_probabilities, noise_key
from sparsepass.passes.maths import NMPattern, keep_largest_of_groups, num_violations
from sparsepass.retrain.run import local, local_box

DECIDED = 0.99
"""A group whose mask is learned counts as decided when its largest probability is above this."""

# Weights per piece: on a processor, what a piece needs should fit in its cache; on a GPU it bounds the memory.
_CPU_PIECE, _GPU_PIECE = 1 << 18, 1 << 26


@dataclass(frozen=True, kw_only=True)
class MaskedSite:
    """A sparse weight in training.

    Attributes:
        site: What it is in the graph.
        pattern: Its N:M pattern.
        weight: The dense weight, trained as a whole.
        mask: True where it is kept; shaped and sharded like the weight. A learned mask is the hard one of its logits, as of the
            last refresh.
        moves: Whether a refresh makes a new mask.
    """

    site: Site
    pattern: NMPattern
    weight: Tensor
    mask: Tensor
    moves: bool = True


@dataclass(frozen=True, kw_only=True)
class LearnedSite(MaskedSite):
    """A weight that stays as it is while its mask is learned.

    Attributes:
        logits: Of each group's candidate masks: what is trained. Sharded by rows, as the weight is.
        control: What the forward pass reads: scale, temperature and key of the noise.
    """

    logits: Tensor
    control: Tensor


class Flips(NamedTuple):
    """How many entries of a mask changed.

    Attributes:
        since_last: Entries that the last refresh changed.
        since_first: Entries that differ from the mask at the start.
        num_entries: Entries in all.
    """

    since_last: int
    since_first: int
    num_entries: int


class Settled(NamedTuple):
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


class MovingMasks:
    """The masks of all sites, refreshed together. Final.

    The mask at the start is remembered in one bit an entry.

    Args:
        sites: By weight name.
    """

    def __init__(self, sites: Mapping[str, MaskedSite]) -> None:
        self.sites = dict(sites)
        self.first: dict[str, Tensor] = {name: pack(local(known.mask)) for name, known in self.sites.items()}

    @property
    def are_sharded(self) -> bool:
        """Whether each process holds a part of the masks only."""
        return any(isinstance(known.mask, DTensor) for known in self.sites.values())

    @torch.no_grad()
    def refresh(self) -> dict[str, Flips]:
        """Set every mask to the N:M of largest magnitude of its weight, or of its largest logits; ties go to the lowest index.

        Returns:
            The flips of each site, counted in this process's shards.

        Source: AST, arXiv 2407.20584, section 3; MaskLLM, arXiv 2409.17481, section 3.
        """
        return {name: _refresh(known, self.first[name]) for name, known in self.sites.items()}

    @torch.no_grad()
    def check(self) -> None:
        """Make sure that every mask is N:M.

        Raises:
            SparsepassError: One is not; the training has a defect.
        """
        for name, known in self.sites.items():
            matrix_OI = known.site.to_matrix(local(known.mask))
            broken = num_violations(matrix_OI, known.pattern)
            if broken:
                raise SparsepassError(
                    f"the mask of {name} breaks {known.pattern} in {broken} groups; the checkpoint was not written. This is a "
                    "defect of the training, please report it with the configuration"
                )


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
            found.append(Settled(decided, groups, kept, whole))
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


def magnitude_mask(weight_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Keep the N weights of largest magnitude in every M along the last axis; ties go to the lowest index.

    Shapes: ``[..., I]`` to a bool ``[..., I]``.

    Args:
        weight_OI: Weights without NaN.
        pattern: How many to keep of each group.

    >>> magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 2.0]]), NMPattern(2, 4))
    tensor([[False,  True,  True, False]])
    """
    return keep_largest_of_groups(weight_OI.abs(), pattern)


def put_behind(weight_OI: Tensor, mask_OI: Tensor, behind: "str | float", pattern: NMPattern) -> Tensor:
    """Choose what stands behind the mask when training starts.

    A moving mask is the magnitude of the dense weights, so what stands there decides whether a masked weight can come back,
    and whether the first refresh throws a criterion's mask away.

    Shapes: ``[..., I]``, unchanged.

    Args:
        weight_OI: Weights, those behind the mask included.
        mask_OI: True where kept.
        behind: ``original``: as they are; ``zeros``; ``clipped``: as they are, but not larger than the smallest kept weight
            of their group (a hair below it, so that the first refresh keeps the mask); or a factor for them.
        pattern: Groups.

    Returns:
        New weights; the kept ones are untouched.

    >>> weight, mask = torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor([[False, True, False, True]])
    >>> [round(x, 3) for x in put_behind(weight, mask, "clipped", NMPattern(2, 4))[0].tolist()]
    [0.495, -3.0, 0.495, 0.5]
    >>> put_behind(weight, mask, 0.5, NMPattern(2, 4)).tolist()
    [[0.5, -3.0, 1.0, 0.5]]
    """
    if behind == "original":
        return weight_OI.clone()
    if behind == "zeros":
        return weight_OI.masked_fill(~mask_OI, 0)
    if behind == "clipped":
        size_OGM = torch.unflatten(weight_OI.abs(), -1, (-1, pattern.m))
        kept_OGM = torch.unflatten(mask_OI, -1, (-1, pattern.m))
        smallest_OG1 = size_OGM.masked_fill(~kept_OGM, float("inf")).amin(-1, keepdim=True)
        limit_OI = (0.99 * smallest_OG1).expand_as(size_OGM).flatten(-2)
        return torch.where(mask_OI, weight_OI, weight_OI.clamp(-limit_OI, limit_OI))
    return torch.where(mask_OI, weight_OI, weight_OI * float(behind))


def row_pieces(*tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Cut tensors of one shape into rows that fit in the cache together.

    Yields:
        A slice of the first axis, and these rows of each tensor.

    >>> [(rows, piece.shape) for rows, piece in row_pieces(torch.ones(3, 8))]
    [(slice(0, 32768, None), torch.Size([3, 8]))]
    """
    first = tensors[0]
    limit = _GPU_PIECE if first.is_cuda else _CPU_PIECE
    size = max(1, limit // max(1, first[0].numel())) if len(first) else 1
    for start in range(0, len(first), size):
        rows = slice(start, start + size)
        yield rows, *(tensor[rows] for tensor in tensors)


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into one bit an entry, zero bits at the end.

    >>> pack(torch.tensor([True, False, False, True])).tolist()
    [9]
    """
    bits = mask.reshape(-1).view(torch.uint8)
    if bits.numel() % 8 or bits.storage_offset() % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    # Eight bytes are read as one integer. The product moves bit 8 i, that of byte i, to bit 56 + i; no two bits meet there.
    packed = bits.view(torch.int64) * sum(1 << 56 - 7 * place for place in range(8))
    return packed.bitwise_right_shift_(56).bitwise_and_(0xFF).to(torch.uint8)


def _refresh(known: MaskedSite, first: Tensor) -> Flips:
    weight, mask = local(known.weight), local(known.mask)
    if not known.moves:
        return Flips(0, 0, mask.numel())
    before = pack(mask)
    if isinstance(known, LearnedSite):
        kept = hard_mask(local(known.logits), known.pattern.n, known.pattern.m)
        mask.movedim(known.site.nm_axis, -1).copy_(kept)
    else:
        weight_OI, mask_OI = known.site.to_matrix(weight), known.site.to_matrix(mask)
        for _, weight_piece, mask_piece in row_pieces(weight_OI, mask_OI):
            mask_piece.copy_(magnitude_mask(weight_piece, known.pattern))
        if mask_OI.data_ptr() != mask.data_ptr():  # a convolution's matrix is a copy
            mask.copy_(known.site.from_matrix(mask_OI))
    now = pack(mask)
    return Flips(int(_count_bits(now ^ before)), int(_count_bits(now ^ first)), mask.numel())


@torch.no_grad()
def _write(control: Tensor, scale: float, temperature: float, key: int) -> None:
    control.copy_(torch.tensor([scale, temperature, key], dtype=torch.float64))


def _count_bits(packed: Tensor) -> Tensor:
    # The usual sums of neighbours: pairs, nibbles, bytes.
    packed = packed - ((packed >> 1) & 0x55)
    packed = (packed & 0x33) + ((packed >> 2) & 0x33)
    return ((packed + (packed >> 4)) & 0x0F).sum(dtype=torch.int64)
