"""How two mask packs differ, and what a pack holds."""

from dataclasses import dataclass
from typing import Any, final

from sparsepass.graph import SparsepassError
from sparsepass.passes.masks.pack import MaskPack


@final
@dataclass(frozen=True, kw_only=True)
class MaskDifference:
    """How the masks of one weight differ.

    Attributes:
        weight: Its name.
        num_entries: Entries of the mask.
        num_flipped: Entries that are kept by one and dropped by the other.
        num_kept: Entries that both keep, of those that the first keeps.
    """

    weight: str
    num_entries: int
    num_flipped: int
    num_kept: int

    @property
    def overlap(self) -> float:
        """Share of the first mask's kept entries that the second keeps too."""
        total = self.num_kept + self.num_flipped / 2
        return self.num_kept / total if total else 1.0


def compare_masks(first: MaskPack, second: MaskPack) -> list[MaskDifference]:
    """Count in which entries two packs differ, weight by weight.

    Raises:
        SparsepassError: If they are not masks of the same weights and patterns.
    """
    if (names := set(first.masks) ^ set(second.masks)) or not first.masks:
        raise SparsepassError(
            f"the packs hold masks of different weights, {sorted(names)[0] if names else 'none at all'} in one of them only; "
            "compare packs of one model, pruned with the same targets"
        )
    found = []
    for name, known in first.masks.items():
        other = second.masks[name]
        if (known.pattern, known.shape) != (other.pattern, other.shape):
            raise SparsepassError(
                f"{name} is {known.pattern} of shape {known.shape} in one pack and {other.pattern} of shape {other.shape} in "
                "the other; compare packs of one model"
            )
        a, b = known.mask(), other.mask()
        found.append(
            MaskDifference(weight=name, num_entries=a.numel(), num_flipped=int((a ^ b).sum()), num_kept=int((a & b).sum()))
        )
    return found


def describe(pack: MaskPack) -> dict[str, Any]:
    """What a pack holds, as JSON."""
    return {
        "model_class": pack.model_class,
        "recipe": pack.recipe,
        "about": pack.about,
        "num_masks": len(pack.masks),
        "num_weights": pack.num_weights,
        "patterns": sorted({known.pattern for known in pack.masks.values()}),
        "bits_per_weight": pack.bits_per_weight,
    }
