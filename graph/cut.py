"""A program in two: everything before its output head, and the head.

Logits are the largest tensors of a language model (tokens x vocabulary). Whoever computes a loss on them wants to run the
head on a few tokens at a time, and needs it apart from the rest for that.
"""

from typing import Any

import torch
from torch import fx, nn

from sparsepass.graph.nodes import ancestors
from sparsepass.graph.program import Program
from sparsepass.graph.support import CaptureError

_aten = torch.ops.aten
_MATMULS = {_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default}


def cut_head(program: Program, output: str = "logits") -> tuple[Program, nn.Module]:
    """Cut a program at the input of its output head.

    Both halves read the program's own parameters: training them trains the program. Where what follows the last matmul
    needs more than that matmul's input (a shape taken from elsewhere, say), the body returns the logits and the head passes
    them on.

    Args:
        program: A program with logits among its outputs. It is not changed.
        output: Flat name of the output that the head computes.

    Returns:
        The body, a program with the same inputs that returns the head's input ``[B, T, H]``, and the head, a module from
        ``[..., N, H]`` to ``[..., N, V]`` that holds everything from there to the logits (soft-capping as well).

    Raises:
        CaptureError: If the program has no such output.

    Exactness: bitwise, called one after the other on the same shapes.

    Example:
        >>> from sparsepass.graph import capture
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        >>> body, head = cut_head(capture(net, torch.randn(2, 8)), "output")
        >>> head(body(torch.ones(2, 8))).shape, body(torch.ones(2, 8)).shape
        (torch.Size([2, 4]), torch.Size([2, 6]))
    """
    names = program.output_names
    if output not in names:
        raise CaptureError(
            f"the program returns {', '.join(names)} and no {output!r}; a loss on logits needs a model with an output head, "
            "such as a ...ForCausalLM"
        )
    graph = program.graph_module.graph
    results: Any = graph.output_node().args[0]
    logits: fx.Node = results[names.index(output)]
    cut = _cut(graph, logits)
    if cut is None:
        return _body(program, logits), nn.Identity()
    inside, entry = cut
    return _body(program, entry), _head(program, inside, entry, logits)


def _cut(graph: fx.Graph, logits: fx.Node) -> tuple[set[fx.Node], fx.Node] | None:
    """The nodes of the head, and the node that it reads; None where more than one node would have to be handed over."""
    above = ancestors(logits)
    matmuls = [node for node in graph.nodes if node in above and node.target in _MATMULS]
    if not matmuls:
        return None
    matmul = matmuls[-1]
    position = 1 if matmul.target is _aten.addmm.default else 0
    entry = matmul.args[position]
    if not isinstance(entry, fx.Node) or entry.op == "get_attr":
        return None
    inside = {logits}
    stack = [logits]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is entry or source in inside:
                continue
            if source.op == "placeholder":
                return None
            inside.add(source)
            stack.append(source)
    return inside, entry


def _body(program: Program, result: fx.Node) -> Program:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph_module.graph, copies)
    graph.output((copies[result],))
    module = fx.GraphModule(program.graph_module, graph)
    # Placeholders stay, read or not: the body takes what the program takes.
    for node in reversed(list(module.graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()
    return program.sharing(graph_module=module, output_structure="tensor")


def _head(program: Program, inside: set[fx.Node], entry: fx.Node, logits: fx.Node) -> nn.Module:
    graph = fx.Graph()
    copies = {entry: graph.placeholder("hidden")}
    for node in program.graph_module.graph.nodes:
        if node in inside:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[logits])
    return fx.GraphModule(program.graph_module, graph)
