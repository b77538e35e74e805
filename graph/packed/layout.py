"""The packed form of a 2:4 weight: its kept values, and two bits for the place of each.

Two layouts hold the same:

- The *stored* one, in files, is plain: values in order, codes in order, four to a byte. It depends on no processor.
- The *arranged* one, in memory, is what a kernel reads from front to back (`kernels.cpp` has the table of it). It is made on load.

Tensor shapes: O rows, I columns, K kept values of a row (I / 2), G groups of columns that share a scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.support import SparsepassError

Values = Literal["bf16", "fp16", "int8", "int4"]

FLOATS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST = {"int8": 127, "int4": 7}


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A 2:4 weight without its zeros, as it is stored.

    Attributes:
        values: Kind of the values.
        shape: Rows and columns.
        kept: The kept values in order: ``[O, K]`` of the floating type or int8; for int4 ``[O, K / 2]`` of uint8, two to a byte,
            the first one in the low half, each plus 8.
        codes: Place of each kept value in its group of four: ``[O, K / 4]`` of uint8, four to a byte, the first one lowest.
        scales: ``[O, G]`` float32; None for floating values.
        group_size: Columns that share a scale, the last ones of a row maybe fewer; 0 for floating values.
    """

    values: Values
    shape: tuple[int, int]
    kept: Tensor
    codes: Tensor
    scales: Tensor | None = None
    group_size: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.kept, self.codes, self.scales) if t is not None)


