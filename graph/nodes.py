"""What single nodes of a graph say: their operator, their module, the tensor they read, how their result is cut."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten


def op_name(node: fx.Node) -> str:
    """The operator's name without namespace, overload and the underscore of in-place ones, such as ``matmul``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1].rstrip("_") or target._schema.name
    return str(getattr(target, "__name__", target))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node stands in; empty if none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def module_type(node: fx.Node) -> str:
    """Class name of that module; empty if none is known."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    kind = list(stack.values())[-1][1]
    return (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]


def tensor_of(module: torch.nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    tensor = attrgetter(name)(module)
    assert isinstance(tensor, Tensor)
    return tensor


def ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    seen, stack = {node}, [node]
    while stack:
        new = [source for source in stack.pop().all_input_nodes if source not in seen]
        seen.update(new)
        stack.extend(new)
    return seen


def splits_of(node: fx.Node, width: int) -> tuple[int, ...]:
    """Sizes of the chunks into which the last axis of a matmul's result is cut at once, if it is."""
    frontier = [node]
    for _ in range(2):  # the matmul itself, or the view that restores its batch axes
        for current in frontier:
            users = list(current.users)
            slices = [part for u in users if (part := _slice_of_last(u, width)) is not None]
            if len(slices) > 1 and len(slices) == len(users):
                ends = [0, *(end for _, end in sorted(slices))]
                if [*(start for start, _ in sorted(slices)), width] == ends:
                    return tuple(end - start for start, end in sorted(slices))
            for user in users:
                name = op_name(user)
                if name not in ("chunk", "split", "split_with_sizes") or not _axis_is_last(user, 2):
                    continue
                asked: Any = user.args[1]
                if name == "chunk":
                    return (width // asked,) * asked if width % asked == 0 else ()
                if isinstance(asked, int):
                    return tuple(min(asked, width - start) for start in range(0, width, asked))
                return tuple(int(size) for size in asked)
        frontier = [u for c in frontier for u in c.users if op_name(u) in ("view", "reshape", "_unsafe_view", "to")]
    return ()


def _slice_of_last(node: fx.Node, width: int) -> tuple[int, int] | None:
    """Start and end of a slice with step 1 of the last axis, or None."""
    if node.target is not _aten.slice.Tensor or not _axis_is_last(node, 1) or len(node.args) != 4:
        return None
    start, end = node.args[2] if node.args[2] is not None else 0, node.args[3]
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    first, last, _ = slice(start, end).indices(width)
    return first, last


def _axis_is_last(node: fx.Node, position: int) -> bool:
    axis = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return axis in (-1, 2)


def retarget_device(graph_module: fx.GraphModule, old: torch.device, new: torch.device) -> None:
    """Replace a device in the arguments of every node (``arange(n, device=cpu)``) by another one."""

    def swap(value: Any) -> Any:
        return new if isinstance(value, torch.device) and value.type == old.type else value

    for node in graph_module.graph.nodes:
        node.args = torch.utils._pytree.tree_map(swap, node.args)
        node.kwargs = torch.utils._pytree.tree_map(swap, node.kwargs)
    graph_module.recompile()
