"""Layers that read one input become one wider layer whose result is cut, and back.

The fused weight is that of its parts, one below the other, and so are its mask, its branch and its bias. `Program.fused` says
which rows were whose. Graph surgery alone: which layers are fused is the business of the pass `fuse_siblings`.

Tensor shape legend: O out features, I in features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsepass.graph.nodes import cut_of, linear_that_reads, memory_sharers
from sparsepass.graph.program import Program, with_sparse
from sparsepass.graph.records import FusedPart, SparseState
from sparsepass.graph.rewrite import (
    attach_branch,
    attach_branch_grid,
    attach_grid,
    attach_logits,
    attach_mask,
    detach_branch,
    detach_grid,
    detach_logits,
    detach_mask,
    finish,
    shared_copy,
)
from sparsepass.graph.rounding import RoundingGrid
from sparsepass.graph.saved import module_stack
from sparsepass.graph.sites import Site

_aten = torch.ops.aten
_Levels = tuple[tuple[str, str], ...]
_LINEAR = "torch.nn.modules.linear.Linear"
_NAMED = 4  # parts that a fused layer is named after


@dataclass(frozen=True, kw_only=True)
class _Beside:
    """What passes have put beside a weight, taken out of the graph."""

    state: SparseState | None = None
    mask: Tensor | None = None
    logits: Tensor | None = None
    branch: Tensor | None = None
    branch_grid: RoundingGrid | None = None
    branch_scales: Tensor | None = None
    projection: Tensor | None = None
    grid: RoundingGrid | None = None
    scales: Tensor | None = None
    zero_points: Tensor | None = None

    def rows(self, start: int, length: int) -> "_Beside":
        """What stands beside some rows. A projection is of all rows, and each layer gets its own."""
        own: dict[str, Any] = {kind: whole.narrow(0, start, length) for kind, whole in self._by_row.items()}
        return replace(self, projection=None if self.projection is None else self.projection.clone(), **own)

    @staticmethod
    def joined(parts: "Sequence[_Beside]") -> "_Beside":
        """What stands beside weights of one kind, as one weight."""
        first = parts[0]
        assert first.projection is None
        whole: dict[str, Any] = {kind: torch.cat([each._by_row[kind] for each in parts]) for kind in first._by_row}
        changes = [each.state.changed_by for each in parts if each.state is not None and each.state.changed_by is not None]
        state = None if first.state is None else replace(first.state, changed_by=changes[0] if changes else None)
        return replace(first, state=state, **whole)

    @property
    def _by_row(self) -> dict[str, Tensor]:
        known = {kind: getattr(self, kind) for kind in ("mask", "logits", "branch", "branch_scales", "scales", "zero_points")}
        return {kind: tensor for kind, tensor in known.items() if tensor is not None}


def fuse(program: Program, sites: Sequence[Site]) -> Site:
    """Put one linear layer in the place of several that read one input.

    The result is cut with one split. Whatever views a part as another shape may copy it now, as it lies within wider rows.

    Args:
        program: Changed in place. The new weight is a copy.
        sites: Two or more linear layers, in the graph's order, with the same input, dtype, kind of mask and branch, all with a
            bias or none, all trained or frozen. Each is the only reader of its weight.

    Returns:
        The fused layer.

    Exactness: equal but for rounding: a wider product may sum in another order.
    """
    graph = program.graph_module.graph
    found = [_take(program, site.weight) for site in sites]
    linears = [_reader(graph, site.weight) for site in sites]
    stacks = [module_stack(node) for node in linears]
    common = _shared(stacks)
    name = _name(program, sites, common[-1][0] if common else "")
    parts = tuple(
        FusedPart(weight=site.weight, bias=site.bias, rows=site.out_features, levels=tuple(stack[len(common) :]))
        for site, stack in zip(sites, stacks, strict=True)
    )
    bias = f"{name}.bias" if sites[0].bias is not None else None
    _join(program, [site.weight for site in sites], f"{name}.weight")
    if bias is not None:
        _join(program, [site.bias for site in sites if site.bias is not None], bias)
    linear = _one_for_many(graph, linears, parts, name, len(common))
    for old in (name for part in parts for name in (part.weight, part.bias) if name is not None):
        program.delete_tensor(old)
    site = replace(
        sites[0],
        name=name,
        weight=f"{name}.weight",
        shape=(sum(part.rows for part in parts), sites[0].in_features),
        out_features=sum(part.rows for part in parts),
        bias=bias,
        splits=tuple(part.rows for part in parts),
        parts=tuple(part.weight for part in parts),
        nodes=(linear.name,),
    )
    program.fused[site.weight] = parts
    _put(program, site, _Beside.joined(found))
    return site


def split_siblings(program: Program, weights: Collection[str] | None = None) -> Program:
    """Give a program whose fused layers are apart again, under the names that they had.

    Args:
        program: Not changed.
        weights: Names of the fused weights that are meant; None for all.

    Returns:
        A program that shares the memory of the weights with the given one; the given one itself where nothing is fused.

    Exactness: weights, masks and branches bitwise; outputs equal but for rounding.

    Example:
        >>> from sparsepass.graph import capture
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.up = nn.Linear(8, 4), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return self.gate(x).sigmoid() * self.up(x)
        >>> program = capture(Net(), torch.randn(2, 8))
        >>> fuse(program, program.sites()).name, [site.name for site in split_siblings(program).sites()]
        ('gate_up', ['gate', 'up'])
    """
    meant = [weight for weight in program.fused if weights is None or weight in weights]
    if not meant:
        return program
    apart = shared_copy(program)
    sites = {site.weight: site for site in program.sites() if site.weight in meant}
    for weight in meant:
        _split(apart, sites[weight])
    finish(apart)
    return apart


def layers_of(program: Program, site: Site) -> tuple[Site, ...]:
    """The layers that a fused site stands for, as if they were apart; the site alone if it is none."""
    parts = program.fused.get(site.weight, ())
    return tuple(
        replace(
            site,
            name=part.name,
            weight=part.weight,
            shape=(part.rows, site.in_features),
            out_features=part.rows,
            bias=part.bias,
            splits=(),
            parts=(),
        )
        for part in parts
    ) or (site,)


def _split(program: Program, site: Site) -> None:
    graph = program.graph_module.graph
    parts, layers = program.fused[site.weight], layers_of(program, site)
    found = _take(program, site.weight)
    linear = _reader(graph, site.weight)
    cut = cut_of(linear, tuple(part.rows for part in parts))
    assert cut is not None
    pieces = {piece.args[1]: piece for piece in cut.users}
    nodes, start = [], 0
    for number, part in enumerate(parts):
        for name, own in (site.weight, part.weight), (site.bias, part.bias):
            if name is not None and own is not None:
                whole = program.tensor(name)
                rows = whole.detach().narrow(0, start, part.rows)
                program.set_tensor(own, nn.Parameter(rows, whole.requires_grad) if isinstance(whole, nn.Parameter) else rows)
        nodes.append(_alone(graph, part, linear, cut, pieces.get(number)))
        start += part.rows
    for dead in (cut, linear, *linear.all_input_nodes[1:]):
        graph.erase_node(dead)
    for name in (site.weight, site.bias):
        if name is not None:
            program.delete_tensor(name)
    del program.fused[site.weight]
    start = 0
    for layer, node in zip(layers, nodes, strict=True):
        _put(program, replace(layer, nodes=(node.name,)), found.rows(start, layer.out_features))
        start += layer.out_features


def _take(program: Program, weight: str) -> _Beside:
    """Take out of a program what passes have put beside a weight."""
    rounding = _take_grid(program, weight)
    state = program.sparse.get(weight)
    if state is None:
        return rounding
    branch, learned = state.branch, state.learned

    def read(name: str | None) -> Tensor | None:
        return None if name is None else program.tensor(name).detach()

    mask, logits = read(state.mask), read(None if learned is None else learned.logits)
    weight_OR, projection = (None, None) if branch is None else (read(branch.weight), read(branch.projection))
    branch_grid = _Beside()
    if branch is not None:
        branch_grid = _take_grid(program, branch.weight)
        detach_branch(program, weight)
    if learned is not None:
        detach_logits(program, weight)
    if mask is not None:
        detach_mask(program, weight)
    del program.sparse[weight]
    return replace(
        rounding,
        state=state,
        mask=mask,
        logits=logits,
        branch=weight_OR,
        branch_grid=branch_grid.grid,
        branch_scales=branch_grid.scales,
        projection=projection,
    )


def _take_grid(program: Program, weight: str) -> _Beside:
    state = program.quantized.get(weight)
    if state is None:
        return _Beside()
    scales, *zero_points = [program.tensor(name) for name in state.names]
    detach_grid(program, weight)
    return _Beside(grid=state.grid, scales=scales, zero_points=zero_points[0] if zero_points else None)


def _put(program: Program, site: Site, found: _Beside) -> None:
    """Put beside a weight what was taken out."""
    if found.state is not None:
        _put_sparse(program, site, found, found.state)
    if found.grid is not None and found.scales is not None:
        attach_grid(program, site, found.grid, found.scales, found.zero_points)


def _put_sparse(program: Program, site: Site, found: _Beside, state: SparseState) -> None:
    if found.mask is None:
        program.sparse[site.weight] = SparseState(pattern=state.pattern, axis=site.nm_axis, mask=None)
    else:
        attach_mask(program, site, found.mask, state.pattern)
    if found.logits is not None:
        n, m = map(int, state.pattern.split(":"))
        attach_logits(program, site, found.logits, n, m)
    if found.branch is not None:
        assert state.branch is not None
        attach_branch(program, site, found.branch, state.branch.k, found.projection)
    if found.branch_grid is not None and found.branch_scales is not None:
        attach_branch_grid(program, site, found.branch_grid, found.branch_scales)
    with_sparse(program, site.weight, changed_by=state.changed_by)


def _join(program: Program, names: Sequence[str], new: str) -> None:
    """Put tensors below each other as a new one."""
    old = [program.tensor(name) for name in names]
    whole = torch.cat([tensor.detach() for tensor in old])
    program.set_tensor(new, nn.Parameter(whole, old[0].requires_grad) if isinstance(old[0], nn.Parameter) else whole)


def _one_for_many(graph: fx.Graph, linears: Sequence[fx.Node], parts: Sequence[FusedPart], name: str, depth: int) -> fx.Node:
    """Put a fused linear and its split in the place of linears, and erase these."""
    first, x = linears[0], linears[0].args[0]
    assert isinstance(x, fx.Node)
    own = ("weight",) if parts[0].bias is None else ("weight", "bias")
    with graph.inserting_before(_start_of_call(first, depth, x)):
        read = [graph.get_attr(f"{name}.{each}") for each in own]
        linear = graph.call_function(_aten.linear.default, (x, *read))
        cut = graph.call_function(_aten.split_with_sizes.default, (linear, [part.rows for part in parts], -1))
        pieces = [graph.call_function(getitem, (cut, number)) for number in range(len(parts))]
    levels = module_stack(first)[:depth]
    _stand(levels, cut, *pieces)
    _stand((*levels, (name, _LINEAR)) if levels else (), *read, linear)
    for old, piece in zip(linears, pieces, strict=True):
        old.replace_all_uses_with(piece)
        unread = old.all_input_nodes[1:]
        graph.erase_node(old)
        for each in unread:
            graph.erase_node(each)
        for node in memory_sharers(piece):
            if node.target is _aten.view.default:  # rows of a part lie apart, and cannot be viewed as any shape
                node.target = _aten.reshape.default
    return linear


def _alone(graph: fx.Graph, part: FusedPart, fused: fx.Node, cut: fx.Node, piece: fx.Node | None) -> fx.Node:
    """Put the linear of a part where its result is read first, and erase its piece of the fused one's."""
    levels = (*module_stack(cut), *part.levels)
    reader = cut
    while piece is not None and piece.users and reader not in piece.users:
        reader = reader.next
    with graph.inserting_before(_start_of_call(reader, len(_shared([levels, module_stack(reader)])), cut)):
        read = [graph.get_attr(name) for name in (part.weight, part.bias) if name is not None]
        linear = graph.call_function(_aten.linear.default, (fused.args[0], *read))
    _stand(levels, *read, linear)
    if piece is not None:
        piece.replace_all_uses_with(linear)
        graph.erase_node(piece)
    return linear


