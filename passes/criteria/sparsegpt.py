"""SparseGPT: drop weights column by column and let the later columns make up for the error.

Shape suffixes: O out, I in, B columns of one block, M columns of one group.
"""

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria.criterion import (
    GRAM_EPSILON,
    CriterionOptions,
    DampingOf,
    Pruned,
    all_finite,
    check_matrix,
    finished,
)
from sparsepass.passes.maths import InputStatistics, NMPattern, dampings, keep_largest

_RETRY_DAMPING = 0.01
# Up to this size a triangular inverse is one library call; above it, splitting in two saves more than half of the work.
_DIRECT_INVERSE_SIZE = 128


@torch.no_grad()
def sparsegpt(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Prunes a weight by SparseGPT: masks by the error that dropping causes, which the kept weights make up for.

    Rows do not depend on each other, so sibling layers that read the same input can be stacked along O and pruned in
    one call, which saves all but one of the inverses.

    Shapes: ``[O, I]``.

    Args:
        weight_OI: The dense weight, any float dtype; computed in fp32 (fp64 for a weight in fp64).
        statistics: The inputs' Gram matrix.
        pattern: The pattern along the last axis.
        options: Damping and block size.

    Returns:
        The compensated weight with +0.0 for what is dropped, the mask, and a note if the damping had to be raised.

    Raises:
        SparsepassError: The weight holds NaN or Inf or is not 2-D, I is not a multiple of M, the statistics are missing
            or do not fit, the Hessian is not positive definite at any damping, or the result does not fit the
            weight's dtype.

    Source: arXiv 2301.00774, algorithm 1; methods.md section 1.

    Exactness: equals the column-by-column definition but for rounding, whatever the block size.

    >>> statistics = InputStatistics(num_tokens=4, gram_II=torch.eye(4) + 1.0)
    >>> options = CriterionOptions(damping=0.0)
    >>> sparsegpt(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), statistics, NMPattern(2, 4), options).weight_OI
    tensor([[0., 0., 4., 5.]])
    """
    known = check_matrix(weight_OI, statistics, pattern, method="SparseGPT")
    gram_II = known.gram_II
    assert gram_II is not None
    m = pattern.m
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    gram_II = gram_II.to(device=weight_OI.device, dtype=dtype)
    order_I = by_energy(weight_OI, gram_II, m) if options.order == "energy" else None
    if order_I is not None:
        gram_II = gram_II[order_I][:, order_I]
    hessian = InverseHessian.of(gram_II, known.num_tokens, options)
    # One column of the weight is one contiguous row here.
    weight_IO = weight_OI.to(dtype, copy=True).T.contiguous()
    if order_I is not None:
        weight_IO = weight_IO[order_I]
    weight_IO[hessian.dead_I] = 0
    dropping = _Dropping(pattern, hessian, weight_IO)
    sweep_columns(weight_IO, hessian, dropping, group=m, block=max(m, options.block_size // m * m))
    mask_IO = dropping.mask_IO

    if order_I is not None:
        back_I = order_I.argsort()
        mask_IO, weight_IO = mask_IO[back_I], weight_IO[back_I]
    mask_OI = mask_IO.T.contiguous()
    pruned_OI = weight_IO.T.masked_fill(~mask_OI, 0).to(weight_OI.dtype).contiguous()
    pruned_OI = finished(pruned_OI, "the weights that SparseGPT compensated", damping=hessian.damping)
    return Pruned(weight_OI=pruned_OI, mask_OI=mask_OI, note=hessian.note)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class InverseHessian:
    """What the error of a column costs, and how the later ones make up for it.

    Attributes:
        upper_II: U, the upper Cholesky factor of the inverse; see `inverse_cholesky`.
        inv_diag_I1: One over its diagonal.
        dead_I: Features that were never active.
        damping: What was used.
        note: What the user should know of it.
    """

    upper_II: Tensor  # noqa: N815
    inv_diag_I1: Tensor  # noqa: N815
    dead_I: Tensor  # noqa: N815
    damping: float
    note: str | None

    @staticmethod
    def of(gram_II: Tensor, num_tokens: int, options: CriterionOptions) -> "InverseHessian":
        """Compute it.

        Args:
            gram_II: Of the inputs, in the type and on the device that it is wanted in.
            num_tokens: Tokens in it.
            options: Damping.

        Raises:
            SparsepassError: See `inverse_cholesky`.
        """
        upper_II, dead_I, used = inverse_cholesky(gram_II, num_tokens, options.damping, options.damping_of)
        note = None
        if used != options.damping:
            note = (
                f"the Hessian was not positive definite with damping {options.damping:g}, so {used:g} was used; "
                f"{num_tokens} calibration tokens for {len(gram_II)} features may be too few"
            )
        inv_diag_I1 = upper_II.diagonal().reciprocal().unsqueeze(1)
        return InverseHessian(upper_II=upper_II, inv_diag_I1=inv_diag_I1, dead_I=dead_I, damping=used, note=note)


class Settling(Protocol):
    """What becomes of columns: asked for one group after the other, and in it for one column after the other."""

    def enter(self, left: int, weight_IO: Tensor) -> None:
        """Look at the weights as they are when the group that begins at ``left`` is reached."""

    def settle(self, column: int, weight_O: Tensor, error_O: Tensor) -> None:
        """Write into ``error_O`` what is missing of a column from now on, over its entry of U's diagonal."""


