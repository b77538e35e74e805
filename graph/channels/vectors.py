"""Where a vector that is added to channels, such as the bias of a norm, reaches a layer as it is."""

from typing import Final

from torch import fx

from sparsepass.graph.channels import ops
from sparsepass.graph.nodes import memory_sharers, op_name, writes_into
from sparsepass.graph.program import Program

_CASTS: Final = {"to", "_to_copy", "type_as", "float", "half", "bfloat16"}
_DROPOUT: Final = {"dropout", "feature_dropout"}


def sums_with(program: Program, vector: str) -> set[str]:
    """Names of the nodes whose values are sums with a stored vector, moved about, cast and repeated at most.

    Whatever reads such a value meets the vector at each of its places, and may count it in a bias of its own instead. There are
    none where something else is done with the vector, too.

    Args:
        program: Not changed.
        vector: Name of a stored tensor.
    """
    adder = _only_sum_with(program, vector)
    found: set[fx.Node] = set()
    unseen = [] if adder is None else [adder]
    while unseen:
        node = unseen.pop()
        if any(each in writes_into(user) for each in memory_sharers(node) for user in each.users):
            return set()
        found.add(node)
        unseen += [user for user in node.users if user.args[0] is node and _is_as_it_was(user)]
    return {node.name for node in found}


def _only_sum_with(program: Program, vector: str) -> fx.Node | None:
    """The node that adds a stored vector, if nothing else is done with it."""
    names = [vector, *(alias for alias, name in program.aliases.items() if name == vector)]
    read = [node for name in names for node in program.graph_module.graph.find_nodes(op="get_attr", target=name)]
    while len(read) == 1 and len(read[0].users) == 1:
        (source,), (user,) = read, read[0].users
        if not _is_as_it_was(user):
            return user if _adds(user, source) else None
        read = [user]
    return None


def _adds(node: fx.Node, vector: fx.Node) -> bool:
    if op_name(node) in ("layer_norm", "native_layer_norm"):
        return node.args.count(vector) == 1 and node.args[3:4] == (vector,)
    return op_name(node) == "add" and node.args.count(vector) == 1 and not node.kwargs


def _is_as_it_was(node: fx.Node) -> bool:
    """Whether each element of a value is one of the node's first argument."""
    name = op_name(node)
    if name in _DROPOUT:
        return node.args[2:] == (False,)
    return name in ops.LAYOUT or name in _CASTS or name == "getitem"
