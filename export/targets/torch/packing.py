"""Packing 2:4 weights as torch does, and proving that nothing is lost: what was packed comes back bit for bit.

Kernels read the kept half of the weights and two bits of position for each. torch's functions for CUTLASS's layout run on any
device, so the proof needs no GPU; on a GPU the kernel's own tensor is asked too.

Tensor shape legend: O out features, I in features, K = I / 2 kept.
"""

import warnings
from typing import Any, Final

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsepass.export.targets.torch.rules import BACKENDS
from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths import NMPattern, canonical_zeros, num_violations

_ROWS, _COLUMNS = 32, 64  # what CUTLASS's layout is made of, for types of 16 bits
_ROWS_AT_ONCE: Final = 1024
_COLUMNS_AT_ONCE: Final = 1024
TWO_FOUR: Final = NMPattern(2, 4)


def packed(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight in CUTLASS's layout, on any device. Shapes that the layout does not know are filled up with zeros.

    Shapes: weight [O, I]; gives values [O', K'] and positions [O', K' / 8], with O' and 2 K' the next multiples of 32 and 64.

    Args:
        weight_OI: A weight of 16 bits that keeps to 2:4. What breaks it would be lost.

    Example:
        >>> values, positions = packed(torch.tensor([[0, 1, 2, 0]], dtype=torch.bfloat16))
        >>> values.shape, values[0, :2].tolist()
        (torch.Size([32, 32]), [1.0, 2.0])
    """
    rows, columns = weight_OI.shape
    filled = torch.nn.functional.pad(canonical_zeros(weight_OI), (0, -columns % _COLUMNS, 0, -rows % _ROWS))
    values, positions = sparse_semi_structured_from_dense_cutlass(filled)
    return values, positions


def unpacked(values: Tensor, positions: Tensor, shape_OI: tuple[int, ...]) -> Tensor:
    """Undo `packed`.

    Example:
        >>> unpacked(*packed(torch.tensor([[0, 1, 2, 0]], dtype=torch.bfloat16)), (1, 4))
        tensor([[0., 1., 2., 0.]], dtype=torch.bfloat16)
    """
    whole: Tensor = sparse_semi_structured_to_dense_cutlass(values, positions)
    return whole[: shape_OI[0], : shape_OI[1]]


def check_packing(name: str, weight_OI: Tensor) -> None:
    """Pack a weight and compare what comes back, bit for bit.

    Args:
        name: Of the weight, for the error.
        weight_OI: The folded weight.

    Raises:
        SparsepassError: If the weight is not 2:4, or something else comes back.

    Exactness: bitwise, -0.0 taken for +0.0.
    """
    check_weight(name, weight_OI)
    for rows_OI in weight_OI.split(_ROWS_AT_ONCE):
        _check_equal(name, rows_OI, unpacked(*packed(rows_OI), tuple(rows_OI.shape)), "torch's packed form")


def check_weight(name: str, weight_OI: Tensor) -> None:
    """Refuse a weight that 2:4 kernels would change.

    Raises:
        SparsepassError: If it breaks the pattern, or holds NaN or infinity.
    """
    broken = num_violations(weight_OI, TWO_FOUR)
    if broken:
        raise SparsepassError(
            f"{name} is not 2:4 along its input features ({broken} of {weight_OI.numel() // 4} groups hold more than two "
            "nonzeros): it was changed after the export, by training without masks or by a merged LoRA; export the model again"
        )
    if not bool(torch.isfinite(weight_OI).all()):
        raise SparsepassError(f"{name} holds NaN or infinity; check the weights")


def semi_structured(name: str, weight_OI: Tensor, backend: str) -> Tensor:
    """Make the tensor that a backend's kernels multiply, and prove that it holds the weight.

    Args:
        name: Of the weight, for errors.
        weight_OI: The folded weight, on a GPU.
        backend: A name from `BACKENDS`.

    Returns:
        A `torch.sparse.SparseSemiStructuredTensor`.

    Raises:
        SparsepassError: If the weight is not 2:4, or something else comes back out of the tensor.

    Exactness: bitwise, -0.0 taken for +0.0.
    """
    check_weight(name, weight_OI)
    lowered = convert(weight_OI, backend)
    _check_equal(name, weight_OI, dense_of(lowered), f"{backend}'s tensor")
    return lowered


def convert(weight_OI: Tensor, backend: str) -> Tensor:
    """Make the tensor that a backend's kernels multiply, without a check."""
    kind: Any = BACKENDS[backend]
    with warnings.catch_warnings():
        # torch says once that the interface is a prototype.
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        lowered: Tensor = kind.from_dense(canonical_zeros(weight_OI.detach()).contiguous())
    return lowered


@torch.no_grad()
def dense_of(lowered: Tensor) -> Tensor:
    """Read a semi-structured tensor through its kernel: its product with the identity, which is exact.

    Each entry of the product is one weight times one, plus zeros.
    """
    columns = lowered.shape[1]
    parts = []
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        width = min(_COLUMNS_AT_ONCE, columns - start)
        part = torch.zeros(columns, width, dtype=lowered.dtype, device=lowered.device)
        part[start : start + width].fill_diagonal_(1)
        parts.append(torch.mm(lowered, part))
    return torch.cat(parts, dim=1)


def _check_equal(name: str, weight_OI: Tensor, back_OI: Tensor, what: str) -> None:
    expected, got = (canonical_zeros(t.detach()).contiguous().view(torch.int16) for t in (weight_OI, back_OI))
    if not torch.equal(expected, got):
        differing = int((expected != got).sum())
        raise SparsepassError(
            f"{name}: {differing} of {weight_OI.numel()} weights do not come back out of {what}; this is a defect of torch "
            f"{torch.__version__} or of its libraries on this machine: leave the layer dense, and report it"
        )
