"""Weights that onnxruntime's operations hold packed: MatMulNBits and MatMulBnb4.

Both hold the weight as [out, in], so K is axis 1 of the unpacked weight.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparsepass.export.pattern.bits import BitView, unpack_bits, view_bits
from sparsepass.export.pattern.onnx.follow import Constant, Follower, Problem, input_of, int_of

__all__ = ["PACKED", "Packed", "read_packed"]

Array = npt.NDArray[Any]

PACKED = ("MatMulNBits", "MatMulBnb4")
_NF4 = 1


@final
@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed weight, found and not yet read.

    Attributes:
        constant: The stored tensor.
        shape: Shape of the unpacked weight, [out, in].
        dtype: Its type, in lower case.
        zero: The integers that mean zero: one, or [out, in].
        mask: Bits of a packed integer that count.
        is_high_first: Of two values in a byte, the first is in the high half.
        num_bits: Bits of a packed integer.
    """

    constant: Constant
    shape: tuple[int, int]
    dtype: str
    zero: Array
    mask: int
    is_high_first: bool
    num_bits: int

    def read(self, follower: Follower) -> BitView:
        """Unpack it: 1 where a value is not zero."""
        num_out, num_in = self.shape
        packed = follower.data.read(self.constant.tensor, self.constant.name)
        if self.is_high_first:
            values = unpack_bits((packed << 4) | (packed >> 4), self.num_bits).reshape(-1)[: num_out * num_in]
            values = values.reshape(num_out, num_in)
        else:
            values = unpack_bits(packed.reshape(num_out, -1), self.num_bits)[:, :num_in]
        return view_bits((values & np.uint8(self.mask)) != self.zero, has_sign=False)


def read_packed(node: ir.Node, follower: Follower) -> Packed:
    """Find the weight of a MatMulNBits or MatMulBnb4.

    MatMulNBits: B is [out, blocks, bytes], lowest bits first; zero is the block's zero point, or half the range.
    MatMulBnb4: B is flat, high half first; zero is code 7 of NF4, and codes 0 and 8 of FP4.

    Raises:
        Problem: It cannot be checked.
    """
    found = follower.follow(input_of(node, 1))
    if found is None:
        raise Problem("its packed weight is not a constant")
    if any(op != "Identity" for op in found.through) or found.computed:
        raise Problem("its packed weight is not stored as it is used")
    num_out, num_in = int_of(node, "N", 0), int_of(node, "K", 0)
    if node.op_type == "MatMulBnb4":
        if not int_of(node, "transB", 1):
            raise Problem("a weight that is not transposed is not supported")
        is_nf4 = int_of(node, "quant_type", _NF4) == _NF4
        return Packed(
            constant=found,
            shape=(num_out, num_in),
            dtype="nf4" if is_nf4 else "fp4",
            zero=np.array(7 if is_nf4 else 0, np.uint8),
            mask=15 if is_nf4 else 7,
            is_high_first=True,
            num_bits=4,
        )
    if input_of(node, 4) is not None:
        raise Problem("its weight is reordered by g_idx")
    bits, block = int_of(node, "bits", 4), int_of(node, "block_size", 0)
    if bits not in (2, 4, 8):
        raise Problem(f"{bits}-bit packing is not supported")
    if int_of(node, "weight_prepacked", 0):
        raise Problem("its weight is prepacked for one processor")
    zero: Array = np.array(1 << (bits - 1), np.uint8)
    points = input_of(node, 3)
    if points is not None:
        stored = follower.follow(points)
        if stored is None or stored.tensor.dtype.name != "UINT8":
            raise Problem("its zero points are not stored as packed integers")
        packed = follower.data.read(stored.tensor, stored.name).reshape(num_out, -1)
        num_blocks = -(-num_in // block)
        zero = unpack_bits(packed, bits)[:, :num_blocks].repeat(block, axis=1)[:, :num_in]
    return Packed(
        constant=found,
        shape=(num_out, num_in),
        dtype=f"uint{bits}",
        zero=zero,
        mask=(1 << bits) - 1,
        is_high_first=False,
        num_bits=bits,
    )
