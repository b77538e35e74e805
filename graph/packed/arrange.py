"""From the stored layout of a packed weight to the one that the kernels read. `kernels.cpp` has the table of it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.packed.layout import FLOATS, PackedWeight, numbers, out_of_bytes

_REGISTER = 64


@dataclass(frozen=True, kw_only=True)
class Step:
    """How much of a row a kernel takes at once.

    Attributes:
        columns: Columns of a step.
        per_block: Steps whose codes lie in one register.
        kind: The number of the kind of values in `kernels.cpp`.
    """

    columns: int
    per_block: int
    kind: int


STEPS = {"bf16": Step(columns=64, per_block=8, kind=0), "int8": Step(columns=128, per_block=4, kind=1), "int4": Step(columns=128, per_block=4, kind=2)}


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrangedWeight:
    """A packed weight as the kernels read it.

    Attributes:
        step: Its steps.
        shape: Rows and columns.
        data: ``[O, bytes of a row]``, uint8.
        scales: ``[O, scales of a row]`` float32, one for each ``group_steps`` steps; None for floating values.
        sums: ``[O]``: sum of all scaled values of a row; None for floating values.
        group_steps: Steps that share a scale.
    """

    step: Step
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor | None
    sums: Tensor | None
    group_steps: int

    @property
    def padded_columns(self) -> int:
        """Columns, filled up to whole steps."""
        return -(-self.shape[1] // self.step.columns) * self.step.columns


def arrange(packed: PackedWeight) -> ArrangedWeight:
    """Lay a packed weight out for the kernels.

    Args:
        packed: The weight; a scale has to be shared by whole steps, or by all of a row.
    """
    step, (rows, columns) = STEPS[packed.values], packed.shape
    lanes = step.columns // 2
    num_steps = -(-columns // step.columns)
    padding = (0, num_steps * lanes - columns // 2)
    values_OSL = functional.pad(numbers(packed), padding).unflatten(-1, (num_steps, lanes))
    codes_OSL = functional.pad(out_of_bytes(packed.codes, bits=2), padding).unflatten(-1, (num_steps, lanes))
    parts: list[Tensor] = []
    for start in range(0, num_steps, step.per_block):
        block_OSL = values_OSL[:, start : start + step.per_block]
        shifts_S1 = 2 * torch.arange(block_OSL.shape[1])[:, None]
        codes_OL = (codes_OSL[:, start : start + step.per_block] << shifts_S1).sum(1)
        parts.append(_bytes_of(block_OSL, packed.values))
        parts.append((codes_OL.to(torch.uint16) if packed.values in FLOATS else codes_OL.to(torch.uint8)).view(torch.uint8))
    scales = sums = None
    group_steps = 1
    if packed.scales is not None:
        scales = packed.scales.contiguous()
        group_steps = num_steps if scales.shape[1] == 1 else packed.group_size // step.columns
        scaled_OSL = values_OSL.float() * scales.repeat_interleave(group_steps, dim=1)[:, :num_steps, None]
        sums = scaled_OSL.double().sum((1, 2)).float()
    return ArrangedWeight(
        step=step, shape=packed.shape, data=torch.cat(parts, dim=1).contiguous(), scales=scales, sums=sums, group_steps=group_steps
    )


def _bytes_of(block_OSL: Tensor, values: str) -> Tensor:
    if values != "int4":
        return block_OSL.flatten(1).contiguous().view(torch.uint8)
    pairs_OSL = functional.pad(block_OSL + 8, (0, 0, 0, block_OSL.shape[1] % 2)).to(torch.uint8)
    return (pairs_OSL[:, 0::2] | pairs_OSL[:, 1::2] << 4).flatten(1)
