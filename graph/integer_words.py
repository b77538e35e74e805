"""Integers of 8 or 4 bits in words of 32, as compressed-tensors stores them (format ``pack-quantized``).

Tensor shapes: R rows, C columns, W words of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional


def to_words(numbers_RC: Tensor, bits: int) -> Tensor:
    """Integers in words, the first one in the lowest bits.

    Shapes: ``[R, C]`` to ``[R, W]``.

    Args:
        numbers_RC: uint8, from 0 on.
        bits: Of each, 8 or 4.

    Returns:
        int32. What is left of the last word of a row is 0.

    Example:
        >>> to_words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[801]], dtype=torch.int32)
    """
    each = 32 // bits
    padded_RC = functional.pad(numbers_RC, (0, -numbers_RC.shape[1] % each))
    if bits == 4:
        padded_RC = padded_RC[:, 0::2] | padded_RC[:, 1::2] << 4
    return padded_RC.flatten().view(torch.int32).view(len(numbers_RC), -1)


def from_words(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `to_words`.

    Shapes: ``[R, W]`` to ``[R, C]``.

    Args:
        words_RW: int32.
        bits: Of each integer, 8 or 4.
        columns: How many a row has.

    Example:
        >>> from_words(torch.tensor([[801]], dtype=torch.int32), 4, 3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    bytes_RC = words_RW.flatten().view(torch.uint8).view(len(words_RW), -1)
    if bits == 4:
        bytes_RC = torch.stack((bytes_RC & 15, bytes_RC >> 4), dim=-1).flatten(1)
    return bytes_RC[:, :columns]


def steps_from_words(words_RW: Tensor, columns: int, zeros_WG: Tensor | None) -> Tensor:
    """How many steps each weight is away from 0: that is its integer less that which stands for 0.

    Shapes: ``[R, W]`` to ``[R, C]``; zero points are words along the rows, ``[W, G]``.

    Args:
        words_RW: The integers. How many bits each has is told by the size.
        columns: How many a row has; they stand in G groups of equal size.
        zeros_WG: Zero points; None where it is the middle, 8 or 128.

    Returns:
        int16.

    Raises:
        ValueError: If no number of bits fits the sizes.

    Example:
        >>> steps_from_words(torch.tensor([[0x8A7]], dtype=torch.int32), 3, None)
        tensor([[-1,  2,  0]], dtype=torch.int16)
    """
    rows, words = words_RW.shape
    known = [bits for bits in (4, 8) if -(-columns * bits // 32) == words]
    if not known:
        raise ValueError(f"{words} words hold no {columns} integers of 4 or 8 bits")
    bits = known[0]
    numbers_RC = from_words(words_RW, bits, columns).short()
    middle: Tensor = torch.tensor(2 ** (bits - 1), dtype=torch.int16)
    if zeros_WG is not None:
        zeros_RG = from_words(zeros_WG.T, bits, rows).T.short()
        middle = zeros_RG.repeat_interleave(-(-columns // zeros_RG.shape[1]), dim=1)[:, :columns]
    return numbers_RC - middle
