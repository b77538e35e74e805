"""Counting N:M groups on the raw bits of a stored weight, whatever its type.

A float is zero if all its bits but the sign are zero. So no type is converted: the stored bytes are viewed as unsigned
integers, the sign is masked off, and the rest is compared with zero, in pieces that fit the cache.
`sparsepass.passes.maths.pattern` does the same, more slowly, for torch tensors in memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Elements a step works on: its temporaries (1 to 8 bytes each) stay in the second-level cache.
_STEP_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class BitView:
    """A stored tensor as unsigned integers, one per element.

    Attributes:
        bits: The raw bits, in the stored shape.
        magnitude_mask: The bits that make a value differ from zero: all but the sign of a float.
        sign_bit: The bit pattern of -0.0; 0 for types without a negative zero.
    """

    bits: Array
    magnitude_mask: int
    sign_bit: int


@dataclass(frozen=True, kw_only=True)
class GroupCount:
    """What one pass over a weight found.

    Attributes:
        num_groups: Groups of M consecutive entries along the axis.
        num_violations: Groups with more than N nonzeros.
        first_violation: Index (in the stored tensor) of the first entry of the first such group, or None.
        num_nonzeros: Entries that are not zero (-0.0 is zero).
        num_negative_zeros: Entries that are -0.0.
    """

    num_groups: int
    num_violations: int
    first_violation: tuple[int, ...] | None
    num_nonzeros: int
    num_negative_zeros: int


def view_bits(data: Array, *, has_sign: bool, num_bits: int | None = None) -> BitView:
    """View an array as unsigned integers without copying it.

    Shapes:
        data: any; the result's bits have the same shape.

    Args:
        data: The array; any type of 1, 2, 4 or 8 bytes an element, also those of ml_dtypes.
        has_sign: The type is sign-magnitude (a float with a negative zero).
        num_bits: Bits that count when fewer than the element's own, for unpacked 4-bit and 6-bit types.

    Returns:
        The view.

    >>> view_bits(np.array([0.0, -0.0, 1.0], np.float16), has_sign=True).bits.tolist()
    [0, 32768, 15360]
    """
    bits = data.view(f"u{data.dtype.itemsize}")
    width = num_bits or 8 * data.dtype.itemsize
    full = (1 << width) - 1
    sign = 1 << (width - 1) if has_sign else 0
    return BitView(bits=bits, magnitude_mask=full & ~sign, sign_bit=sign)


def unpack_bits(packed: Array, num_bits: int) -> Array:
    """Unpack 1-, 2- or 4-bit integers, lowest bits first, along the last axis.

    Shapes:
        packed: [..., P] uint8; the result is [..., P * 8 / num_bits] uint8.

    >>> unpack_bits(np.array([0x21, 0x43], np.uint8), 4).tolist()
    [1, 2, 3, 4]
    """
    if num_bits == 8:
        return packed
    shifts = np.arange(0, 8, num_bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << num_bits) - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def count_groups(view: BitView, n: int, m: int, axis: int) -> GroupCount:
    """Count the groups of M along `axis` that hold more than N nonzeros.

    Args:
        view: The tensor's bits; any shape whose size along `axis` is a multiple of `m`.
        n: Nonzeros allowed.
        m: Group size.
        axis: Axis of the stored tensor along which groups run.

    Returns:
        The counts.

    >>> weight = np.array([[1.0, 0.0, -0.0, 2.0, 1.0, 2.0, 3.0, 0.0]], np.float32)
    >>> count = count_groups(view_bits(weight, has_sign=True), 2, 4, axis=1)
    >>> count.num_groups, count.num_violations, count.first_violation, count.num_negative_zeros
    (2, 1, (0, 4), 1)
    """
    shape = view.bits.shape
    num_violations = num_nonzeros = num_stored = position = 0
    first: int | None = None
    for piece, nonzero in _steps(view, m, axis):
        counts = _sum_groups(nonzero, m)
        bad = counts > n
        here = int(np.count_nonzero(bad))
        if here and first is None:
            first = position + int(np.argmax(bad))
        position += bad.size
        num_violations += here
        kept = int(np.count_nonzero(nonzero))
        num_nonzeros += kept
        num_stored += int(np.count_nonzero(piece)) if view.sign_bit else kept
    return GroupCount(
        num_groups=math.prod(shape) // m,
        num_violations=num_violations,
        first_violation=None if first is None else _group_index(first, shape, m, axis),
        num_nonzeros=num_nonzeros,
        num_negative_zeros=num_stored - num_nonzeros,
    )


def is_conforming(view: BitView, n: int, m: int, axis: int) -> bool:
    """Tell whether every group of M along `axis` has at most N nonzeros; stops at the first that has more.

    >>> is_conforming(view_bits(np.eye(4, dtype=np.float32), has_sign=True), 1, 4, axis=0)
    True
    """
    return not any((_sum_groups(nonzero, m) > n).any() for _, nonzero in _steps(view, m, axis))


def _steps(view: BitView, m: int, axis: int) -> Iterator[tuple[Array, Array]]:
    """Yield pieces [rows, m, inner] of the bits, and which of their entries are nonzero (a buffer used again)."""
    shape = view.bits.shape
    if math.prod(shape) == 0:
        return
    axis = axis % len(shape)
    inner = math.prod(shape[axis + 1 :])
    groups_RMI = np.ascontiguousarray(view.bits).reshape(-1, m, inner)
    num_rows = max(1, _STEP_ELEMENTS // (m * inner))
    all_bits = (1 << (8 * view.bits.dtype.itemsize)) - 1
    mask = view.bits.dtype.type(view.magnitude_mask)
    buffer = np.empty((num_rows, m, inner), view.bits.dtype)
    nonzero = np.empty((num_rows, m, inner), np.bool_)
    for start in range(0, groups_RMI.shape[0], num_rows):
        piece = groups_RMI[start : start + num_rows]
        magnitude = piece
        if view.magnitude_mask != all_bits:
            magnitude = np.bitwise_and(piece, mask, out=buffer[: len(piece)])
        yield piece, np.not_equal(magnitude, 0, out=nonzero[: len(piece)])


def _sum_groups(nonzero_RMI: Array, m: int) -> Array:
    """Nonzeros of each group, flat in the order of the stored tensor's groups."""
    ones = nonzero_RMI.view(np.uint8)
    if ones.shape[2] == 1 and m in (2, 4, 8):
        # The bytes of a group are one word: multiplying by 0x0101.. adds them all into its highest byte.
        word = np.dtype(f"u{m}").type
        words: Array = ones.reshape(-1).view(word) * word(int.from_bytes(b"\x01" * m, "little"))
        words >>= word(8 * (m - 1))
        return words
    if m > 255:
        wide: Array = ones.sum(axis=1, dtype=np.int64)
        return wide.reshape(-1)
    total: Array = ones[:, 0].copy()
    for j in range(1, m):
        total += ones[:, j]
    return total.reshape(-1)


def _group_index(flat: int, shape: tuple[int, ...], m: int, axis: int) -> tuple[int, ...]:
    axis = axis % len(shape)
    inner = math.prod(shape[axis + 1 :])
    row, column = divmod(flat, inner)
    return tuple(int(i) for i in np.unravel_index(row * m * inner + column, shape))
