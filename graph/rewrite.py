"""Graph surgery: what a rewrite inserts and removes, for good or for a while. It knows where nodes go and no maths.

Node metadata matters here: `nn_module_stack` says which module a node belongs to, and the hierarchy is built from it, so
every new node takes the stack of the operation it serves and stands right beside it.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsepass.graph.nodes import module_path
from sparsepass.graph.ops import where_kept
from sparsepass.graph.program import Program, masked_weight, with_sparse
from sparsepass.graph.records import BranchState, LearnedState, QuantizedState, SparseState
from sparsepass.graph.rounding import RoundingGrid
from sparsepass.graph.sites import Site
from sparsepass.graph.soft_masks import candidate_masks, hard_mask

_aten = torch.ops.aten
_MASKED = torch.ops.sparsepass.masked_weight.default
_LEARNED = torch.ops.sparsepass.learned_weight.default
_QUANTIZED = torch.ops.sparsepass.quantized_weight.default


def attach_mask(program: Program, site: Site, mask: Tensor, pattern: str) -> None:
    """Put a mask between a site's weight and the operations that read it.

    Args:
        program: Changed in place.
        site: A site of it that has no mask yet.
        mask: Bool, shaped like the stored weight.
        pattern: N:M, such as ``2:4``.
    """
    graph = program.graph_module.graph
    name = beside(site, "mask")
    program.set_tensor(name, mask)
    for source, user in _weight_users(program, site.weight):
        anchor = _consumer(user)
        with graph.inserting_before(user):
            mask_node = graph.get_attr(name)
            masked = graph.call_function(_MASKED, (source, mask_node))
        _inherit(anchor, mask_node, masked)
        user.replace_input_with(source, masked)
    program.sparse[site.weight] = SparseState(pattern=pattern, axis=site.nm_axis, mask=name)


def attach_logits(program: Program, site: Site, logits: Tensor, n: int, m: int) -> None:
    """Let a site's mask be learned: the mask becomes the hard one of the logits, and the graph reads all three.

    Args:
        program: Changed in place.
        site: A site of it that has a mask, which is not learned yet.
        logits: Shaped like the weight with its N:M axis at the end and cut in two, ``[..., C, G]``.
        n: Entries kept of a group.
        m: Length of a group.
    """
    state = program.sparse[site.weight]
    assert state.mask is not None
    graph = program.graph_module.graph
    learned = LearnedState(logits=beside(site, "mask_logits"), control=beside(site, "mask_control"))
    assert logits.shape[-2] == len(candidate_masks(n, m))
    mask = hard_mask(logits.detach(), n, m).movedim(-1, site.nm_axis).contiguous()
    program.set_tensor(state.mask, mask)
    program.set_tensor(learned.logits, nn.Parameter(logits))
    program.set_tensor(learned.control, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=logits.device))
    for node in list(graph.nodes):
        if node.target is _MASKED and node.args[1].target == state.mask:
            with graph.inserting_before(node):
                read = [graph.get_attr(name) for name in (learned.logits, learned.control)]
                soft = graph.call_function(_LEARNED, (*node.args, *read, n, m, site.nm_axis))
            _inherit(node, *read, soft)
            node.replace_all_uses_with(soft)
            graph.erase_node(node)
    with_sparse(program, site.weight, learned=learned)


def detach_logits(program: Program, weight: str) -> None:
    """Undo `attach_logits`: the mask stays as it is, and nothing is learned any more. Exact where the mask was hard.

    Args:
        program: Changed in place.
        weight: One whose mask is being learned.
    """
    state = program.sparse[weight]
    assert state.mask is not None
    assert state.learned is not None
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _LEARNED and node.args[1].target == state.mask:
            source, mask, *read = node.args[:4]
            with graph.inserting_before(node):
                masked = graph.call_function(_MASKED, (source, mask))
            _inherit(node, masked)
            node.replace_all_uses_with(masked)
            graph.erase_node(node)
            for unread in read:
                graph.erase_node(unread)
    program.delete_tensor(state.learned.logits)
    program.delete_tensor(state.learned.control)
    with_sparse(program, weight, learned=None)


def fold_mask(program: Program, weight: str, *, inplace: bool = False) -> None:
    """Write a mask's zeros into the weight, and take the mask out of the graph. Exact.

    Args:
        program: Changed in place.
        weight: One with a mask; one that is being learned stops being so.
        inplace: Whether the zeros go into the tensor that is there; by default the program gets a new one.
    """
    state = program.sparse[weight]
    assert state.mask is not None
    if state.learned is not None:
        detach_logits(program, weight)
    folded = where_kept(program.tensor(weight).detach(), program.tensor(state.mask))
    if inplace:
        program.write_tensor(weight, folded)
    else:
        program.set_tensor(weight, folded)
    detach_mask(program, weight)


def detach_mask(program: Program, weight: str) -> None:
    """Take a mask out of the graph: what reads the weight sees all of it.

    Args:
        program: Changed in place.
        weight: One with a mask that is not being learned.
    """
    state, graph = program.sparse[weight], program.graph_module.graph
    assert state.mask is not None
    for node in list(graph.nodes):
        if node.target is _MASKED and node.args[1].target == state.mask:
            source, mask_node = node.args
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            if not mask_node.users:
                graph.erase_node(mask_node)
    program.delete_tensor(state.mask)
    with_sparse(program, weight, mask=None)


def attach_grid(program: Program, site: Site, grid: RoundingGrid, scales: Tensor, zero_points: Tensor | None) -> None:
    """Round a site's weight to a grid in front of the operations that read it, behind its mask if it has one.

    Args:
        program: Changed in place. The weight keeps its values.
        site: A site of it that is not quantized yet. An embedding that is tied to it is rounded with it.
        grid: Format, bits, groups and symmetry.
        scales: bfloat16, ``[O, G]``, or ``[E, O, G]`` for experts.
        zero_points: uint8, like the scales; None for a symmetric grid.
    """
    zeros = None if zero_points is None else beside(site, "zero_points")
    state = _state_of(grid, site.nm_axis, beside(site, "scales"), zeros)
    if zero_points is not None and state.zero_points is not None:
        program.set_tensor(state.zero_points, zero_points)
    _round_reads(program, site.weight, state, scales)


def attach_branch_grid(program: Program, site: Site, grid: RoundingGrid, scales: Tensor) -> None:
    """Round S of a site's SLoRB branch to a grid in front of its product, as `attach_grid` does with a weight.

    Args:
        program: Changed in place. S keeps its values.
        site: A site of it with a branch, which is not rounded yet.
        grid: A symmetric one.
        scales: bfloat16, ``[O, G]``.
    """
    branch = program.sparse[site.weight].branch
    assert branch is not None
    _round_reads(program, branch.weight, _state_of(grid, 1, beside(site, "slorb_scales"), None), scales)


def _state_of(grid: RoundingGrid, axis: int, scales: str, zero_points: str | None) -> QuantizedState:
    return QuantizedState(
        bits=grid.bits,
        group_size=grid.group_size,
        axis=axis,
        scales=scales,
        zero_points=zero_points,
        format=grid.format,
    )


def _round_reads(program: Program, weight: str, state: QuantizedState, scales: Tensor) -> None:
    """Put the rounding of a weight between it (or its mask) and what reads it."""
    graph = program.graph_module.graph
    program.set_tensor(state.scales, scales)
    read_at = [node for node in graph.nodes if node.op == "get_attr" and node.target == weight]
    behind = [user for node in read_at for user in node.users if user.target in (_MASKED, _LEARNED)]
    for value in behind or read_at:
        first = next(node for node in graph.nodes if node in value.users)
        with graph.inserting_before(first):
            read = [graph.get_attr(name) for name in state.names]
            zero = read[1] if len(read) > 1 else None
            rounded = graph.call_function(_QUANTIZED, (value, read[0], zero, *state.call))
        _inherit(_consumer(first), *read, rounded)
        value.replace_all_uses_with(rounded, delete_user_cb=lambda user, rounded=rounded: user is not rounded)
    program.quantized[weight] = state


def detach_grid(program: Program, weight: str) -> None:
    """Undo `attach_grid`: what reads the weight sees the values that were behind the rounding.

    Args:
        program: Changed in place.
        weight: One that is quantized.
    """
    state, graph = program.quantized[weight], program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _QUANTIZED and node.args[1].target == state.scales:
            node.replace_all_uses_with(node.args[0])
            read = [each for each in node.args[1:3] if each is not None]
            graph.erase_node(node)
            for unread in read:
                graph.erase_node(unread)
    for name in state.names:
        program.delete_tensor(name)
    del program.quantized[weight]


def fold_grid(program: Program, weight: str) -> None:
    """Write the rounded values into the weight, a new tensor, and take the rounding out of the graph. Exact.

    Args:
        program: Changed in place.
        weight: One that is quantized. A mask stays.
    """
    program.set_tensor(weight, masked_weight(program, weight))
    detach_grid(program, weight)


def attach_branch(program: Program, site: Site, weight: Tensor, k: int, projection: Tensor | None = None) -> None:
    """Add a SLoRB branch, ``y += S (X x)``, to a site.

    Siblings that read the same activation share one segment sum where the projection is fixed.

    Args:
        program: Changed in place.
        site: A site with a sparse weight.
        weight: S, shape [out, in/k].
        k: Input features summed into one.
        projection: X, shape [in/k, in], if it is trainable.
    """
    graph = program.graph_module.graph
    state = BranchState(
        k=k,
        weight=beside(site, "slorb_weight"),
        projection=beside(site, "slorb_projection") if projection is not None else None,
    )
    program.set_tensor(state.weight, nn.Parameter(weight))
    if projection is not None and state.projection is not None:
        program.set_tensor(state.projection, nn.Parameter(projection))
    by_name = {node.name: node for node in graph.nodes}
    for use in site.nodes:
        node = by_name[use]
        x = node.args[0] if node.target is not _aten.addmm.default else node.args[1]
        assert isinstance(x, fx.Node)
        with graph.inserting_before(node):
            if state.projection is None:
                projected = _segment_sum(graph, x, node, site, k)
            else:
                projection_node = graph.get_attr(state.projection)
                projected = graph.call_function(_aten.linear.default, (x, projection_node))
                _inherit(node, projection_node, projected)
        with graph.inserting_after(node):
            weight_node = graph.get_attr(state.weight)
        with graph.inserting_after(weight_node):
            branch = graph.call_function(_aten.linear.default, (projected, weight_node))
        with graph.inserting_after(branch):
            total = graph.call_function(_aten.add.Tensor, (node, branch))
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        _inherit(node, weight_node, branch, total)
    with_sparse(program, site.weight, branch=state)


def detach_branch(program: Program, weight: str) -> None:
    """Undo `attach_branch`, and `attach_branch_grid`.

    Args:
        program: Changed in place.
        weight: One with a branch.
    """
    state, graph = program.sparse[weight].branch, program.graph_module.graph
    assert state is not None
    if state.weight in program.quantized:
        detach_grid(program, state.weight)
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target != state.weight:
            continue
        (branch,) = node.users
        (total,) = branch.users
        total.replace_all_uses_with(total.args[0])
        kept, unread = total.args[0], [total]
        while unread:  # the sum of segments goes with the last sibling
            dead = unread.pop()
            if not dead.users and dead.op != "placeholder":
                sources = [source for source in dead.all_input_nodes if source is not kept]
                graph.erase_node(dead)
                unread += sources
    for name in state.weight, state.projection:
        if name is not None:
            program.delete_tensor(name)
    with_sparse(program, weight, branch=None)


def shared_copy(program: Program, **changes: Any) -> Program:
    """A program with a graph of its own that shares every tensor with the given one, which stays as it is.

    Args:
        program: Not changed, whatever is done to the graph of the copy.
        changes: Fields that are to be another, such as ``sparse``.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    shared = program.sharing(graph_module=fx.GraphModule(program.graph_module, graph), **changes)
    for name in program.tensors().keys() - shared.tensors().keys():  # GraphModule keeps only what the graph reads
        shared.set_tensor(name, program.tensor(name))
    return shared


