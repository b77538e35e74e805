"""The packed form of a 2:4 weight as it is stored: its kept values, and two bits for the place of each.

It is plain, values in order and codes in order, four to a byte, and depends on no processor. What kernels read is made of it on
load (`laid_out.py`).

Tensor shapes: O rows, I columns, K kept values of a row (I / 2), G groups of columns that share a scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsepass.graph.rounding import RoundingGrid, num_groups, round_to_nearest
from sparsepass.graph.support import SparsepassError

Values = Literal["bf16", "fp16", "int8", "int4"]

FLOATS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CHUNK = 1 << 22  # weights that are worked on at once: what is made in between stays far below an 8B model's layer


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A 2:4 weight without its zeros, as it is stored.

    Attributes:
        values: Kind of the values.
        shape: Rows and columns.
        kept: The kept values in order: ``[O, K]`` of the floating type or int8; for int4 ``[O, K / 2]`` of uint8, two to a
            byte, the first one in the low half, each plus 8.
        codes: Place of each kept value in its group of four: ``[O, K / 4]`` of uint8, four to a byte, the first one lowest.
        scales: ``[O, G]`` bfloat16; None for floating values.
        group_size: Columns that share a scale, the last ones of a row maybe fewer; 0 if all of a row do, or none.
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


def pack(weight_OI: Tensor, *, values: Values = "bf16", group_size: int = 0, scales: Tensor | None = None) -> PackedWeight:
    """Pack a weight whose groups of four have at most two values that are not zero.

    Args:
        weight_OI: The weight with its zeros, ``[O, I]``, I a multiple of 8.
        values: What values are stored as. Integers are rounded to the nearest.
        group_size: Columns that share a scale, 0 for all of a row. Integers only: 16, 32, 64 or a multiple of 128, since
            kernels work on 128 columns at once.
        scales: ``[O, G]`` scales of integers. By default each is the least bfloat16 that does not clip its group.

    Returns:
        The packed weight. Floating values of the weight's own type are kept bit for bit (-0.0 becomes 0.0).

    Raises:
        SparsepassError: If the weight is not 2:4, its columns or the scales do not fit, or a value is not finite or overflows.

    Example:
        >>> packed = pack(torch.tensor([[0, 3.0, 0, 4, 5, 0, 0, 6]]), values="bf16")
        >>> unpack(packed)
        tensor([[0., 3., 0., 4., 5., 0., 0., 6.]], dtype=torch.bfloat16)
        >>> packed.num_bytes
        9
    """
    if weight_OI.dim() != 2:
        raise SparsepassError(f"packing takes a weight of two axes, and this one has the shape {list(weight_OI.shape)}")
    rows, columns = weight_OI.shape
    check_form(values, columns, group_size)
    form = stored_form(values, rows, columns, group_size).get("scales")
    if scales is not None and (form is None or tuple(scales.shape) != form[0]):
        wanted = f"of {values} are {list(form[0])}" if form else f"are not for {values}"
        raise SparsepassError(f"scales of a weight {rows} x {columns} {wanted}, and these are {list(scales.shape)}")
    kept_parts, codes_parts, scales_parts = [], [], []
    for first, last in chunks(rows, columns):
        kept_OK, codes = _kept_and_codes(weight_OI[first:last].detach().contiguous(), first)
        codes_parts.append(codes)
        if values in FLOATS:
            kept_parts.append(_cast(kept_OK, values))
        else:
            given = None if scales is None else scales[first:last]
            kept, scales_OG = _round(kept_OK.float(), values, (group_size or columns) // 2, given)
            kept_parts.append(kept)
            scales_parts.append(scales_OG)
    return PackedWeight(
        values=values,
        shape=(rows, columns),
        kept=torch.cat(kept_parts),
        codes=torch.cat(codes_parts),
        scales=torch.cat(scales_parts) if scales_parts else None,
        group_size=group_size,
    )


def unpack(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Give the weight back with its zeros.

    Args:
        packed: The packed weight.
        dtype: Type of the result; by default the floating type of the values, and float32 for integers.

    Returns:
        ``[O, I]``.

    Raises:
        SparsepassError: If the codes of a group are equal or descend, or sizes do not fit.

    Example:
        >>> weight = torch.tensor([[0, 3.0, 0, -3, 1, 0, 0, 2]])
        >>> unpack(pack(weight, values="int8"))  # 3 / 127, rounded up to bfloat16, is a step
        tensor([[ 0.0000,  3.0076,  0.0000, -3.0076,  0.9946,  0.0000,  0.0000,  1.9893]])
    """
    check(packed)
    rows, columns = packed.shape
    dtype = dtype or FLOATS.get(packed.values, torch.float32)
    weight_OI = torch.empty(rows, columns, dtype=dtype, device=packed.kept.device)
    for first, last in chunks(rows, columns):
        scales = None if packed.scales is None else packed.scales[first:last]
        weight_OI[first:last] = with_zeros(
            packed.values, packed.kept[first:last], packed.codes[first:last], scales, packed.group_size, dtype
        )
    return weight_OI


