"""What a value is to the walk that follows channels: data, a parameter as it is stored, or something that has channels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.channels.labels import Hashes, Ints, mixed


def _as_stored(parameter: Tensor) -> Tensor:
    return parameter


@dataclass(frozen=True)
class Leaf:
    """A parameter, or what is made of one element by element.

    Attributes:
        name: Of the parameter.
        index: For each element of the value, the flat index of the parameter's element that it is made of.
        offset: What has been added to the parameter, as in ``1 + weight``; None where it was changed in another way.
        layout: Moves what stands where the parameter does to where the value has it.
    """

    name: str
    index: Tensor
    offset: float | None = 0.0
    layout: Callable[[Tensor], Tensor] = _as_stored

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Leaf":
        """The same elements in another place."""
        before = self.layout
        return replace(self, index=move(self.index), layout=lambda parameter: move(before(parameter)))


@dataclass(frozen=True)
class Channels:
    """A value whose elements belong to channels.

    Attributes:
        places: Label of each element's channel; 0 where an element belongs to none.
        scales: Label of the factor that each element may carry; 0 where it may carry none.
        is_squared: Whether elements are squares of the channels, which an orthogonal matrix leaves their sum of.
    """

    places: Tensor
    scales: Tensor
    is_squared: bool = False

    @property
    def shape(self) -> torch.Size:
        """The value's shape."""
        return self.places.shape

    def each(self, change: Callable[[Tensor], Tensor]) -> "Channels":
        """The same change of both."""
        return replace(self, places=change(self.places), scales=change(self.scales))

    def without_scales(self) -> "Channels":
        """The same channels, with no factor."""
        return replace(self, scales=torch.zeros_like(self.scales))


def varying(labels: Tensor) -> tuple[int, ...]:
    """The axes along which labels differ."""
    return tuple(
        axis
        for axis, size in enumerate(labels.shape)
        if size > 1 and labels.numel() and not bool((labels == labels.narrow(axis, 0, 1)).all())
    )


def distinct(labels: Tensor, axes: Sequence[int]) -> Ints:
    """Labels along some axes, taken at the first place of all others. Shape: one axis for each of ``axes``, in their order."""
    index = tuple(slice(None) if axis in axes else 0 for axis in range(labels.dim()))
    found: Ints = labels[index].numpy()
    return found.transpose(np.argsort(np.argsort(axes))) if len(axes) > 1 else found


def rows_met(labels: Tensor, data: Tensor, salt: int) -> tuple[Ints, Hashes]:
    """What each channel meets in data of the same shape: labels, and a hash of the data at all places of each, in order."""
    axes = varying(labels)
    others = [axis for axis in range(labels.dim()) if axis not in axes]
    channels = distinct(labels, axes).reshape(-1)
    bits = data.expand(labels.shape).permute(*axes, *others).reshape(len(channels), -1)
    values = _as_integers(bits)
    weights = mixed(np.arange(1, values.shape[1] + 1, dtype=np.uint64) + np.uint64(salt * 1_000_003 & 0xFFFFFFFF))
    with np.errstate(over="ignore"):
        hashes = (mixed(values) * weights).sum(1, dtype=np.uint64)
    return channels, hashes


def _as_integers(data: Tensor) -> Hashes:
    if data.is_floating_point():
        data = data.double() + 0.0  # one zero
        return data.contiguous().view(torch.int64).numpy().view(np.uint64)
    if data.is_complex():
        return _as_integers(torch.view_as_real(data).sum(-1))
    return data.to(torch.int64).contiguous().numpy().view(np.uint64)


def fits_fewer(stored: Leaf, size: Sequence[int], axis: int) -> bool:
    """Whether a parameter with one channel less along an axis is laid out as now, but for that channel, by trying.

    Args:
        stored: The parameter.
        size: Its shape.
        axis: Of the parameter.
    """
    every = torch.arange(math.prod(size)).reshape(*size)
    gone = every.select(axis, size[axis] - 1)
    try:
        found = stored.layout(every.narrow(axis, 0, size[axis] - 1))
    except (RuntimeError, IndexError):
        return False
    expected = stored.index.flatten()
    return found.dim() == stored.index.dim() and torch.equal(found.flatten(), expected[~torch.isin(expected, gone)])


def shape_of(value: Any) -> torch.Size:
    """Shape of any of them."""
    return value.index.shape if isinstance(value, Leaf) else value.shape