def beside(site: Site, name: str) -> str:
    """Name of a tensor that stands beside a site's weight: ``q_proj.mask``, ``experts.gate_up_proj_mask``."""
    if site.weight == "weight" or site.weight.endswith(".weight"):
        return f"{site.weight.removesuffix('weight')}{name}"
    return f"{site.weight}_{name}"


def finish(program: Program) -> None:
    """Check the graph and compile it, once, after any number of rewrites."""
    program.graph_module.graph.lint()
    program.graph_module.recompile()


def _segment_sum(graph: fx.Graph, x: fx.Node, consumer: fx.Node, site: Site, k: int) -> fx.Node:
    segments = site.in_features // k
    # Siblings share it, so it belongs to the module that holds them; unless the layer is no module of its own.
    in_own_module = module_path(consumer) == site.name and module_path(x) != site.name
    for user in x.users:
        if user.target is not _aten.unflatten.int or user.args != (x, -1, [segments, k]):
            continue
        for total in user.users:
            if total.target is _aten.sum.dim_IntList and total.args == (user, [-1]):
                _move_before(_module_start(consumer, x), (user, total))
                return total
    with graph.inserting_before(_module_start(consumer, x)):
        split = graph.call_function(_aten.unflatten.int, (x, -1, [segments, k]))
        total = graph.call_function(_aten.sum.dim_IntList, (split, [-1]))
    _inherit(consumer, split, total, levels_up=int(in_own_module))
    return total