def pack(weight_OI: Tensor, *, values: Values = "bf16", group_size: int = 0) -> PackedWeight:
    """Pack a weight whose groups of four have at most two values that are not zero.

    Args:
        weight_OI: The weight with its zeros, ``[O, I]``, I a multiple of 8.
        values: What values are stored as. Integers are rounded to the nearest, with the largest magnitude of a group as its end.
        group_size: Columns that share a scale, a multiple of 4; 0 for all of a row. Integers only.

    Returns:
        The packed weight. Floating values of the weight's own type are kept bit for bit (-0.0 becomes 0.0).

    Raises:
        SparsepassError: If the weight is not 2:4, its columns do not fit, or a value is not finite or overflows.

    Example:
        >>> packed = pack(torch.tensor([[0, 3.0, 0, 4, 5, 0, 0, 6]]), values="bf16")
        >>> unpack(packed)
        tensor([[0., 3., 0., 4., 5., 0., 0., 6.]], dtype=torch.bfloat16)
        >>> packed.num_bytes
        9
    """
    rows, columns = weight_OI.shape
    if columns % 8:
        raise SparsepassError(f"packing takes a multiple of 8 columns, and this weight has {columns}")
    if not weight_OI.isfinite().all():
        raise SparsepassError("the weight holds values that are not finite; the checkpoint is broken")
    groups_OG4 = weight_OI.reshape(rows, columns // 4, 4)
    if (too_many := (groups_OG4 != 0).sum(-1) > 2).any():
        row, group = too_many.nonzero()[0].tolist()
        raise SparsepassError(
            f"the weight is not 2:4: columns {4 * group} to {4 * group + 3} of row {row} hold more than two values; prune it first"
        )
    codes_OK = _codes(groups_OG4 != 0)
    kept_OK = groups_OG4.gather(-1, codes_OK.view(rows, -1, 2)).reshape(rows, -1) + 0.0
    codes = in_bytes(codes_OK, bits=2)
    if values in FLOATS:
        kept = kept_OK.to(FLOATS[values])
        if not kept.isfinite().all():
            raise SparsepassError(f"a value is too large for {values}; the largest is {float(kept_OK.abs().max()):g}")
        return PackedWeight(values=values, shape=(rows, columns), kept=kept, codes=codes)
    size = group_size or columns
    if size % 4:
        raise SparsepassError(f"a scale is shared by a multiple of 4 columns, and group_size is {size}")
    grouped_OGK = functional.pad(kept_OK.float(), (0, -kept_OK.shape[1] % (size // 2))).unflatten(-1, (-1, size // 2))
    scales_OG = grouped_OGK.abs().amax(-1) / _LARGEST[values]
    steps_OGK = grouped_OGK / scales_OG.where(scales_OG > 0, 1.0)[..., None]
    rounded_OK = steps_OGK.round().flatten(-2)[:, : kept_OK.shape[1]]
    kept = rounded_OK.to(torch.int8) if values == "int8" else in_bytes((rounded_OK + 8).to(torch.int64), bits=4)
    return PackedWeight(values=values, shape=(rows, columns), kept=kept, codes=codes, scales=scales_OG, group_size=size)


def unpack(packed: PackedWeight) -> Tensor:
    """Give the weight back with its zeros: in its floating type, and float32 for integers.

    Returns:
        ``[O, I]``.

    Raises:
        SparsepassError: If the codes of a group are equal or descend, or sizes do not fit.
    """
    check(packed)
    rows, columns = packed.shape
    codes_OG2 = out_of_bytes(packed.codes, bits=2).view(rows, columns // 4, 2)
    kept_OK = numbers(packed)
    if packed.scales is not None:
        kept_OK = kept_OK.float() * packed.scales.repeat_interleave(packed.group_size // 2, dim=1)[:, : kept_OK.shape[1]]
    groups_OG4 = kept_OK.new_zeros(rows, columns // 4, 4).scatter_(-1, codes_OG2, kept_OK.view(rows, -1, 2))
    return groups_OG4.view(rows, columns)


def check(packed: PackedWeight) -> None:
    """Refuse what no weight packs to, before a kernel reads it.

    Raises:
        SparsepassError: If sizes, types or codes do not fit.
    """
    rows, columns = packed.shape
    per_byte = 2 if packed.values == "int4" else 1
    expected = {"kept": (rows, columns // 2 // per_byte), "codes": (rows, columns // 8)}
    for name, shape in expected.items():
        found = getattr(packed, name)
        if tuple(found.shape) != shape:
            raise SparsepassError(f"{name} of a packed weight {rows} x {columns} has to be {list(shape)}, and is {list(found.shape)}")
    dtype = FLOATS.get(packed.values, torch.int8 if packed.values == "int8" else torch.uint8)
    if packed.kept.dtype != dtype or packed.codes.dtype != torch.uint8:
        raise SparsepassError(f"{packed.values} is stored as {dtype} with codes of torch.uint8, not {packed.kept.dtype} and {packed.codes.dtype}")
    if (packed.scales is None) != (packed.values in FLOATS):
        raise SparsepassError(f"scales belong to integers, and {packed.values} has {'none' if packed.scales is None else 'some'}")
    if packed.scales is not None and (packed.scales.shape[0] != rows or not packed.scales.isfinite().all()):
        raise SparsepassError(f"scales have to be finite, one row for each of {rows}, and are {list(packed.scales.shape)}")
    first, second = packed.codes & 0b0011_0011, packed.codes >> 2 & 0b0011_0011
    ascends = ((first & 3) < (second & 3)) & ((first >> 4) < (second >> 4))
    if not ascends.all():
        row, byte = (~ascends).nonzero()[0].tolist()
        raise SparsepassError(f"the codes of columns {8 * byte} to {8 * byte + 7} of row {row} do not ascend; the file is damaged")


def numbers(packed: PackedWeight) -> Tensor:
    """The kept values ``[O, K]`` without their scales: floating, or int8."""
    if packed.values != "int4":
        return packed.kept
    return (out_of_bytes(packed.kept, bits=4) - 8).to(torch.int8)


def _codes(is_kept_OG4: Tensor) -> Tensor:
    """Places of two values in each group: those that are not zero, and, where there are fewer, the first free ones."""
    # Taken in order: kept places first, then the others; the two first of them, in ascending order.
    order_OG4 = is_kept_OG4.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    return order_OG4[..., :2].sort(dim=-1).values.flatten(-2)


def in_bytes(numbers_OK: Tensor, *, bits: int) -> Tensor:
    """Small numbers, as many to a byte as fit, the first one lowest."""
    per_byte = 8 // bits
    shifts = bits * torch.arange(per_byte, device=numbers_OK.device)
    return (numbers_OK.long().unflatten(-1, (-1, per_byte)) << shifts).sum(-1).to(torch.uint8)


def out_of_bytes(bytes_OB: Tensor, *, bits: int) -> Tensor:
    shifts = bits * torch.arange(8 // bits, device=bytes_OB.device)
    return ((bytes_OB.long()[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
