"""What operations do to channels that move elements, or take some of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsepass.graph.channels import bars, ops
from sparsepass.graph.channels.values import Channels, Leaf, shape_of, varying
from sparsepass.graph.channels.walk import Walk, is_tensor
from sparsepass.graph.nodes import op_name


def layout(walk: Walk, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Elements move: labels move with them."""
    value, *others = args
    leaves = torch.utils._pytree.tree_leaves((others, dict(kwargs)), is_leaf=is_tensor)
    if any(isinstance(leaf, Channels | Leaf) for leaf in leaves):
        if op_name(walk.node) not in ("expand_as", "view_as", "reshape_as"):
            return NotImplemented
        others = [torch.empty(shape_of(others[0]))]

    target = walk.node.target

    def moved(labels: Tensor) -> Any:
        return target(labels.contiguous(), *others, **kwargs)  # type: ignore[operator]

    picked = _picked_by_inputs(walk, value, others, kwargs)
    if isinstance(value, Leaf):
        if picked and not (picked == [0] and value.index.dim() == 2 and op_name(walk.node) in ("index", "index_select")):
            return NotImplemented  # but for rows of a table
        found = moved(value.index)
        if isinstance(found, Tensor):
            return value.moved(moved)
        return [value.moved(partial(_part, moved, number)) for number in range(len(found))]
    for axis in set(picked) & {*varying(value.places), *varying(value.scales)}:  # any of them may come to any place
        first = walk.flattened(value, axis)
        value = replace(value, places=first.places.expand(value.shape), scales=first.scales.expand(value.shape))
        if not varying(value.places):
            bars.bar(walk, value.places, f"{op_name(walk.node)} takes what the inputs of the model choose")
    places, scales = moved(value.places), moved(value.scales)
    if isinstance(places, Tensor):
        if op_name(walk.node) in ops.PICKING_EACH:
            index = next(number for number, other in enumerate(others) if isinstance(other, Tensor))
            walk.meet_data(places, others[index], walk.node.args[index + 1])
        walk.meet_part(places, value.places, 0)
        bars.laid_out(walk, value, others, kwargs, [places])
        return replace(value, places=places, scales=scales)
    for number, part in enumerate(places):
        walk.meet_part(part, value.places, number)
    bars.laid_out(walk, value, others, kwargs, places)
    return [replace(value, places=place, scales=scale) for place, scale in zip(places, scales, strict=True)]


def _part(move: Callable[[Tensor], Any], number: int, parameter: Tensor) -> Tensor:
    part: Tensor = move(parameter)[number]
    return part


def _picked_by_inputs(walk: Walk, value: Channels | Leaf, others: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The axes along which the inputs of the model choose what is taken: other inputs take other elements."""
    name, rank = op_name(walk.node), len(shape_of(value))
    if name not in ops.PICKING or walk.given.isdisjoint(walk.node.all_input_nodes[1:]):
        return []
    if name != "index":
        dim = kwargs.get("dim", others[1] if name in ("take_along_dim", "repeat_interleave") and len(others) > 1 else others[0])
        return [dim % rank] if isinstance(dim, int) else list(range(rank))
    axes, found = 0, list[int]()
    for index in others[0]:
        covered = index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        found += range(axes, axes + covered) if isinstance(index, Tensor) else []
        axes += covered
    return found