def _module_start(node: fx.Node, x: fx.Node) -> fx.Node:
    """The first node of the module call that ``node`` is in, but after ``x``.

    A node of the parent in the midst of a module's nodes would cut the call in two, and the hierarchy with it.
    """
    path = module_path(node)
    while node.prev is not x and node.prev.op not in ("root", "placeholder") and module_path(node.prev) == path:
        node = node.prev
    return node


def _move_before(consumer: fx.Node, nodes: tuple[fx.Node, ...]) -> None:
    """Siblings may be rewritten in any order: a shared node must stand before the first of them."""
    for node in consumer.graph.nodes:
        if node is nodes[0]:
            return
        if node is consumer:
            break
    for node in nodes:
        consumer.prepend(node)


def _inherit(source: fx.Node, *nodes: fx.Node, levels_up: int = 0) -> None:
    """Put new nodes into the module of another node, or so many levels above it."""
    stack = dict(source.meta.get("nn_module_stack") or {})
    for _ in range(min(levels_up, max(len(stack) - 1, 0))):
        stack.popitem()
    for node in nodes if stack else ():
        node.meta["nn_module_stack"] = dict(stack)


def _weight_users(program: Program, weight: str) -> list[tuple[fx.Node, fx.Node]]:
    return [
        (node, user)
        for node in program.graph_module.graph.nodes
        if node.op == "get_attr" and node.target == weight
        for user in list(node.users)
        if user.target is not _aten.embedding.default
    ]


def _consumer(node: fx.Node) -> fx.Node:
    """The matmul that a (possibly transposed) weight ends up in."""
    while node.target in (_aten.t.default, _aten.transpose.int, _aten.permute.default) and len(node.users) == 1:
        (node,) = node.users
    return node


@contextlib.contextmanager
def without_branches(program: Program, weights: Collection[str] | None = None) -> Iterator[None]:
    """Switch SLoRB branches off for as long as the block runs, to measure the sparse weights alone.

    Args:
        program: It is as before afterwards.
        weights: Names of the weights whose branches are meant; None for all.
    """
    branches = [state.branch for weight, state in program.sparse.items() if weights is None or weight in weights]
    old = {branch.weight: program.tensor(branch.weight) for branch in branches if branch is not None}
    try:
        for name, tensor in old.items():
            program.set_tensor(name, torch.zeros_like(tensor))
        yield
    finally:
        for name, tensor in old.items():
            program.set_tensor(name, tensor)
