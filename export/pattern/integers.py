"""Weights that compressed-tensors has packed into words: read as how many steps each is away from 0."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from sparsepass.graph.integer_words import steps_from_words
from sparsepass.graph.support import SparsepassError

PACKED: Final = ".weight_packed"
_PARTS: Final = (PACKED, ".weight_scale", ".weight_shape", ".weight_zero_point")
_MOST_ROWS: Final = 2**31


@dataclass(frozen=True, kw_only=True)
class PackedIntegers:
    """A weight that is stored as integers in words.

    Attributes:
        layer: Name of the layer; ``weight_packed`` and the others come after it.
        shape: Rows and columns.
        parts: Names of the tensors that it is stored in.
        read: Reads the steps, 1 where a weight is not 0 and 0 where it is, int8.
    """

    layer: str
    shape: tuple[int, int]
    parts: frozenset[str]
    read: Callable[[], Tensor]


def packed_integers(
    name: str, words_shape: tuple[int, ...], tensors: Mapping[str, Callable[[], Tensor]]
) -> PackedIntegers | None:
    """The weight behind a tensor ``weight_packed``; None if what stands beside it does not fit.

    Args:
        name: Of that tensor.
        words_shape: Its shape.
        tensors: All tensors that are stored, each read when it is called.
    """
    layer = name.removesuffix(PACKED)
    if len(words_shape) != 2 or f"{layer}.weight_shape" not in tensors or f"{layer}.weight_scale" not in tensors:
        return None
    shape = tensors[f"{layer}.weight_shape"]().flatten().tolist()
    if len(shape) != 2 or shape[0] != words_shape[0] or not 0 < shape[1] < _MOST_ROWS:
        return None
    rows, columns = shape
    if words_shape[1] not in (-(-columns * bits // 32) for bits in (4, 8)):
        return None
    zeros = tensors.get(f"{layer}.weight_zero_point")

    def read() -> Tensor:
        try:
            steps = steps_from_words(tensors[name](), columns, None if zeros is None else zeros())
        except (ValueError, RuntimeError, IndexError) as error:
            raise SparsepassError(f"{layer}: its integers cannot be read ({error}); copy the file again") from error
        return steps.ne(0).char()

    parts = frozenset(f"{layer}{part}" for part in _PARTS)
    return PackedIntegers(layer=layer, shape=(rows, columns), parts=parts, read=read)
