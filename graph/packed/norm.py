"""Root mean square normalisation in one call, in place of the seven operations of transformers' modules.

An operation costs some microseconds however little it does, and a small model normalises twice a block for each token.
"""

from typing import Final

import torch
from torch import Tensor, nn

from sparsepass.graph.native import kernels
from sparsepass.graph.packed.laid_out import TYPES
from sparsepass.graph.packed.operator import is_seen

_EPSILONS: Final = ("variance_epsilon", "eps")


class RMSNorm(nn.Module):
    """``y = w * x / sqrt(mean(x^2) + eps)`` over the last axis, as Llama's and T5's modules round it, by one call.

    The call is that of the compiled kernels, on the processor, where x and the weight are of one type and no gradient is asked
    for. Otherwise, and for compilers and exporters, it is torch's operations.

    Args:
        weight: ``[I]``; shared, not copied.
        eps: Added to the mean.

    Shapes: x ``[..., I]``, the result as x.

    Exactness: float32, with the mean's terms added in another order than torch's; x over its root is rounded to its type, and
    its product with the weight once more.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.

    Example:
        >>> RMSNorm(nn.Parameter(torch.ones(2), requires_grad=False), 0.0)(torch.tensor([3.0, 4.0]))
        tensor([0.8485, 1.1314])
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised rows."""
        weight = self._parameters["weight"]
        assert weight is not None
        if is_seen(x) or not _fits(x, weight) or _needs_gradient(x, weight) or (library := kernels()) is None:
            return _by_torch(x, weight, self.eps)
        x = x.contiguous()
        y, columns = torch.empty_like(x), weight.numel()
        places = x.data_ptr(), weight.data_ptr(), x.numel() // max(1, columns), columns, self.eps, y.data_ptr()
        library.rms_norm(TYPES[x.dtype], *places, torch.get_num_threads())
        return y

    def extra_repr(self) -> str:
        """What `repr` tells."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def fused_norm(module: nn.Module) -> RMSNorm | None:
    """The same normalisation in one call; None if a module is none, or computes anything else.

    It is found out by running it: rows of several magnitudes have to come out bit for bit as by torch's operations.

    Args:
        module: Any. On the processor, with its weight.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaRMSNorm
        >>> fused_norm(LlamaRMSNorm(8, eps=1e-5)), fused_norm(nn.LayerNorm(8))
        (RMSNorm((8,), eps=1e-05), None)
    """
    weight, eps = module._parameters.get("weight"), next((getattr(module, n) for n in _EPSILONS if hasattr(module, n)), None)
    holds_more = len(module._parameters) > 1 or module._buffers or module._modules or module._forward_hooks
    if weight is None or weight.dim() != 1 or not weight.is_cpu or not isinstance(eps, float) or holds_more:
        return None
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[1e-3], [1.0], [30.0]])
    x = (torch.randn(3, weight.numel(), generator=generator) * sizes).to(weight.dtype)
    with torch.no_grad():
        try:
            is_same = torch.equal(module(x), _by_torch(x, weight, eps))
        except (TypeError, ValueError, RuntimeError):  # it takes something else
            return None
    return RMSNorm(weight, eps).train(module.training) if is_same else None


def _fits(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype and x.dtype in TYPES and x.shape[-1:] == weight.shape and x.is_cpu and weight.is_cpu


def _needs_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