def _reader(graph: fx.Graph, weight: str) -> fx.Node:
    node = linear_that_reads(graph, weight)
    assert node is not None, weight
    return node


def _start_of_call(node: fx.Node, depth: int, after: fx.Node) -> fx.Node:
    """The first node of the module call at some depth that a node is in, but not before another one.

    A node of the parent in the midst of a module's nodes would cut the call in two, and the hierarchy with it.
    """
    inside = module_stack(node)[: depth + 1]
    while len(inside) > depth and node.prev is not after and module_stack(node.prev)[: depth + 1] == inside:
        node = node.prev
    return node


def _shared(stacks: Sequence[_Levels]) -> _Levels:
    """The levels that all stacks begin with."""
    depth = 0
    while all(len(stack) > depth for stack in stacks) and len({stack[depth] for stack in stacks}) == 1:
        depth += 1
    return stacks[0][:depth]


def _stand(levels: _Levels, *nodes: fx.Node) -> None:
    for node in nodes if levels else ():
        node.meta["nn_module_stack"] = {f"L__self__{level[0]}": level for level in levels}


def _name(program: Program, sites: Sequence[Site], parent: str) -> str:
    """A module path for a fused layer that nothing has yet, beside its parts."""
    ends = [site.name.removeprefix(f"{parent}.").replace(".", "_") for site in sites]
    rest = f"_and_{len(ends) - _NAMED}_more" if len(ends) > _NAMED else ""
    name = ".".join(filter(None, (parent, "_".join(ends[:_NAMED]) + rest)))
    names = {*program.tensors(), *program.aliases}
    taken = names | {each[:end] for each in names for end, letter in enumerate(each) if letter == "."}
    while name in taken:
        name += "_"
    return name
