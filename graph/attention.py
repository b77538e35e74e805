"""Attention made cheaper where its inputs allow it: told that it is causal, and given keys and values without copies.

A captured language model makes its attention mask from ``attention_mask``, and so it computes every pair of tokens and throws
half of them away. Where a text has no padding, the mask is the plain causal one, and the operation's ``is_causal`` gives the
same result for half the work; on a GPU it opens the way to kernels that take no mask. Where several query heads share a key
head, capture leaves copies of the keys and values, one a query head; the operation can read the shared ones itself.

Tensor shape legend: Q queries, K keys, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparsepass.graph.nodes import ancestors
from sparsepass.graph.program import Program

_aten = torch.ops.aten
ATTENTION = _aten.scaled_dot_product_attention.default
_TO_THE_END = 2**63 - 1
_MASK = 3  # its position among the operation's arguments; dropout and is_causal follow
# What these make of a tensor depends on its shape alone.
_SHAPE_ONLY = {
    _aten.sym_size.int, _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default, _aten.empty_like.default,
    _aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default, _aten.new_empty.default,
}  # fmt: skip


def is_causal_mask(mask: Tensor, num_tokens: int) -> bool:
    """Whether an attention mask lets each of T tokens see exactly those up to its own position, and adds nothing to them.

    Shapes: mask ``[..., Q, K]``, bool (true where seen) or float (added to the scores); causal ones have Q = K = T.

    >>> is_causal_mask(torch.ones(1, 1, 3, 3).tril().bool(), 3), is_causal_mask(torch.ones(1, 1, 3, 3).bool(), 3)
    (True, False)
    """
    if mask.shape[-2:] != (num_tokens, num_tokens):
        return False
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return bool((mask == seen).all())
    # A float mask hides with -inf, or with a number so low that nothing is left of the score.
    hidden = torch.finfo(mask.dtype).min / 2
    return bool(torch.where(seen, mask == 0, mask <= hidden).all())


def mask_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The mask among the arguments of a call of `ATTENTION`; None if there is none."""
    return args[_MASK] if len(args) > _MASK else kwargs.get("attn_mask")


def told_causal(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `ATTENTION`, without its mask and causal instead."""
    kept = {name: value for name, value in kwargs.items() if name not in ("attn_mask", "is_causal")}
    dropout = args[_MASK + 1] if len(args) > _MASK + 1 else kept.pop("dropout_p", 0.0)
    return (*args[:_MASK], None, dropout, True), kept


def drop_causal_masks(program: Program, num_tokens: int) -> int:
    """Tell a program's attention that it is causal wherever its mask is just that for texts of one length without padding.

    The masks are computed and compared, so that a sliding window shorter than the text, ALiBi or full attention stays as it is.
    From then on the program is right only for sequences of at most ``num_tokens`` tokens without padding.

    Args:
        program: A language model that takes ``input_ids`` and perhaps ``attention_mask``. Its graph is changed in place.
        num_tokens: T, the longest sequence that it will get.

    Returns:
        How many attention operations lost their mask.

    Exactness: the same sums in another order: results differ by rounding.
    """
    graph = program.graph_module.graph
    calls: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        mask = mask_of(node.args, node.kwargs) if node.target is ATTENTION else None
        if isinstance(mask, fx.Node):
            calls.setdefault(mask, []).append(node)
    calls = {mask: found for mask, found in calls.items() if _made_of_shapes(mask)}
    dropped = 0
    for mask, value in _values(program, list(calls), num_tokens).items():
        if not is_causal_mask(value, num_tokens):
            continue
        for node in calls[mask]:
            node.args, node.kwargs = told_causal(node.args, node.kwargs)
            dropped += 1
    if dropped:
        graph.eliminate_dead_code()
        program.graph_module.recompile()
    return dropped


def share_heads(program: Program) -> int:
    """Let causal attention read the keys and values that several query heads share, instead of a copy for each.

    The copies would be kept for the backward pass. Only what runs on a processor is changed: on a GPU, the kernels for float32
    take no shared heads.

    Args:
        program: Its graph is changed in place.

    Returns:
        How many attention operations were changed.

    Exactness: results are bitwise the same; gradients of keys and values are summed in another order.
    """
    if program.device.type != "cpu":
        return 0
    graph = program.graph_module.graph
    changed = 0
    for node in graph.nodes:
        if node.target is not ATTENTION or node.args[_MASK:] != (None, 0.0, True):
            continue
        query, *copies = node.args[:_MASK]
        keys, values = map(_repeated, copies)
        if keys is None or values is None or keys[1] != values[1]:
            continue
        node.args = (query, keys[0], values[0], None, 0.0, True)
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        changed += 1
    if changed:
        graph.eliminate_dead_code()
        program.graph_module.recompile()
    return changed


def takes_all(node: Any) -> bool:
    """Whether a node is a slice that leaves its input as it is."""
    if not _calls(node, _aten.slice.Tensor):
        return False
    given = dict(zip(("source", "axis", "start", "end", "step"), node.args, strict=False))
    return given.get("start") in (None, 0) and given.get("end") in (None, _TO_THE_END) and given.get("step", 1) == 1


def _repeated(copy: Any) -> tuple[fx.Node, int] | None:
    """What ``[B, K, T, D]`` was repeated to ``[B, K * n, T, D]``, each head n times in a row, and n; None if it was not."""
    if not _calls(copy, _aten.reshape.default, _aten.view.default):
        return None
    node, merged = copy.args
    if _calls(node, _aten.clone.default):
        node = node.args[0]
    if not _calls(node, _aten.expand.default) or len(node.args[1]) != 5:
        return None
    batch, heads, times, *rest = node.args[1]
    if not (isinstance(heads, int) and isinstance(times, int)) or list(merged) != [batch, heads * times, *rest]:
        return None
    before = _before_slices(node.args[0])
    if not _calls(before, _aten.unsqueeze.default) or before.args[1] != 2:
        return None
    return _before_slices(before.args[0]), times


def _before_slices(node: Any) -> Any:
    while takes_all(node):
        node = node.args[0]
    return node


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _made_of_shapes(mask: fx.Node) -> bool:
    """Whether a mask depends on shapes and on ``attention_mask`` only, and not on which tokens there are."""
    above = ancestors(mask)
    others = (node for node in above if node.op == "placeholder" and node.target != "attention_mask")
    return all(user not in above or user.target in _SHAPE_ONLY for node in others for user in node.users)


@torch.no_grad()
def _values(program: Program, masks: list[fx.Node], num_tokens: int) -> dict[fx.Node, Tensor]:
    """The masks for sequences of T tokens without padding."""
    if not masks:
        return {}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    wanted = set().union(*(ancestors(mask) for mask in masks))
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[mask] for mask in masks))
    ids = torch.zeros(len(program.example_inputs["input_ids"]), num_tokens, dtype=torch.int64, device=program.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = program.flat_inputs(**{name: given[name] for name in program.input_names})
    found = fx.GraphModule(program.graph_module, graph)(*inputs.values())
    return {mask: value for mask, value in zip(masks, found, strict=True) if isinstance(value, Tensor)}
