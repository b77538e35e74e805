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


def memory_sharers(node: fx.Node) -> set[fx.Node]:
    """A node and the nodes whose values may lie in the same memory: what it is a view of, and views of that."""
    found, unseen = {node}, [node]
    while unseen:
        current = unseen.pop()
        source = current.args[0] if _is_view(current) else None
        near = [user for user in current.users if _is_view(user) and user.args[0] is current]
        for other in [*near, *([source] if isinstance(source, fx.Node) else [])]:
            if other not in found:
                found.add(other)
                unseen.append(other)
    return found


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return op_name(node) == "getitem"
    schema = node.target._schema
    return any(value.alias_info is not None for value in schema.returns) and isinstance(next(iter(node.args), None), fx.Node)


def is_mutable(target: object) -> bool:
    """Whether an operator changes one of its arguments in place."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def writes_into(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an operation changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in node.target._schema.arguments]
    return [value for value, is_written in zip(node.args, written, strict=False) if is_written and isinstance(value, fx.Node)]


def linear_that_reads(graph: fx.Graph, weight: str) -> fx.Node | None:
    """The one linear that multiplies by a stored weight, masked and rounded maybe; None where something else reads it too."""
    return linear_behind([node for node in graph.nodes if node.op == "get_attr" and node.target == weight])


def linear_behind(reading: list[fx.Node]) -> fx.Node | None:
    """See `linear_that_reads`.

    Args:
        reading: The nodes that read the weight from the program.
    """
    while len(reading) == 1 and len(reading[0].users) == 1:
        (source,), (user,) = reading, reading[0].users
        if user.target is _aten.linear.default:
            return user if user.args[1] is source and source not in (user.args[0], *user.args[2:]) else None
        if op_name(user) not in ("masked_weight", "learned_weight", "quantized_weight") or user.args[0] is not source:
            return None
        reading = [user]
    return None


def cut_of(linear: fx.Node, sizes: tuple[int, ...]) -> fx.Node | None:
    """The split into these sizes that alone reads a linear's result, with its branch added if it has one; None without one."""
    result = linear
    for _ in range(2):
        if len(result.users) != 1:
            return None
        (user,) = result.users
        if user.target is _aten.split_with_sizes.default:
            is_cut = user.args[0] is result and user.args[2:] == (-1,) and tuple(user.args[1]) == sizes  # type: ignore[arg-type]
            return user if is_cut and all(op_name(part) == "getitem" for part in user.users) else None
        if user.target is not _aten.add.Tensor or user.args[0] is not result:
            return None
        result = user
    return None


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
