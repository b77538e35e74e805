"""Makes a module tree lean for training: its backward pass keeps and computes no more than it needs.

Shape suffixes: I input features, O output features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from sparsepass.graph.attention import takes_all
from sparsepass.graph.hierarchy import Hierarchy, write_code
from sparsepass.graph.ops import where_kept
from sparsepass.graph.rounding import NumberFormat, RoundingGrid, on_grid
from sparsepass.retrain.masks import row_pieces

_aten = torch.ops.aten
_MASKED = torch.ops.sparsepass.masked_weight.default
_QUANTIZED = torch.ops.sparsepass.quantized_weight.default


def make_lean(hierarchy: Hierarchy) -> None:
    """Rewrite the graphs of a module tree so that training it takes less memory and time.

    - A mask and the linear layer behind it become one call, which keeps the weight and the mask for the backward pass. They
      are in memory anyway; their product is not. So does a rounding, with its mask if it has one: weights are rounded again in
      the backward pass.
    - The gate of a SwiGLU and its product with the other branch become one call, which keeps the two inputs and computes the
      gate again in the backward pass.
    - Slices that take everything, which export writes for ``x[:, None]``, go: their backward pass copies into zeros.
    - What export knew of each operation (its place in the source, sizes, types) goes: it is megabytes a layer.

    Args:
        hierarchy: Changed in place.

    Exactness: results and gradients are bitwise what they were.
    """
    for module in hierarchy.modules():
        graph = getattr(module, "graph", None)
        for node in list(graph.nodes) if isinstance(graph, fx.Graph) else ():
            if takes_all(node):
                node.replace_all_uses_with(node.args[0])
                node.graph.erase_node(node)
            elif node.target is _aten.linear.default and len(node.args[1].users) == 1:
                _merge_linear(node)
            elif node.target is _aten.mul.Tensor:
                _merge_gate(node, module)
        if isinstance(graph, fx.Graph) and module is not hierarchy.tree:  # the root checks its inputs by what it knows of them
            for node in graph.nodes:
                node.meta = {}
    write_code(hierarchy.tree)


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer with a masked weight, and forget the masked weight.

    Shapes: input ``[..., I]``, weight and mask (bool) ``[O, I]``, bias ``[O]`` -> ``[..., O]``.

    Source: AST, arXiv 2407.20584, section 3 (straight-through gradient to the dense weight behind a mask).
    Exactness: bitwise ``linear(input, masked_weight(weight, mask), bias)``, gradients and autocast included.

    >>> masked_linear(torch.ones(3, 2), torch.tensor([[1.0, -2.0]]), torch.tensor([[True, False]])).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    return _linear(input, weight, mask, None, None, None, bias)


def quantized_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    group_size: int,
    format: NumberFormat = "int",
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer with a weight that is masked, if there is a mask, and rounded, and forget the rounded weight.

    Shapes: input ``[..., I]``, weight and mask (bool) ``[O, I]``, scales and zero points ``[O, G]``, bias ``[O]`` ->
    ``[..., O]``.

    Source: AST, arXiv 2407.20584, section 3, and straight-through rounding, arXiv 1712.05877, section 3: the gradient reaches
    the whole weight.
    Exactness: bitwise ``linear(input, quantized_weight(masked_weight(weight, mask), ...), bias)``, gradients and autocast
    included.

    >>> weight, scales = torch.tensor([[7.0, -3.4]]), torch.ones(1, 1).bfloat16()
    >>> quantized_linear(torch.ones(3, 2), weight, None, scales, None, 4, 0).flatten().tolist()
    [4.0, 4.0, 4.0]
    """
    grid = RoundingGrid(bits=bits, group_size=group_size, symmetric=zero_points is None, format=format)
    return _linear(input, weight, mask, scales, zero_points, grid, bias)


def _linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scales: Tensor | None,
    zeros: Tensor | None,
    grid: RoundingGrid | None,
    bias: Tensor | None,
) -> Tensor:
    kind = input.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if low is not None:
        input, bias = input.to(low), None if bias is None else bias.to(low)
    found: Tensor = _LeanLinear.apply(input, weight, mask, scales, zeros, grid, bias, low)  # type: ignore[no-untyped-call]
    return found


