"""What CAST changes in a program: two learnable scales per row beside each masked weight, folded in at the end.

Shape suffixes, of the matrix along whose last axis N:M runs: O rows, I columns.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from sparsepass.graph import Program, Site
from sparsepass.graph.rewrite import beside, finish

_aten = torch.ops.aten
_MASKED = torch.ops.sparsepass.masked_weight.default


def attach_scales(program: Program, sites: Iterable[Site]) -> dict[str, str]:
    """Multiply each masked linear weight by learnable scales: ``W_eff[r, c] = W[r, c] A[r, c // (in/2)]``, A starting at one.

    Layers of other kinds, and such with an odd number of input features, have none.

    Args:
        program: Changed in place.
        sites: Those with masks.

    Returns:
        Weight name -> name of its scales, a parameter ``[out, 2]``.

    Source: CAST, arXiv 2509.25996.
    """
    graph = program.graph_module.graph
    scales: dict[str, str] = {}
    by_weight = {site.weight: site for site in sites}
    for weight, site in by_weight.items():
        if site.layout not in ("linear", "conv1d_hf") or site.in_features % 2:
            continue
        name = beside(site, "cast_scales")
        tensor = program.tensor(weight)
        program.set_tensor(name, nn.Parameter(torch.ones(site.out_features, 2, dtype=tensor.dtype, device=tensor.device)))
        scales[weight] = name
    for node in [n for n in graph.nodes if n.target is _MASKED]:
        source = node.args[0]
        if source.op == "get_attr" and source.target in scales:
            _scale(node, source, by_weight[source.target], scales[source.target])
    finish(program)
    return scales


def fold_scales(program: Program, scales: Mapping[str, str], sites: Mapping[str, Site]) -> None:
    """Write the scales into the weights and take them out of the graph. Exact up to the order of the two products."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _MASKED and node.args[0].op == "call_function":
            source = _scaled_source(node, scales)
            if source is not None:
                node.replace_input_with(node.args[0], source)
    graph.eliminate_dead_code()
    for weight, name in scales.items():
        tensor = program.tensor(weight)
        with torch.no_grad():
            halves_O2I = torch.unflatten(sites[weight].to_matrix(tensor), -1, (2, -1))
            scaled_OI = (halves_O2I * program.tensor(name).unsqueeze(-1)).flatten(-2)
            tensor.copy_(sites[weight].from_matrix(scaled_OI))
        program.delete_tensor(name)
    finish(program)


def _scale(masked: fx.Node, source: fx.Node, site: Site, name: str) -> None:
    graph = masked.graph
    axis = site.nm_axis
    with graph.inserting_before(masked):
        scales = graph.get_attr(name)
        split = graph.call_function(_aten.unflatten.int, (source, axis, [2, site.in_features // 2]))
        along = scales if axis == 1 else graph.call_function(_aten.transpose.int, (scales, 0, 1))
        wide = graph.call_function(_aten.unsqueeze.default, (along, axis + 1))
        product = graph.call_function(_aten.mul.Tensor, (split, wide))
        result = graph.call_function(_aten.flatten.using_ints, (product, axis, axis + 1))
    node = scales
    while node is not masked:
        if stack := masked.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = dict(stack)
        node = node.next
    masked.replace_input_with(source, result)


def _scaled_source(masked: fx.Node, scales: Mapping[str, str]) -> fx.Node | None:
    """The node that reads the weight which `_scale` multiplied, if it stands before this mask."""
    stack = list(masked.all_input_nodes)
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.target in scales:
            return node
        stack.extend(node.all_input_nodes)
    return None