def sweep_columns(weight_IO: Tensor, hessian: InverseHessian, settling: Settling, *, group: int, block: int) -> None:
    """Settle a weight column by column, and let the later columns make up for what each of them misses.

    Shapes: ``[I, O]``.

    Args:
        weight_IO: The weight, whose columns are rows here. It is changed in place.
        hessian: Of the inputs.
        settling: What becomes of the columns.
        group: Columns that are entered together; I and ``block`` are multiples of it.
        block: Columns whose updates are gathered before later ones see them.

    Source: arXiv 2301.00774, algorithm 1.
    """
    upper_II, in_features = hessian.upper_II, len(weight_IO)
    error_BO = torch.empty_like(weight_IO[:block])
    for start in range(0, in_features, block):
        stop = min(start + block, in_features)
        for left in range(start, stop, group):
            right = left + group
            settling.enter(left, weight_IO)
            weight_MO, error_MO = weight_IO[left:right], error_BO[left - start : right - start]
            for i in range(group):
                settling.settle(left + i, weight_MO[i], error_MO[i])
                if i + 1 < group:
                    weight_MO[i + 1 :].addr_(upper_II[left + i, left + i + 1 : right], error_MO[i], alpha=-1)
            if right < stop:
                weight_IO[right:stop].addmm_(upper_II[left:right, right:stop].T, error_MO, alpha=-1)
        if stop < in_features:
            weight_IO[stop:].addmm_(upper_II[start:stop, stop:].T, error_BO[: stop - start], alpha=-1)


@final
class _Dropping:
    """Of each group the weights stay whose loss would cost most; the others are dropped.

    Args:
        pattern: The pattern along the columns.
        hessian: Of the inputs.
        weight_IO: What is going to be swept.
    """

    def __init__(self, pattern: NMPattern, hessian: InverseHessian, weight_IO: Tensor) -> None:
        self.mask_IO = torch.empty_like(weight_IO, dtype=torch.bool)
        self._pattern, self._inv_diag_I1 = pattern, hessian.inv_diag_I1
        self._left, self._drop_MO = 0, weight_IO[:0]

    def enter(self, left: int, weight_IO: Tensor) -> None:
        part = slice(left, left + self._pattern.m)
        self.mask_IO[part] = mask_MO = kept_of_group(weight_IO[part], self._inv_diag_I1[part], self._pattern)
        self._left, self._drop_MO = left, self._inv_diag_I1[part] * ~mask_MO

    def settle(self, column: int, weight_O: Tensor, error_O: Tensor) -> None:
        torch.mul(weight_O, self._drop_MO[column - self._left], out=error_O)


def kept_of_group(weight_MO: Tensor, inv_diag_M1: Tensor, pattern: NMPattern) -> Tensor:
    """Which weights of a group stay: those with the largest ``w^2 / d^2``.

    Shapes: ``[M, O]`` or ``[M, ...]``, and ``[M, 1]``.

    Example:
        >>> kept_of_group(torch.tensor([[1.0], [-2.0], [3.0], [0.0]]), torch.ones(4, 1), NMPattern(2, 4)).flatten()
        tensor([False,  True,  True, False])
    """
    # |w| / d ranks as w^2 / d^2 does, and neither under- nor overflows.
    return keep_largest((weight_MO * inv_diag_M1).abs(), pattern.n)


def by_energy(weight_OI: Tensor, gram_II: Tensor, m: int) -> Tensor:
    """The columns in an order in which whole groups come by descending energy.

    The energy of a group is how much its weights move the output on their own: the sum of ``w^2 H_ii``. What comes first is
    dropped while most columns can still make up for it. Groups stay whole, so the pattern does.

    Shapes: ``[O, I]``, ``[I, I]`` to ``[I]``.

    Args:
        weight_OI: The dense weight.
        gram_II: The inputs' Gram matrix.
        m: Columns of a group.

    Returns:
        Indices of columns.

    Source: ours; the order of GPTQ's ``act_order``, for groups.

    >>> by_energy(torch.tensor([[1.0, 1.0, 2.0, 2.0]]), torch.eye(4), 2)
    tensor([2, 3, 0, 1])
    """
    energy_I = weight_OI.to(gram_II.dtype).square().sum(0) * gram_II.diagonal()
    groups_G = energy_I.unflatten(0, (-1, m)).sum(1).argsort(descending=True, stable=True)
    order_I: Tensor = (groups_G.unsqueeze(1) * m + torch.arange(m, device=groups_G.device)).flatten()
    return order_I


