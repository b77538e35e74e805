"""Custom operators that rewritten graphs call, registered with torch.library.

``sparsepass::masked_weight`` is the only one: it multiplies a weight by its mask and passes the gradient straight through.
It works on the weight, not on the matmul, so one operator serves every layout (linear, Conv1D, convolution, experts), and
whatever kernel the runtime has for the matmul stays in use. SLoRB needs no operator of its own: a segment sum and a linear.
"""

import torch
from torch import Tensor

MASKED_WEIGHT = "sparsepass::masked_weight"


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
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
