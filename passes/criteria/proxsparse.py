"""ProxSparse: a regulariser that is zero exactly where N:M holds, raised step by step on the layer's reconstruction error.

Shape suffixes: O out, I in, M weights of one group, X any dimensions flattened.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.criteria.criterion import CriterionOptions, Pruned, check_matrix, keep_masked, pieces, unit_gram
from sparsepass.passes.maths import InputStatistics, NMPattern, keep_largest

# The regulariser's strength times the step, for weights whose root mean square is one.
_FIRST_STRENGTH, _LAST_STRENGTH = 0.02, 1.0
_NUM_STEPS = 40
_NUM_SWEEPS = 3
_LARGEST_M = 8
# Rows are taken in pieces of about this many weights, which stay in the processor's cache.
_PIECE_WEIGHTS = 1 << 18


@torch.no_grad()
def proxsparse(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Prunes a weight by ProxSparse, layer by layer: learns a mask by proximal steps and leaves kept weights as they are.

    The regulariser of a group is the sum of all products of N + 1 of its absolute values, which for 2:4 is the paper's
    ``|w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|``. It is zero exactly where the group keeps to N:M. A step goes down the
    gradient of the layer's reconstruction error and applies the proximal operator of the regulariser (`symmetric_prox`).
    After the last step the N largest of each group are kept, with their original values.

    This is not the paper's end-to-end form. The paper learns all layers at once from the model's loss, by
    backpropagation, under one strength of the regulariser that is tuned for each model. A criterion sees one layer and its
    inputs, so here the loss is ``tr((U - W) A (U - W)^T) / 2`` with ``A`` the damped Gram matrix; weights are scaled by the
    root of its diagonal and, row by row, to a mean square of one; and the strength, in units of A's largest eigenvalue,
    rises from 0.02 to 1 over 40 steps with Nesterov's momentum, so there is nothing to tune. The paper's second regulariser,
    which draws kept weights to their original values, is left out: here it made masks worse.

    Cost: the eigenvalues of A, about 4/3 I^3 operations, and for each row 80 I^2 of matrix products, and as much time again
    for the proximal operator. On one core 576 x 576 takes 1 s, 3072 x 576 takes 5 and 576 x 1536 takes 4.

    Shapes: ``[O, I]``.

    Args:
        weight_OI: The dense weight, any float dtype; computed in fp32 (fp64 for a weight in fp64).
        statistics: The inputs' Gram matrix.
        pattern: The pattern along the last axis, with M up to 8.
        options: Damping.

    Returns:
        The weight with +0.0 for what is dropped, and the mask.

    Raises:
        SparsepassError: The weight holds NaN or Inf or is not 2-D, I is not a multiple of M, M is larger than 8, or the
            statistics are missing or do not fit or hold NaN or Inf.

    Source: arXiv 2502.00258, the regulariser and its proximal operator; methods.md section 1.

    Exactness: kept weights bitwise equal; rows do not depend on each other.

    >>> correlated = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    >>> statistics = InputStatistics(num_tokens=1, gram_II=correlated)
    >>> proxsparse(torch.tensor([[1.0, -1.0, 0.6, 0.5]]), statistics, NMPattern(2, 4), CriterionOptions()).weight_OI
    tensor([[0.0000, 0.0000, 0.6000, 0.5000]])
    """
    if pattern.m > _LARGEST_M:
        raise SparsepassError(
            f"ProxSparse's regulariser has a product for every {pattern.n + 1} of {pattern.m} weights, too many for {pattern}; "
            f"choose a pattern with M up to {_LARGEST_M}, or another criterion"
        )
    known = check_matrix(weight_OI, statistics, pattern, method="ProxSparse")
    gram_II, scale_I, dead_I = unit_gram(known, weight_OI, options.damping, options.damping_of)
    # Features in the order: all groups' first, all groups' second, ... A plain view then has a group along its first axis.
    order_I = torch.arange(weight_OI.shape[1], device=weight_OI.device).view(-1, pattern.m).T.reshape(-1)
    restore_I = order_I.argsort()
    gram_II = gram_II[order_I[:, None], order_I]
    step = 1 / float(torch.linalg.eigvalsh(gram_II)[-1])
    mask_OI = torch.empty(weight_OI.shape, dtype=torch.bool, device=weight_OI.device)
    for rows in pieces(weight_OI, _PIECE_WEIGHTS):
        scaled_OI = weight_OI[rows].detach().to(gram_II.dtype).masked_fill(dead_I, 0) * scale_I
        size_O1 = scaled_OI.square().mean(1, keepdim=True).sqrt()
        scaled_OI /= size_O1.masked_fill(size_O1 == 0, 1)
        support_IO = _learn(scaled_OI[:, order_I].T.contiguous(), gram_II, step, pattern)
        mask_OI[rows] = support_IO.T[:, restore_I]
    return keep_masked(weight_OI, mask_OI)