@torch.no_grad()
def inverse_cholesky(
    gram_II: Tensor, num_tokens: int, damping: float, damping_of: DampingOf = "mean"
) -> tuple[Tensor, Tensor, float]:
    """The upper Cholesky factor U of the inverse Hessian: ``H^-1 = U^T U``, where ``H = (2/n) X X^T`` plus damping.

    Features that were never active ("dead", a zero on the diagonal) get H = 1 and take no part in the mean that damping
    is a fraction of, so that the result does not depend on the scale of the activations.

    Shapes: ``[I, I]`` to ``[I, I]`` and ``[I]``.

    Args:
        gram_II: Sum over tokens of ``x x^T``, fp32 or fp64, symmetric.
        num_tokens: Tokens in that sum.
        damping: Added to the diagonal, as a fraction; raised tenfold up to 1 while the matrix is
            not positive definite, or is so by no more than its rounding where it is not damped.
        damping_of: What it is a fraction of; see `CriterionOptions`.

    Returns:
        U; the dead features; and the damping that was used.

    Raises:
        SparsepassError: The Gram matrix holds NaN or Inf, or is not positive definite even with the largest damping.

    Source: arXiv 2301.00774, section 3.3; methods.md section 1.

    >>> upper, dead, used = inverse_cholesky(torch.diag(torch.tensor([2.0, 0.0])), num_tokens=1, damping=0.0)
    >>> upper, dead, used
    (tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]]), tensor([False,  True]), 0.0)
    """
    if num_tokens < 1:
        raise SparsepassError("the Hessian of no tokens cannot be inverted; run calibration first")
    hessian_II = gram_II * (2 / num_tokens)
    diag_I = hessian_II.diagonal()
    dead_I = diag_I == 0
    if not all_finite(hessian_II):
        raise SparsepassError("the inputs' Gram matrix holds NaN or Inf; look for the calibration batch that brings them in")
    num_live = (~dead_I).sum()
    mean = diag_I.sum() / num_live.clamp(min=1)
    diag_I += dead_I
    # With P the reversal of the features, L the Cholesky factor of P H P and U = P L^-1 P, U is upper triangular and
    # U^T U = H^-1: one factorization and a triangular inverse, where inverting H first takes two factorizations and a
    # full inverse.
    reversed_II = hessian_II.flip(0, 1)
    undamped_I = reversed_II.diagonal().clone()
    tried = dampings(damping, retry=_RETRY_DAMPING)
    for used in tried:
        reversed_II.diagonal().copy_(undamped_I + used * (undamped_I if damping_of == "own" else mean))
        lower_II, info = torch.linalg.cholesky_ex(reversed_II)
        # Without damping, what is left of the diagonal may be rounding, whose sign is chance; with few tokens it is.
        is_known = used > 0 or bool(
            (lower_II.diagonal().square() > len(gram_II) * GRAM_EPSILON * undamped_I).all() & (num_live <= num_tokens)
        )
        if int(info) == 0 and all_finite(lower_II) and is_known:
            return _lower_inverse(lower_II).flip(0, 1), dead_I, used
    raise SparsepassError(
        f"the Hessian of {num_tokens} tokens and {gram_II.shape[0]} features is not positive definite, "
        f"with damping {', '.join(f'{each:g}' for each in tried)}; use more calibration tokens, leave this layer alone, "
        "or choose 'wanda' for it"
    )


def _lower_inverse(lower_II: Tensor) -> Tensor:
    """Inverts a lower triangular matrix, skipping the upper half's zeros (torch has no such call)."""
    inverse_II = torch.zeros_like(lower_II)
    _lower_inverse_into(lower_II, inverse_II)
    return inverse_II


def _lower_inverse_into(lower_II: Tensor, out_II: Tensor) -> None:
    size = lower_II.shape[0]
    if size <= _DIRECT_INVERSE_SIZE:
        eye_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        out_II.copy_(torch.linalg.solve_triangular(lower_II, eye_II, upper=False))
        return
    half = size // 2
    _lower_inverse_into(lower_II[:half, :half], out_II[:half, :half])
    _lower_inverse_into(lower_II[half:, half:], out_II[half:, half:])
    product = lower_II[half:, :half] @ out_II[:half, :half]
    out_II[half:, :half].addmm_(out_II[half:, half:], product, beta=0, alpha=-1)
