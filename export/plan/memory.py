"""Bytes of a model's weights, dense and 2:4, for each type."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sparsepass.export.plan.model import ModelShape
from sparsepass.export.plan.roofline import Matmul, branch_weights, weight_bits
from sparsepass.export.plan.runtimes import Dtype

_HALF_BITS = 16
_TABLE: tuple[Dtype, ...] = ("bf16", "fp8", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """Bytes of all weights when the linear layers are of one type.

    Attributes:
        dtype: Of the layers that the passes take; all else (embedding, output head, norms, branches) is in 16 bits.
        dense_bytes: With all layers dense.
        planned_bytes: With the chosen layers 2:4, branches included.
        branch_bytes: The branches' part of these.
        everything_bytes: With every layer 2:4 that a kernel takes.
    """

    dtype: Dtype
    dense_bytes: float
    planned_bytes: float
    branch_bytes: float
    everything_bytes: float


def model_bytes(shape: ModelShape, matmuls: Mapping[str, Matmul], chosen: Collection[str]) -> float:
    """Bytes of all weights with the chosen layers 2:4."""
    in_layers = sum(matmul.num_weights for matmul in matmuls.values())
    bits = (shape.num_parameters - in_layers) * float(_HALF_BITS)
    for name, matmul in matmuls.items():
        bits += matmul.num_weights * weight_bits(matmul.dtype, sparse=name in chosen)
        bits += branch_weights(matmul) * _HALF_BITS if name in chosen else 0
    return bits / 8


def memory_table(
    shape: ModelShape, matmuls: Mapping[str, Matmul], chosen: Collection[str], able: Collection[str]
) -> tuple[MemoryRow, ...]:
    """One row for each type, whatever type is planned."""
    plain = {layer.site.name for layer in shape.layers if layer.site.left_alone is not None}
    branch_bytes = sum(branch_weights(matmul) * _HALF_BITS / 8 for name, matmul in matmuls.items() if name in chosen)
    rows = []
    for dtype in _TABLE:
        typed = {
            name: dataclasses.replace(matmul, dtype="bf16" if name in plain else dtype) for name, matmul in matmuls.items()
        }
        rows.append(
            MemoryRow(
                dtype=dtype,
                dense_bytes=model_bytes(shape, typed, ()),
                planned_bytes=model_bytes(shape, typed, chosen),
                branch_bytes=branch_bytes,
                everything_bytes=model_bytes(shape, typed, able),
            )
        )
    return tuple(rows)
