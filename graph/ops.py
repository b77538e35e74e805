"""Custom operators that rewritten graphs call, registered with torch.library.

``sparsepass::masked_weight`` multiplies a weight by its mask and passes the gradient straight through; ``learned_weight`` puts
a weight behind a mask that is being learned, hard or soft; ``quantized_weight`` rounds a weight to a grid of integers, and
passes the gradient straight through as well. They work on the weight, not on the matmul, so one operator serves every layout
(linear, Conv1D, convolution, experts), and whatever kernel the runtime has for the matmul stays in use. SLoRB needs no operator
of its own: a segment sum and a linear.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparsepass.graph import soft_masks
from sparsepass.graph.rounding import FORMATS, Rounded, RoundingGrid, as_rows, from_rows, num_groups, round_to_nearest
from sparsepass.graph.soft_masks import Draw

MASKED_WEIGHT = "sparsepass::masked_weight"
LEARNED_WEIGHT = "sparsepass::learned_weight"
QUANTIZED_WEIGHT = "sparsepass::quantized_weight"
ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default}
"""What torch.export writes to check dtypes and sizes."""
_SCALES = (torch.bfloat16, torch.float32, torch.float64)
"""Types of scales: bfloat16, and those that hold all its values."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def where_kept(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``weight`` where ``mask`` is true and +0.0 elsewhere.

    Shapes: both ``[...]``; weight of any float dtype, mask bool.

    Exactness: bitwise ``torch.where(mask, weight, 0)``. On a processor the mask is laid over the bits of the weight, which is
    ten times as fast (torch 2.13): its `where` and `masked_fill` go element by element.

    Example:
        >>> where_kept(torch.tensor([1.0, -2.0]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if weight.device.type != "cpu":
        return torch.where(mask, weight, 0.0)
    bits = _BITS[weight.itemsize]
    ones = mask.view(torch.int8).neg().to(bits)  # -1, all bits set, where kept
    return ones.bitwise_and_(weight.view(bits)).view(weight.dtype)


@torch.library.custom_op(MASKED_WEIGHT, mutates_args=())
def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``weight`` where ``mask`` is true and +0.0 elsewhere.

    Shapes: weight ``[...]`` of any float dtype, mask the same shape, bool; the result is like weight.

    The backward pass is the straight-through estimator: the gradient reaches the whole weight, masked entries included.

    Raises:
        ValueError: If the mask is not bool or its shape is not the weight's.

    Source: AST, arXiv 2407.20584, section 3 (STE on dense weights behind a mask).
    Exactness: bitwise; -0.0, NaN and Inf behind the mask become +0.0.

    Example:
        >>> import torch
        >>> masked_weight(torch.tensor([1.0, -2.0]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    return _masked(weight, mask)


@masked_weight.register_fake
def _(weight: Tensor, mask: Tensor) -> Tensor:
    return _masked(weight, mask)  # the same code, so that the strides are the same too


def _straight_through(_ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


masked_weight.register_autograd(_straight_through)


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"masked_weight expects a bool mask, got {mask.dtype}; convert it with mask.bool()")
    if mask.shape != weight.shape:
        raise ValueError(f"masked_weight expects a mask shaped like the weight {tuple(weight.shape)}, got {tuple(mask.shape)}")
    return where_kept(weight, mask)


@torch.library.custom_op(LEARNED_WEIGHT, mutates_args=())
def learned_weight(weight: Tensor, mask: Tensor, logits: Tensor, control: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Return a weight behind a mask that is being learned: hard where the temperature is 0, else soft.

    Soft is ``W .* (y S)`` with ``y = softmax((scale logits + noise) / temperature)`` over the C candidate masks S of each
    group; see `sparsepass.graph.soft_masks`. The choice is made piece by piece, in the forward pass and again in the backward
    pass: what is kept in between are the arguments.

    Shapes: weight ``[...]`` with I = G * M entries along ``axis``; mask the same; logits as the weight with that axis at the
    end and cut in two, ``[..., C, G]``; control ``[3]``.

    Args:
        weight: Any float dtype.
        mask: Bool: the hard mask.
        logits: Of each group's candidates.
        control: float64: scale, temperature, and the key of the noise (a whole number of at least 0).
        n: Entries kept of a group.
        m: Length of a group.
        axis: Axis of the weight along which groups run.

    Returns:
        Shaped and typed like the weight. Gradients reach the logits, and the weight through the mask.

    Raises:
        ValueError: If the mask is not bool, or shapes do not fit.

    Source: MaskLLM, arXiv 2409.17481, section 3.

    Example:
        >>> weight, mask = torch.tensor([[1.0, -2.0, 3.0, 4.0]]), torch.tensor([[False, False, True, True]])
        >>> learned_weight(weight, mask, torch.zeros(1, 6, 1), torch.tensor([1.0, 0, 0], dtype=torch.float64), 2, 4, 1)
        tensor([[0., 0., 3., 4.]])
    """
    _check_logits(weight, logits, control, n, m, axis)
    draw = _draw(control)
    if draw is None:
        return _masked(weight, mask).contiguous()
    out = soft_masks.soft_weight(weight.movedim(axis, -1), logits, n, m, draw)
    return out.movedim(-1, axis).contiguous()


@learned_weight.register_fake
def _(weight: Tensor, mask: Tensor, logits: Tensor, control: Tensor, n: int, m: int, axis: int) -> Tensor:
    _check_logits(weight, logits, control, n, m, axis)
    return torch.empty_like(_masked(weight, mask), memory_format=torch.contiguous_format)


@torch.library.custom_op(QUANTIZED_WEIGHT, mutates_args=())
def quantized_weight(
    weight: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, axis: int, format: str = "int"
) -> Tensor:
    """Return a weight rounded to the nearest of the values that the numbers of its grid stand for.

    Shapes: weight ``[...]`` of any float dtype; scales and zero points ``[O, G]``, or ``[E, O, G]`` for experts: the weight
    `as_rows`, with a group in the place of its columns.

    The backward pass is the straight-through estimator: the gradient reaches the whole weight, clipped entries included.

    Args:
        weight: Zeros stay zeros, so that a mask in front of it is kept.
        scales: bfloat16; or float32 or float64, which hold all its values, as a module's ``float()`` leaves them.
        zero_points: The integers that stand for 0, uint8; None for numbers with a sign, where that is 0.
        bits: 8 or 4.
        group_size: Entries along the axis that share a scale; 0 for a whole row.
        axis: Axis of the weight that its layer sums over.
        format: ``int``, or ``fp8``, which has 8 bits and no zero points.

    Returns:
        Shaped and typed like the weight, contiguous.

    Raises:
        ValueError: If types and shapes do not fit.

    Example:
        >>> quantized_weight(torch.tensor([[7.0, -3.4, 0.0, 1.6]]), torch.ones(1, 1).bfloat16(), None, 4, 0, 1)
        tensor([[ 7., -3.,  0.,  2.]])
    """
    rounded = rounded_rows(weight, scales, zero_points, bits, group_size, axis, format)
    return from_rows(rounded.weight_OI.to(weight.dtype), axis, weight)


@quantized_weight.register_fake
def _(
    weight: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, axis: int, format: str = "int"
) -> Tensor:
    _check_grid(weight, scales, zero_points, bits, group_size, axis, format)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def rounded_rows(
    weight: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, axis: int, format: str = "int"
) -> Rounded:
    """What `quantized_weight` rounds to, as numbers. It takes the same arguments, and refuses the same."""
    grid = _check_grid(weight, scales, zero_points, bits, group_size, axis, format)
    return round_to_nearest(as_rows(weight, axis, scales.dim()), grid, scales, zero_points)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del ctx, inputs, output


def _straight_to_the_first(_ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None, None, None


quantized_weight.register_autograd(_straight_to_the_first, setup_context=_keep_nothing)


@torch.library.custom_op("sparsepass::learned_weight_gradient", mutates_args=())
def learned_weight_gradient(
    grad: Tensor, weight: Tensor, mask: Tensor, logits: Tensor, control: Tensor, n: int, m: int, axis: int
) -> Tensor:
    """Gradient of `learned_weight` to its logits; zeros where it is hard."""
    draw = _draw(control)
    if draw is None:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    return soft_masks.soft_weight_gradient(grad.movedim(axis, -1), weight.movedim(axis, -1), logits, n, m, draw)


@learned_weight_gradient.register_fake
def _(grad: Tensor, weight: Tensor, mask: Tensor, logits: Tensor, control: Tensor, n: int, m: int, axis: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.n, ctx.m, ctx.axis = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, mask, logits, control = ctx.saved_tensors
    pattern = ctx.n, ctx.m, ctx.axis
    to_weight = to_logits = None
    if ctx.needs_input_grad[0]:
        to_weight = learned_weight(grad, mask, logits, control, *pattern)
    if ctx.needs_input_grad[2]:
        to_logits = learned_weight_gradient(grad, weight, mask, logits, control, *pattern)
    return to_weight, None, to_logits, None, None, None, None


learned_weight.register_autograd(_backward, setup_context=_keep)


def _draw(control: Tensor) -> Draw | None:
    scale, temperature, key = control.tolist()
    return Draw(scale=scale, temperature=temperature, key=int(key)) if temperature else None


def _check_logits(weight: Tensor, logits: Tensor, control: Tensor, n: int, m: int, axis: int) -> None:
    shape = list(weight.shape)
    length = shape.pop(axis)
    expected = (*shape, soft_masks.num_candidates(n, m), length // m)
    if length % m or tuple(logits.shape) != expected:
        raise ValueError(
            f"learned_weight expects logits of shape {expected} for {n}:{m} along axis {axis} of a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(logits.shape)}"
        )
    if control.shape != (3,):
        raise ValueError(f"learned_weight expects scale, temperature and key in control, got shape {tuple(control.shape)}")


def _check_grid(
    weight: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int, axis: int, format: str
) -> RoundingGrid:
    if format not in FORMATS or (format == "fp8" and (bits != 8 or zero_points is not None)):
        raise ValueError(
            f"quantized_weight expects the format {' or '.join(FORMATS)}, and of fp8 8 bits and no zero points, got {format!r} "
            f"and {bits} bits"
        )
    if scales.dtype == torch.float16:
        raise ValueError(
            "scales of a grid are bfloat16, and these were cast to float16, which does not hold all of them; cast the model "
            "to float16 before it is quantized, not after"
        )
    if bits not in (4, 8) or group_size < 0 or not weight.is_floating_point() or scales.dtype not in _SCALES:
        raise ValueError(
            f"quantized_weight expects 8 or 4 bits, groups of 0 or more, a floating-point weight and scales of bfloat16, got "
            f"{bits}, {group_size}, {weight.dtype} and {scales.dtype}"
        )
    if not 2 <= scales.dim() <= weight.dim() or not 0 <= axis < weight.dim() or 0 in weight.shape:
        raise ValueError(
            f"quantized_weight expects scales of 2 axes or more, and an axis of the weight, got scales {tuple(scales.shape)}, "
            f"axis {axis} and a weight {tuple(weight.shape)}"
        )
    shape = [size for place, size in enumerate(weight.shape) if place != axis % weight.dim()] + [weight.shape[axis]]
    rows, columns = shape[: scales.dim() - 1], math.prod(shape[scales.dim() - 1 :])
    expected = (*rows, num_groups(columns, group_size))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"quantized_weight expects scales {expected} for groups of {group_size} along axis {axis} of a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(scales.shape)}"
        )
    if zero_points is not None and (tuple(zero_points.shape) != expected or zero_points.dtype != torch.uint8):
        raise ValueError(
            f"quantized_weight expects zero points like the scales, {expected} of uint8, got {tuple(zero_points.shape)} of "
            f"{zero_points.dtype}"
        )
    return RoundingGrid(bits=bits, group_size=group_size, symmetric=zero_points is None, format=format)  # type: ignore[arg-type]
