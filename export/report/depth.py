"""Layers by their place in the model's depth: one row a kind of layer, one column a block."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, final

_MAX_KINDS: Final = 40


@final
@dataclass(frozen=True, kw_only=True)
class DepthGrid:
    """Where layers stand.

    Attributes:
        kinds: Names of the rows; a layer outside the numbered blocks is a row of its own.
        blocks: Names of the columns.
        places: Layer -> row and column. Several layers share a place where kinds had to be taken together.
    """

    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]

    def cells(self, values: Mapping[str, float | None]) -> dict[tuple[int, int], float]:
        """Row and column -> the mean of the known values there.

        Args:
            values: Layer -> value; None and NaN count as unknown.
        """
        found: dict[tuple[int, int], list[float]] = {}
        for name, value in values.items():
            if value is not None and not math.isnan(value) and name in self.places:
                found.setdefault(self.places[name], []).append(value)
        return {place: sum(each) / len(each) for place, each in found.items()}


def depth_grid(names: Iterable[str]) -> DepthGrid:
    """Order layers by the first number in their paths, which is the block's.

    Args:
        names: Module paths, or names of weights.

    Example:
        >>> grid = depth_grid(["h.0.mlp.up.weight", "h.1.mlp.up.weight", "head.weight"])
        >>> grid.kinds, grid.blocks
        (('mlp.up', 'head'), ('0', '1'))
        >>> grid.cells({"h.1.mlp.up.weight": 0.5})
        {(0, 1): 0.5}
    """
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, block, _ in split.values() if block is not None}
    # With several stacks (encoder and decoder), a row's name begins with the stack's own part of the path.
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*stacks, strict=False))))
    parts = {name: (*stack[shared:], *kind) if len(stacks) > 1 else kind for name, (stack, _, kind) in split.items()}
    kinds = {name: ".".join(each) or "layer" for name, each in parts.items()}
    if len(set(kinds.values())) > _MAX_KINDS:
        kinds = {name: ".".join("*" if part.isdigit() else part for part in kind.split(".")) for name, kind in kinds.items()}
    rows = {kind: row for row, kind in enumerate(dict.fromkeys(kinds.values()))}
    numbers = sorted({block for _, block, _ in split.values() if block is not None})
    columns = {number: column for column, number in enumerate(numbers)}
    places = {name: (rows[kinds[name]], columns.get(split[name][1] or 0, 0)) for name in split}
    return DepthGrid(kinds=tuple(rows), blocks=tuple(map(str, numbers)) or ("",), places=places)


def _split(name: str) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """The path before the first number, the number, and the path after it."""
    parts = tuple(name.removesuffix(".weight").split("."))
    at = next((index for index, part in enumerate(parts) if re.fullmatch("[0-9]{1,9}", part)), None)
    return ((), None, parts) if at is None else (parts[:at], int(parts[at]), parts[at + 1 :])
