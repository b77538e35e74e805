"""The maths of `plan`: bytes of 2:4 storage, and the time of one layer by the roofline. Pure functions of numbers.

Units: seconds, bytes, operations a second, bytes a second. Counts of tokens may be numpy arrays; results then are too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Count: TypeAlias = float | NDArray[np.float64]

DENSE_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
ACTIVATION_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 16}
"""Of what a layer reads; results are written in 16 bits."""
MAX_TOKENS = 65536
"""The break-even is looked for among 1 to so many tokens."""
_SCALE_BITS, _SCALE_GROUP = 16, 128


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU or processor as a runtime uses it, for one type of weights.

    Attributes:
        dense_flops: Operations a second of dense matmuls.
        sparse_flops: Of 2:4 matmuls, zeros counted as if they were computed.
        dense_bandwidth: Bytes a second of dense kernels and of everything that is no matmul.
        sparse_bandwidth: Bytes a second of 2:4 kernels.
        gap_s: Idle time after each kernel.
        dense_host_s: Least time of a dense call.
        sparse_host_s: Least time of a 2:4 call.
        picks_faster: Whether a 2:4 weight runs densely where that is faster.
        most_sparse_tokens: Tokens above which a 2:4 weight takes as long as a dense one; None for no such limit.
    """

    dense_flops: float
    sparse_flops: float
    dense_bandwidth: float
    sparse_bandwidth: float
    gap_s: float = 0.0
    dense_host_s: float = 0.0
    sparse_host_s: float = 0.0
    picks_faster: bool = False
    most_sparse_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """One linear layer, or the experts of one layer.

    Attributes:
        in_features: Length of the sum; of a convolution, input channels of a group times kernel positions.
        out_features: Rows of one matrix.
        num_experts: Matrices of that shape, of which each token takes some; 1 for a plain layer.
        experts_per_token: How many it takes.
        dtype: Of the stored weights.
        branch_k: Input features that SLoRB sums into one; 0 for no branch.
        branch_trained: Whether the projection X is a weight of its own.
    """

    in_features: int
    out_features: int
    num_experts: int = 1
    experts_per_token: int = 1
    dtype: str = "bf16"
    branch_k: int = 0
    branch_trained: bool = False

    @property
    def num_weights(self) -> int:
        """Weights of all matrices, without the branch."""
        return self.in_features * self.out_features * self.num_experts


def weight_bits(dtype: str, *, sparse: bool, scales: bool = True) -> float:
    """Bits that a weight takes in memory: dense, or 2:4 with 2 index bits for each of the two that are kept of four.

    Args:
        dtype: bf16, fp16, fp8, int8 or int4.
        sparse: Whether it is 2:4.
        scales: Whether int4 counts its 16-bit scale for each group of 128.

    Source: methods.md section 4 of the design notes: 9/16 in bf16, 10/16 in int8, 3 bits in int4.

    Example:
        >>> weight_bits("bf16", sparse=True), weight_bits("int8", sparse=True), weight_bits("int4", sparse=True)
        (9.0, 5.0, 3.125)
    """
    bits = DENSE_BITS[dtype] / 2 + 1 if sparse else float(DENSE_BITS[dtype])
    return bits + (_SCALE_BITS / _SCALE_GROUP if dtype == "int4" and scales else 0)


def branch_weights(matmul: Matmul) -> int:
    """Weights that SLoRB adds: out*in/k for S, and in*in/k for X where it is trained.

    Source: AST, arXiv 2407.20584, eqs. 5 and 6.

    Example:
        >>> branch_weights(Matmul(in_features=64, out_features=32, branch_k=16, branch_trained=True))
        384
    """
    if not matmul.branch_k:
        return 0
    rank = matmul.in_features // matmul.branch_k
    return matmul.out_features * rank + (matmul.in_features * rank if matmul.branch_trained else 0)


def active_experts(matmul: Matmul, tokens: Count) -> Count:
    """Experts whose weights are read for so many tokens, if each token picks its experts evenly and on its own.

    Example:
        >>> active_experts(Matmul(in_features=8, out_features=8, num_experts=8, experts_per_token=2), 1.0)
        2.0
    """
    missed = (1 - matmul.experts_per_token / matmul.num_experts) ** tokens
    return matmul.num_experts * (1 - missed)


def matmul_flops(matmul: Matmul, tokens: Count) -> Count:
    """Multiplications and additions of the dense layer."""
    return 2.0 * tokens * matmul.experts_per_token * matmul.in_features * matmul.out_features


