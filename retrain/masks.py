"""Masks that move while a program is trained: magnitude N:M of the dense weights, or learned; refreshed now and then.

Everything here works on what a process holds of a weight: of sharded ones its own shard, which holds whole groups.

Shape suffixes: O rows, I in, of the matrix that N:M runs along the last axis of.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sparsepass.graph import Site, SparsepassError
from sparsepass.graph.soft_masks import hard_mask
from sparsepass.passes.maths import NMPattern, keep_largest_of_groups, num_violations

# Weights per piece: on a processor, what a piece needs should fit in its cache; on a GPU it bounds the memory.
_CPU_PIECE, _GPU_PIECE = 1 << 18, 1 << 26


@dataclass(frozen=True, kw_only=True)
class MaskedSite:
    """A sparse weight in training.

    Attributes:
        site: What it is in the graph.
        pattern: Its N:M pattern.
        weight: The dense weight, trained as a whole.
        mask: True where it is kept; shaped and sharded like the weight.
        logits: Of each group's candidate masks, where the mask is learned; sharded by rows, as the weight is.
        moves: Whether a refresh makes a new mask.
    """

    site: Site
    pattern: NMPattern
    weight: Tensor
    mask: Tensor
    logits: Tensor | None = None
    moves: bool = True


@dataclass(frozen=True, kw_only=True)
class Flips:
    """How many entries of a mask changed.

    Attributes:
        since_last: Entries that the last refresh changed.
        since_first: Entries that differ from the mask at the start.
        num_entries: Entries in all.
    """

    since_last: int
    since_first: int
    num_entries: int

    def counts(self) -> tuple[int, int, int]:
        """All three, as processes add them up."""
        return self.since_last, self.since_first, self.num_entries


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
        return {name: Flips(**_refresh(known, self.first[name])) for name, known in self.sites.items()}

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


def _refresh(known: MaskedSite, first: Tensor) -> dict[str, int]:
    weight, mask = local(known.weight), local(known.mask)
    if not known.moves:
        return {"since_last": 0, "since_first": 0, "num_entries": mask.numel()}
    before = pack(mask)
    if known.logits is not None:
        kept = hard_mask(local(known.logits), known.pattern.n, known.pattern.m)
        mask.movedim(known.site.nm_axis, -1).copy_(kept)
    else:
        weight_OI, mask_OI = known.site.to_matrix(weight), known.site.to_matrix(mask)
        for weight_piece, mask_piece in _pieces(weight_OI, mask_OI):
            mask_piece.copy_(magnitude_mask(weight_piece, known.pattern))
        if mask_OI.data_ptr() != mask.data_ptr():  # a convolution's matrix is a copy
            mask.copy_(known.site.from_matrix(mask_OI))
    now = pack(mask)
    since_last, since_first = int(_count_bits(now ^ before)), int(_count_bits(now ^ first))
    return {"since_last": since_last, "since_first": since_first, "num_entries": mask.numel()}


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


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor as it is. Shares memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into one bit an entry, zero bits at the end.

    >>> pack(torch.tensor([True, False, False, True])).tolist()
    [9]
    """
    bits = mask.reshape(-1).view(torch.uint8)
    if bits.numel() % 8 or bits.storage_offset() % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    # One integer of eight bytes; the product moves bit 8 i, of byte i, to bit 56 + i, and lets nothing else meet there.
    packed = bits.view(torch.int64) * sum(1 << 56 - 7 * place for place in range(8))
    return packed.bitwise_right_shift_(56).bitwise_and_(0xFF).to(torch.uint8)


def _count_bits(packed: Tensor) -> Tensor:
    # The usual sums of neighbours: pairs, nibbles, bytes.
    packed = packed - ((packed >> 1) & 0x55)
    packed = (packed & 0x33) + ((packed >> 2) & 0x33)
    return ((packed + (packed >> 4)) & 0x0F).sum(dtype=torch.int64)


def _pieces(weight_OI: Tensor, mask_OI: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = weight_OI.shape[0]
    limit = _GPU_PIECE if weight_OI.is_cuda else _CPU_PIECE
    size = max(1, limit // max(1, weight_OI[0].numel())) if rows else 1
    for start in range(0, rows, size):
        yield weight_OI[start : start + size], mask_OI[start : start + size]
