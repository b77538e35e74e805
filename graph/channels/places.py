"""Where channels lie in stored tensors, and how these look when something is done to the channels there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.graph.channels.labels import Ints


@dataclass(frozen=True, kw_only=True)
class ChannelPlace:
    """Where channels of a group lie in one stored tensor.

    Attributes:
        tensor: Its name.
        axes: The axes that the channels run along; several count as one, flat.
        reads: Whether the tensor sums over them; otherwise it makes them, or is applied element by element.
        offset: What the graph adds to the tensor before it is used, as in ``1 + weight``.
        positions: Flat positions along the axes, [channels, times]: a channel that several query heads share lies there often.
    """

    tensor: str
    axes: tuple[int, ...]
    reads: bool
    offset: float
    positions: Ints


def taken(tensor: Tensor, place: ChannelPlace) -> Tensor:
    """What stands at the places of a group in a stored tensor: [channels, times], then the tensor's other axes.

    Args:
        tensor: As the program holds it, or anything of that shape.
        place: Where the channels lie in it.
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    return moved.reshape(-1, *moved.shape[len(axes) :])[torch.from_numpy(place.positions)]


def permuted(tensor: Tensor, place: ChannelPlace, order: Ints) -> Tensor:
    """A stored tensor with the channels of a group in another order.

    Args:
        tensor: As the program holds it.
        place: Where the channels lie in it.
        order: ``order[i]``: which channel comes to the place of channel i.
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    flat = moved.reshape(-1, *moved.shape[len(axes) :]).clone()
    source = flat[torch.from_numpy(place.positions[order].reshape(-1))]
    flat[torch.from_numpy(place.positions.reshape(-1))] = source
    return flat.reshape(moved.shape).movedim(tuple(range(len(axes))), axes)


def scaled(tensor: Tensor, place: ChannelPlace, factors: Tensor) -> Tensor:
    """A stored tensor that takes up factors of a group: multiplied where it makes the channels, divided where it reads them.

    Args:
        tensor: As the program holds it.
        place: Where the channels lie in it.
        factors: One for each, [factors].
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    flat = moved.reshape(-1, *moved.shape[len(axes) :]).clone()
    positions = torch.from_numpy(place.positions)
    each = factors.to(flat).unsqueeze(1).expand(positions.shape).reshape(-1, *([1] * (flat.dim() - 1)))
    rows = flat[positions.reshape(-1)]
    changed = rows / each if place.reads else (rows + place.offset) * each - place.offset
    flat[positions.reshape(-1)] = changed
    return flat.reshape(moved.shape).movedim(tuple(range(len(axes))), axes)


def rotated(tensor: Tensor, place: ChannelPlace, matrix: Tensor) -> Tensor:
    """A stored tensor with the channels of a group mixed by an orthogonal matrix: what makes them gives ``matrix @ x``.

    A tensor that reads the channels takes the transpose from the right, and so the same change along its axis.

    Args:
        tensor: As the program holds it.
        place: Where the channels lie in it.
        matrix: Orthogonal, [channels, channels], of the tensor's type.
    """
    axes = place.axes
    moved = tensor.movedim(axes, tuple(range(len(axes))))
    flat = moved.reshape(-1, *moved.shape[len(axes) :]).clone()
    for positions in torch.from_numpy(place.positions).unbind(1):
        flat[positions] = torch.tensordot(matrix, flat[positions], dims=1)
    return flat.reshape(moved.shape).movedim(tuple(range(len(axes))), axes)


def without(tensor: Tensor, gone: Sequence[tuple[ChannelPlace, Ints]]) -> Tensor:
    """A stored tensor from which channels of groups are taken out: it is narrower along the one axis of each place.

    Args:
        tensor: As the program holds it.
        gone: Where channels of a group lie in it, and which of them go, as numbers within the group.
    """
    kept = [torch.ones(size, dtype=torch.bool, device=tensor.device) for size in tensor.shape]
    for place, channels in gone:
        (axis,) = place.axes
        kept[axis][torch.from_numpy(place.positions[channels].reshape(-1)).to(tensor.device)] = False
    for axis, stay in enumerate(kept):
        tensor = tensor.index_select(axis, stay.nonzero().flatten())
    return tensor
