"""Surgery on the residual stream: a head untied from its embedding, and matrices between the blocks of a model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsepass.graph.nodes import op_name
from sparsepass.graph.program import Program
from sparsepass.graph.sites import BETWEEN_BLOCKS

_aten = torch.ops.aten
_TIED = "tie_word_embeddings"


def untie_head(program: Program) -> str | None:
    """Give the output head a weight of its own, with the values of the embedding that it was tied to.

    The configuration then says so, and the model's own class has both.

    Args:
        program: Changed in place.

    Returns:
        The head's weight; None, and nothing is changed, if there is no such tie, or its configuration does not tell of it.
    """
    config = program.origin.config
    if config is not None and config.get(_TIED) is not True:
        return None
    reading: dict[str, list[fx.Node]] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "get_attr":
            reading.setdefault(str(node.target), []).append(node)
    for alias, name in program.aliases.items():
        if list(program.aliases.values()).count(name) > 1:
            continue
        users = [(node, user) for node in reading.get(name, ()) for user in node.users]
        kinds = {user: user.target is _aten.embedding.default for _, user in users}
        if len(kinds) < 2 or sum(kinds.values()) not in range(1, len(kinds)):
            continue
        is_head = alias in program.origin.output_heads or name not in program.origin.output_heads
        shared = program.tensor(name)
        del program.aliases[alias]
        program.set_tensor(alias, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
        for node, user in users:
            if kinds[user] != is_head:
                with program.graph_module.graph.inserting_before(user):
                    own = program.graph_module.graph.get_attr(alias)
                own.meta.update(node.meta)
                user.replace_input_with(node, own)
        for node in reading[name]:
            if not node.users:
                program.graph_module.graph.erase_node(node)
        if config is not None:
            program.origin = replace(program.origin, config={**config, _TIED: False})
        return alias if is_head else name
    return None


def matrices_between(program: Program, starts: Sequence[tuple[str, fx.Node]], weight: Tensor) -> list[str] | None:
    """Put a matrix in front of each block, which all that comes behind reads the stream through.

    Args:
        program: Changed in place.
        starts: Path and first node of each block that gets one, in order.
        weight: What it is at first, [channels, channels]; each gets a copy.

    Returns:
        Names of the new weights; None if more than one value with channels goes into a block, so that there is no one stream.
        The graph is then changed in part.
    """
    graph, names = program.graph_module.graph, []
    for path, first in starts:
        ahead: set[fx.Node] = set()
        for node in graph.nodes:
            if node is first:
                break
            ahead.add(node)
        crossing = [node for node in _made(program, graph) if node in ahead and any(user not in ahead for user in node.users)]
        if len(crossing) != 1:
            return None
        (value,) = crossing
        name = f"{path}.{BETWEEN_BLOCKS}"
        program.set_tensor(name, nn.Parameter(weight.clone()))
        behind = [user for user in value.users if user not in ahead]
        with graph.inserting_before(first):
            matrix = graph.get_attr(name)
            turned = graph.call_function(_aten.linear.default, (value, matrix))
        for user in behind:
            user.replace_input_with(value, turned)
        above = _above(first, path)
        for node in (matrix, turned):
            if above:
                node.meta["nn_module_stack"] = dict(above)
        names.append(name)
    return names


def _above(node: fx.Node, path: str) -> dict[str, Any]:
    """The modules that a node stands in, down to the one that holds the module of some path."""
    found: dict[str, Any] = {}
    for key, (name, kind) in (node.meta.get("nn_module_stack") or {}).items():
        if name == path:
            break
        found[key] = (name, kind)
    return found


def _made(program: Program, graph: fx.Graph) -> list[fx.Node]:
    """Values that come from the inputs and from parameters."""
    of_inputs: set[fx.Node] = set()
    of_parameters: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder" or any(source in of_inputs for source in sources):
            of_inputs.add(node)
        is_parameter = node.op == "get_attr" and isinstance(program.tensor(str(node.target)), nn.Parameter)
        if is_parameter or (op_name(node) != "sym_size" and any(source in of_parameters for source in sources)):
            of_parameters.add(node)
    return [node for node in graph.nodes if node in of_inputs and node in of_parameters and node.op == "call_function"]