def matmul_bytes(matmul: Matmul, tokens: Count, *, sparse: bool) -> Count:
    """Bytes that the layer reads and writes once: the weights it needs, what comes in, what goes out."""
    weights = active_experts(matmul, tokens) * matmul.in_features * matmul.out_features
    rows = tokens * matmul.experts_per_token
    activations = rows * (matmul.in_features * ACTIVATION_BITS[matmul.dtype] + matmul.out_features * 16)
    return (weights * weight_bits(matmul.dtype, sparse=sparse) + activations) / 8


def intensity(matmul: Matmul, tokens: Count) -> Count:
    """Arithmetic intensity of the dense layer, operations for each byte that is moved.

    Example:
        >>> round(intensity(Matmul(in_features=4096, out_features=4096), 1.0), 2)
        1.0
    """
    return matmul_flops(matmul, tokens) / matmul_bytes(matmul, tokens, sparse=False)


def dense_time(matmul: Matmul, tokens: Count, machine: Machine) -> Count:
    """Seconds of the dense layer: the longest of computing, moving bytes, and calling; and the gap after it."""
    compute = matmul_flops(matmul, tokens) / machine.dense_flops
    memory = matmul_bytes(matmul, tokens, sparse=False) / machine.dense_bandwidth
    return _kernel(compute, memory, machine.dense_host_s, machine)


def sparse_time(matmul: Matmul, tokens: Count, machine: Machine) -> Count:
    """Seconds of the 2:4 layer, with its SLoRB branch if it has one."""
    compute = matmul_flops(matmul, tokens) / machine.sparse_flops
    memory = matmul_bytes(matmul, tokens, sparse=True) / machine.sparse_bandwidth
    time = _kernel(compute, memory, machine.sparse_host_s, machine)
    if machine.most_sparse_tokens is not None:
        time = np.where(np.asarray(tokens) > machine.most_sparse_tokens, dense_time(matmul, tokens, machine), time)
    if machine.picks_faster:
        time = np.minimum(time, dense_time(matmul, tokens, machine))
    return time + branch_time(matmul, tokens, machine)


def branch_time(matmul: Matmul, tokens: Count, machine: Machine) -> Count:
    """Seconds of the SLoRB branch: a projection (a segment sum, or a matmul if it is trained) and a dense matmul by S.

    The branch is kept in 16 bits. Both are kernels of their own; what comes out of X is written and read again.
    """
    if not matmul.branch_k:
        return 0.0 * tokens
    rank = matmul.in_features // matmul.branch_k
    expand = Matmul(in_features=rank, out_features=matmul.out_features)
    if matmul.branch_trained:
        project = dense_time(Matmul(in_features=matmul.in_features, out_features=rank), tokens, machine)
    else:
        moved = tokens * (matmul.in_features + rank) * 2
        project = _kernel(0.0, moved / machine.dense_bandwidth, machine.dense_host_s, machine)
    return project + dense_time(expand, tokens, machine)


def paying_ranges(
    dense: Callable[[Count], Count], sparse: Callable[[Count], Count], *, max_tokens: int = MAX_TOKENS
) -> tuple[tuple[int, int | None], ...]:
    """Counts of tokens at which a 2:4 layer is faster than a dense one: its break-even points.

    Args:
        dense: Seconds of the dense layer for so many tokens.
        sparse: Seconds of the 2:4 layer.
        max_tokens: How far to look.

    Returns:
        (first, last) of each run of counts at which sparse is strictly faster; last is None where the run reaches
        `max_tokens`.

    Exactness: every count from 1 to `max_tokens` is evaluated.

    Example:
        >>> paying_ranges(lambda n: n * 1.0, lambda n: n * 0.5 + 10, max_tokens=100)
        ((21, None),)
    """
    tokens = np.arange(1, max_tokens + 1, dtype=np.float64)
    pays = np.asarray(sparse(tokens) < dense(tokens) * (1 - 1e-9))
    edges = np.flatnonzero(np.diff(np.concatenate(([False], pays, [False])).astype(np.int8)))
    return tuple(
        (int(start) + 1, None if stop == max_tokens else int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)
    )


def _kernel(compute: Count, memory: Count, host_s: float, machine: Machine) -> Count:
    longest: Count = np.maximum(np.maximum(compute, memory), host_s)
    return longest + machine.gap_s