def _learn(weight_IO: Tensor, gram_II: Tensor, step: float, pattern: NMPattern) -> Tensor:
    """The support of the N largest of each group after the last step."""
    learned_IO, ahead_IO, momentum = weight_IO, weight_IO, 1.0
    for index in range(_NUM_STEPS):
        strength = _FIRST_STRENGTH * (_LAST_STRENGTH / _FIRST_STRENGTH) ** (index / (_NUM_STEPS - 1))
        downhill_IO = torch.addmm(ahead_IO, gram_II, ahead_IO - weight_IO, alpha=-step)
        before_IO = learned_IO
        learned_IO = symmetric_prox(downhill_IO.view(pattern.m, -1), strength, pattern.n, num_sweeps=_NUM_SWEEPS).view_as(
            weight_IO
        )
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_IO = torch.lerp(before_IO, learned_IO, 1 + (momentum - 1) / next_momentum)
        momentum = next_momentum
    return keep_largest(learned_IO.abs().view(pattern.m, -1), pattern.n).view_as(weight_IO)


def symmetric_prox(point_MX: Tensor, strength: float, n: int, *, num_sweeps: int) -> Tensor:
    """The proximal operator of the regulariser: ``argmin_u |u - y|^2 / 2 + strength * R(u)`` for every group y.

    R is the sum of all products of n + 1 absolute values. The minimum has the signs and the order of y, so what is not zero
    in it are the n, n + 1, ... or all M largest of y. For n, it is y itself there. For each larger number, coordinates are
    minimised one after another, which is a soft threshold each, starting from y. The best of these candidates is returned.

    Shapes: ``[M, X]`` to ``[M, X]``.

    Args:
        point_MX: The groups, along the first axis.
        strength: The regulariser's factor, at least 0.
        n: Nonzeros that cost nothing, 0 < n < M.
        num_sweeps: How often all coordinates are minimised.

    Returns:
        The minimum of each group.

    Source: arXiv 2502.00258, where M = 4 and n = 2; methods.md section 1.

    Exactness: converges with the sweeps, linearly; zeros are exact. With M above 4 it may be a local minimum.

    >>> symmetric_prox(torch.tensor([[3.0, -2.0, 0.1, 0.2]]).T, 0.5, 2, num_sweeps=20).T
    tensor([[ 3., -2.,  0.,  0.]])
    """
    m = point_MX.shape[0]
    size_MX = point_MX.abs()
    best_MX = size_MX * keep_largest(size_MX, n)
    least_X = (size_MX - best_MX).square().sum(0) / 2
    for count in range(n + 1, m + 1):
        start_MX = size_MX if count == m else size_MX * keep_largest(size_MX, count)
        found = list(start_MX.unbind())
        for _ in range(num_sweeps):
            for i in range(m):
                others_X = _symmetric_sum(found[:i] + found[i + 1 :], n)
                found[i] = torch.sub(start_MX[i], others_X, alpha=strength).clamp_(min=0)
        loss_X = _symmetric_sum(found, n + 1).mul(strength)
        for i in range(m):
            loss_X += (found[i] - size_MX[i]).square() / 2
        better_X = loss_X < least_X
        least_X = torch.where(better_X, loss_X, least_X)
        best_MX = torch.where(better_X, torch.stack(found), best_MX)
    return best_MX.copysign(point_MX)


def _symmetric_sum(parts: Sequence[Tensor], degree: int) -> Tensor:
    """The sum of all products of so many of the parts."""
    sums = [parts[0]]
    for part in parts[1:]:
        if len(sums) < degree:
            sums.append(part * sums[-1])
            last = len(sums) - 2
        else:
            last = degree - 1
        for i in range(last, 0, -1):
            sums[i] = torch.addcmul(sums[i], part, sums[i - 1])
        sums[0] = sums[0] + part
    return sums[degree - 1]
