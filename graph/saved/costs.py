"""What an operator takes, by the shapes of its arguments and results: bytes, operations, tensors."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_COST_OF_ENTRY = 20  # reading or writing one, in operations of a matmul
_SECOND_OPERAND = {"addmm", "baddbmm", "addbmm", "addmv"}  # the first one is added
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "mv", "dot", "inner", "_grouped_mm", "grouped_mm_fallback", *_SECOND_OPERAND}
_POOLS = {
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "im2col",
}
_CUTS = {"split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a result or an argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def operations(target: torch._ops.OpOverload, args: tuple[Any, ...], results: Sequence[Tensor]) -> int:
    """Operations that a call takes, roughly: twice the multiplications, and some for each entry that is read or written.

    Example:
        >>> x, w = torch.ones(4, 8), torch.ones(16, 8)
        >>> operations(torch.ops.aten.linear.default, (x, w), [torch.ones(4, 16)])
        5504
    """
    name = target._opname.rstrip("_")
    given = [t for arg in args for t in tensors_in(arg)]
    made = sum(t.numel() for t in results)
    entries = _COST_OF_ENTRY * (made + sum(t.numel() for t in given))
    if name in _PRODUCTS and len(given) > (name in _SECOND_OPERAND):
        operand = given[int(name in _SECOND_OPERAND)]
        return entries + 2 * made * (int(operand.shape[-1]) if operand.dim() else 1)
    if name.startswith("conv") and len(given) > 1:
        each = given[1].numel() // max(1, given[1].shape[0])
        return entries + 2 * each * max(made, given[0].numel())
    if name == "scaled_dot_product_attention" and len(given) > 1 and given[1].dim() > 1:
        return entries + 4 * given[0].numel() * int(given[1].shape[-2])
    if name == "einsum":
        return entries + 2 * made * _summed(args)
    if name in _POOLS and len(args) > 1:
        kernel = args[1] if isinstance(args[1], list | tuple) else [args[1]] * 3
        return entries + _COST_OF_ENTRY * made * int(math.prod(max(1, size) for size in kernel))
    return entries


def needed_bytes(target: torch._ops.OpOverload, args: tuple[Any, ...], results: Sequence[Tensor]) -> int:
    """Bytes of a call's results, or of what it needs besides, whichever is more.

    Example:
        >>> needed_bytes(torch.ops.aten.matmul.default, (torch.ones(9, 1, 1), torch.ones(1, 1, 10)), [torch.ones(9, 1, 10)])
        396
    """
    name = target._opname.rstrip("_")
    given = [t for arg in args for t in tensors_in(arg)]
    made = sum(t.numel() * t.itemsize for t in results)
    if not results or not given:
        return made
    needed, itemsize = 0, max(t.itemsize for t in given)
    if name == "matmul" and len(given) == 2 and min(t.dim() for t in given) > 2:  # both are spread over all batches
        needed = math.prod(results[0].shape[:-2]) * sum(math.prod(t.shape[-2:]) for t in given)
    elif name == "scaled_dot_product_attention" and len(given) > 1 and given[1].dim() > 1:
        needed = given[0].numel() // max(1, given[0].shape[-1]) * given[1].shape[-2]
    elif name == "einsum":
        needed = results[0].numel() * (_summed(args) if len(given) > 2 else 1)
    elif name.startswith("conv") and given[0].dim() > 2:
        padding = args[4] if len(args) > 4 and isinstance(args[4], list | tuple) else [0]
        wide = [
            size + 2 * max(0, pad)
            for size, pad in zip(given[0].shape[2:], [*padding, *[max(padding, default=0)] * 3], strict=False)
        ]
        needed = math.prod(given[0].shape[:2]) * math.prod(wide)
    return max(made, needed * itemsize)


def num_pieces(target: torch._ops.OpOverload, args: tuple[Any, ...]) -> int:
    """How many tensors a call gives at most that cuts its argument.

    Example:
        >>> num_pieces(torch.ops.aten.split.Tensor, (torch.ones(10, 2), 3))
        5
    """
    if target._opname not in _CUTS or not isinstance(args[0], Tensor):
        return 1
    longest = max(args[0].shape, default=1)
    if target._opname == "unbind":
        return longest
    asked = args[1] if len(args) > 1 else 1
    if isinstance(asked, list | tuple):
        return len(asked)
    return int(asked) if "chunk" in target._opname else longest // max(1, asked) + 2


def _summed(args: tuple[Any, ...]) -> int:
    """Product of the sizes that an einsum sums over."""
    text, operands = str(args[0]).replace(" ", ""), [t for arg in args[1:] for t in tensors_in(arg)]
    given, _, out = text.partition("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(given.split(","), operands, strict=False):
        before, _, after = letters.partition("...")
        shape = list(operand.shape)
        for places, names in ((shape[: len(before)], before), (shape[len(shape) - len(after) :], after)):
            sizes |= {name: max(size, sizes.get(name, 1)) for name, size in zip(names, places, strict=False)}
    return math.prod(size for name, size in sizes.items() if name not in out and re.match(r"[A-Za-z]", name))
