"""Floating types by name, and whether values fit into one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

_DTYPES = {
    torch.float32: ("float32", "fp32"),
    torch.bfloat16: ("bfloat16", "bf16"),
    torch.float16: ("float16", "fp16", "half"),
    torch.float64: ("float64", "fp64"),
}


def parse_dtype(dtype: "torch.dtype | str") -> torch.dtype:
    """Return the floating-point type of that name.

    Args:
        dtype: A torch dtype, or a name such as "bf16", "bfloat16", "fp16", "float32" (with "torch." or without).

    Raises:
        SparsepassError: If it is none of those.

    Example:
        >>> parse_dtype("bf16")
        torch.bfloat16
    """
    name = str(dtype).lower().removeprefix("torch.")
    found = next((known for known, names in _DTYPES.items() if name in names), None)
    if found is None:
        raise SparsepassError(f"dtype {dtype} is not understood; expected float32, bfloat16, float16 or float64")
    return found


def check_fits(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse a conversion that would make infinities of finite values.

    Args:
        tensors: What is to be converted, by name. Integers, and values that are not finite already, are passed over.
        dtype: To what.

    Raises:
        SparsepassError: If a value is too large for the type.

    Example:
        >>> check_fits({"weight": torch.tensor([6e4, 7e4])}, torch.float16)
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: weight holds values up to 7e+04, which float16 cannot hold; use bfloat16 or float32
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel() or dtype.itemsize > tensor.dtype.itemsize:
            continue
        # float64 has all limits of the narrower types exactly.
        largest = torch.stack(tensor.detach().aminmax()).to(torch.float64).abs().max()
        if not largest.isfinite():
            finite = tensor.detach().to(torch.float64)
            largest = torch.where(finite.isfinite(), finite, 0.0).abs().max()
        if not largest.to(dtype).isfinite():
            raise SparsepassError(
                f"{name} holds values up to {float(largest):.3g}, which {str(dtype).removeprefix('torch.')} cannot hold; use "
                f"{'bfloat16 or float32' if dtype is torch.float16 else 'float32'}"
            )


def check_read(tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> None:
    """Refuse weights that a file gave in another type than its own, if some came out as infinities.

    Args:
        tensors: What was read, by name.
        dtype: The type that was asked for.
        name: The model's name.

    Raises:
        SparsepassError: If a value is infinite.
    """
    for weight, tensor in tensors.items():
        if tensor.dtype is dtype and tensor.numel() and not tensor.is_meta:
            low, high = tensor.detach().aminmax()
            if low == -torch.inf or high == torch.inf:
                kind = str(dtype).removeprefix("torch.")
                raise SparsepassError(
                    f"model {name}: {weight} holds values that {kind} cannot hold, and they would be infinite; use "
                    f"{'bfloat16 or float32' if dtype is torch.float16 else 'float32'}"
                )
