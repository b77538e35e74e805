"""Masks as a file of their own."""

from sparsepass.passes.masks.differences import MaskDifference, compare_masks, describe
from sparsepass.passes.masks.pack import MaskPack, PackedMask, is_mask_pack, pack_program

__all__ = [
    "MaskDifference",
    "MaskPack",
    "PackedMask",
    "compare_masks",
    "describe",
    "is_mask_pack",
    "pack_program",
]