class _LeanLinear(torch.autograd.Function):
    """See `masked_linear` and `quantized_linear`. No weight that is made of the stored one outlives a pass."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight_OI: Tensor,
        mask_OI: Tensor | None,
        scales_OG: Tensor | None,
        zeros_OG: Tensor | None,
        grid: RoundingGrid | None,
        bias_O: Tensor | None,
        low: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight_OI, mask_OI, scales_OG, zeros_OG)
        ctx.grid = grid
        used_OI = _used(weight_OI, mask_OI, scales_OG, zeros_OG, grid, low or weight_OI.dtype)
        return torch.nn.functional.linear(input, used_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight_OI, mask_OI, scales_OG, zeros_OG = ctx.saved_tensors
        to_input = to_weight_OI = to_bias_O = None
        flat_NO = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            used_OI = _used(weight_OI, mask_OI, scales_OG, zeros_OG, ctx.grid, grad.dtype)
            to_input = (flat_NO @ used_OI).view(input.shape)
        if ctx.needs_input_grad[1]:
            to_weight_OI = (flat_NO.t() @ input.flatten(0, -2)).to(weight_OI.dtype)
        if ctx.needs_input_grad[6]:
            to_bias_O = flat_NO.sum(0)
        return to_input, to_weight_OI, None, None, None, None, to_bias_O, None


def _used(
    weight_OI: Tensor,
    mask_OI: Tensor | None,
    scales_OG: Tensor | None,
    zeros_OG: Tensor | None,
    grid: RoundingGrid | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight that a layer computes with: behind its mask and its rounding, where it has such."""
    if grid is None or scales_OG is None:
        assert mask_OI is not None
        return where_kept(weight_OI.to(dtype), mask_OI)
    used_OI = torch.empty_like(weight_OI, dtype=dtype)
    for rows, weight, used in row_pieces(weight_OI, used_OI):
        kept = weight if mask_OI is None else where_kept(weight, mask_OI[rows])
        zeros = None if zeros_OG is None else zeros_OG[rows]
        used.copy_(on_grid(kept, grid, scales_OG[rows], zeros))
    return used_OI


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, keeping its inputs alone and writing over what nobody needs any more.

    Shapes: both ``[...]``; where shapes or dtypes differ, it is computed as it is written.

    Source: SwiGLU, arXiv 2002.05202, section 2.
    Exactness: bitwise ``silu(gate) * up``, gradients included.

    >>> gated_silu(torch.tensor([0.0, 20.0]), torch.tensor([3.0, 2.0])).round().tolist()
    [0.0, 40.0]
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return torch.nn.functional.silu(gate) * up
    found: Tensor = _GatedSiLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return found


class _GatedSiLU(torch.autograd.Function):
    """See `gated_silu`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        to_gate = to_up = None
        if ctx.needs_input_grad[0]:
            to_gate = _aten.silu_backward.default(grad * up, gate)
        if ctx.needs_input_grad[1]:
            to_up = torch.nn.functional.silu(gate).mul_(grad)
        return to_gate, to_up


def _merge_gate(product: fx.Node, owner: torch.nn.Module) -> None:
    """Merge a product with the SiLU before it, if nothing else reads that one."""
    for gate, up in (product.args, product.args[::-1]):
        if not isinstance(gate, fx.Node) or not isinstance(up, fx.Node) or gate is up:
            return  # a number, or a square
        if list(gate.users) == [product] and _is_silu(gate, owner):
            _merge([gate], product, gated_silu, gate.args[0], up)
            return


def _is_silu(node: fx.Node, owner: torch.nn.Module) -> bool:
    """Whether it is the operation, or calls a module that is nothing else, as transformers' models have it."""
    if node.op != "call_module":
        return node.target is _aten.silu.default
    graph = getattr(owner.get_submodule(str(node.target)), "graph", None)
    inner = [one for one in graph.nodes if one.op not in ("placeholder", "output")] if isinstance(graph, fx.Graph) else []
    return len(inner) == 1 and inner[0].target is _aten.silu.default and len(node.args) == 1


def _merge_linear(linear: fx.Node) -> None:
    source, used, *bias = linear.args
    assert isinstance(used, fx.Node)
    if used.target is _MASKED:
        _merge([used], linear, masked_linear, source, *used.args, *bias)
    elif used.target is _QUANTIZED and used.args[5] == 1:
        behind, scales, zeros, bits, size, _, number_format = (*used.args, "int")[:7]
        grid = scales, zeros, bits, size, number_format
        assert isinstance(behind, fx.Node)
        if behind.target is _MASKED and len(behind.users) == 1:
            _merge([used, behind], linear, quantized_linear, source, *behind.args, *grid, *bias)
        else:
            _merge([used], linear, quantized_linear, source, behind, None, *grid, *bias)


def _merge(inner: Sequence[fx.Node], outer: fx.Node, function: Callable[..., Tensor], *args: Any) -> None:
    """Put one call in the place of operations that only one after them reads, each the one before it."""
    with outer.graph.inserting_before(outer):
        merged = outer.graph.call_function(function, args)
    outer.replace_all_uses_with(merged)
    for node in (outer, *inner):
        outer.graph.erase_node(node)