def with_zeros(values: str, kept: Tensor, codes: Tensor, scales: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """Some rows of a weight, with their zeros, scaled.

    Args:
        values: Kind of the values.
        kept: As in `PackedWeight`.
        codes: As in `PackedWeight`; they have to ascend.
        scales: As in `PackedWeight`.
        group_size: As in `PackedWeight`.
        dtype: Type of the result; integers times scales are computed in float32.

    Returns:
        ``[O, I]``.
    """
    rows, columns = codes.shape[0], codes.shape[1] * 8
    numbers_OK = kept if values != "int4" else torch.stack((kept & 15, kept >> 4), dim=-1).flatten(1).to(torch.int8) - 8
    if scales is not None:
        per_value = scales.float().repeat_interleave((group_size or columns) // 2, dim=1)[:, : columns // 2]
        numbers_OK = numbers_OK.float() * per_value
    is_kept_OI = _masks(codes.device)[codes.int()].view(rows, columns)
    return torch.zeros(rows, columns, dtype=dtype, device=codes.device).masked_scatter_(is_kept_OI, numbers_OK.to(dtype))


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round a dense weight to bytes, with a scale for each row that clips nothing.

    Returns:
        ``[O, I]`` int8 and ``[O, 1]`` bfloat16.

    Raises:
        SparsepassError: If a value is not finite.
    """
    if not weight_OI.isfinite().all():
        raise SparsepassError("the weight holds values that are not finite; the checkpoint is broken")
    columns = weight_OI.shape[1]
    parts = [_round(weight_OI[first:last].detach().float(), "int8", columns, None) for first, last in chunks(*weight_OI.shape)]
    return torch.cat([numbers for numbers, _ in parts]), torch.cat([scales for _, scales in parts])


def check(packed: PackedWeight, name: str = "the packed weight") -> None:
    """Refuse what no weight packs to, before a kernel reads it.

    Args:
        packed: The packed weight.
        name: What it is called in a message.

    Raises:
        SparsepassError: If sizes, types, scales or codes do not fit.
    """
    check_sizes(packed, name)
    check_codes(packed.codes, name)


def check_sizes(packed: PackedWeight, name: str) -> None:
    """Refuse sizes and types that do not fit, and scales that are not finite.

    Raises:
        SparsepassError: If there are such.
    """
    rows, columns = packed.shape
    check_form(packed.values, columns, packed.group_size, name)
    expected = stored_form(packed.values, rows, columns, packed.group_size)
    if (packed.scales is None) != ("scales" not in expected):
        found_some = "none" if packed.scales is None else "some"
        raise SparsepassError(f"{name}: scales belong to integers, and {packed.values} has {found_some}")
    for part, (shape, dtype) in expected.items():
        found: Tensor = getattr(packed, part)
        if tuple(found.shape) != shape or found.dtype != dtype:
            raise SparsepassError(
                f"{name}: {part} of {rows} x {columns} values of {packed.values} has to be {list(shape)} of {dtype}, and is "
                f"{list(found.shape)} of {found.dtype}; the file is damaged, or its configuration is another one's"
            )
    if packed.scales is not None and not packed.scales.isfinite().all():
        raise SparsepassError(f"{name}: a scale is not finite; the file is damaged")


def check_codes(codes: Tensor, name: str) -> None:
    """Refuse codes that do not ascend in each group of four.

    Raises:
        SparsepassError: If there are such.
    """
    first, second = codes & 0b0011_0011, codes >> 2 & 0b0011_0011
    ascends = ((first & 3) < (second & 3)) & ((first >> 4) < (second >> 4))
    if not ascends.all():
        row, byte = (~ascends).nonzero()[0].tolist()
        raise bad_codes(name, row, 8 * byte)


def bad_codes(name: str, row: int, column: int) -> SparsepassError:
    """The error for codes that do not ascend."""
    return SparsepassError(f"{name}: the codes of row {row} near column {column} do not ascend; the file is damaged")


def check_form(values: str, columns: int, group_size: int, name: str = "packing") -> None:
    """Refuse kinds, columns and groups that no kernel knows.

    Raises:
        SparsepassError: If they do not fit.
    """
    if values not in get_args(Values):
        raise SparsepassError(f"{name}: values are one of {', '.join(get_args(Values))}, not {values!r}")
    if columns % 8 or columns <= 0:
        raise SparsepassError(f"{name} takes a multiple of 8 columns, and this weight has {columns}")
    if values in FLOATS and group_size:
        raise SparsepassError(f"{name}: {values} has no scales; leave group_size out")
    if group_size < 0 or (group_size % 128 and group_size not in (16, 32, 64)):
        raise SparsepassError(
            f"{name}: group_size is 16, 32, 64 or a multiple of 128, or 0 for one scale a row; it is {group_size}"
        )


def stored_form(values: str, rows: int, columns: int, group_size: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and type of each stored tensor.

    Example:
        >>> stored_form("int4", 2, 256, 128)["scales"]
        ((2, 2), torch.bfloat16)
    """
    form = {
        "kept": ((rows, columns // (4 if values == "int4" else 2)), FLOATS.get(values, torch.int8)),
        "codes": ((rows, columns // 8), torch.uint8),
    }
    if values == "int4":
        form["kept"] = (form["kept"][0], torch.uint8)
    if values not in FLOATS:
        form["scales"] = ((rows, num_groups(columns, group_size)), torch.bfloat16)
    return form


def chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last of rows that are worked on at once; one empty piece for no rows."""
    step = max(1, _CHUNK // max(1, columns))
    for first in range(0, max(rows, 1), step):
        yield first, min(rows, first + step)


def _kept_and_codes(weight_OI: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """The kept values ``[O, K]`` and their codes ``[O, K / 4]``."""
    rows, columns = weight_OI.shape
    if not weight_OI.isfinite().all():
        raise SparsepassError("the weight holds values that are not finite; the checkpoint is broken")
    is_filled = (weight_OI != 0).view(torch.uint8).view(rows, columns // 4, 4)
    # The four bits of a group, as a number.
    groups_OG = is_filled[..., 0] | is_filled[..., 1] << 1 | is_filled[..., 2] << 2 | is_filled[..., 3] << 3
    codes_of, kept_of = _tables(weight_OI.device)
    codes_OG = codes_of[groups_OG.int()]
    if (codes_OG == _NOT_2_4).any():
        row, group = (codes_OG == _NOT_2_4).nonzero()[0].tolist()
        raise SparsepassError(
            f"the weight is not 2:4: columns {4 * group} to {4 * group + 3} of row {first_row + row} hold more than two "
            "values; prune it first"
        )
    kept_OK = weight_OI.masked_select(kept_of[groups_OG.int()].view(rows, columns)).view(rows, columns // 2)
    return kept_OK + 0.0, codes_OG[:, 0::2] | codes_OG[:, 1::2] << 4


def _cast(kept_OK: Tensor, values: Values) -> Tensor:
    kept = kept_OK.to(FLOATS[values])
    if not kept.isfinite().all():
        raise SparsepassError(f"a value is too large for {values}; the largest is {float(kept_OK.abs().max()):g}")
    return kept


def _round(kept_OK: Tensor, values: Values, size: int, scales_OG: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers ``[O, K]`` (int4: two to a byte) and their scales ``[O, G]``, one for each `size` values."""
    rounded = round_to_nearest(kept_OK, RoundingGrid(bits=8 if values == "int8" else 4, group_size=size), scales_OG)
    numbers_OK = rounded.numbers_OI
    if values == "int8":
        return numbers_OK, rounded.scales_OG
    nibbles_OK = (numbers_OK + 8).to(torch.uint8)
    return nibbles_OK[:, 0::2] | nibbles_OK[:, 1::2] << 4, rounded.scales_OG


_NOT_2_4 = 255


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each pattern of four filled places: its codes, the second above the first, and which places are kept.

    Where fewer than two are filled, the first free places are kept too.
    """
    codes, kept = [_NOT_2_4] * 16, [[False] * 4 for _ in range(16)]
    for pattern in range(16):
        filled = [place for place in range(4) if pattern >> place & 1]
        if len(filled) <= 2:
            first, second = sorted((filled + [place for place in range(4) if place not in filled])[:2])
            codes[pattern] = first | second << 2
            kept[pattern][first] = kept[pattern][second] = True
    return torch.tensor(codes, dtype=torch.uint8, device=device), torch.tensor(kept, device=device)


@cache
def _masks(device: torch.device) -> Tensor:
    """For each byte of codes, ``[256, 8]``: which of its eight columns are kept."""
    columns = torch.zeros(256, 8, dtype=torch.bool)
    for byte in range(256):
        for value in range(4):
            columns[byte, value // 2 * 4 + (byte >> 2 * value & 3)] = True
    return columns.to(device)
