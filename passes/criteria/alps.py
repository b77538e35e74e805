"""ALPS: alternate between a ridge regression and the N:M pattern until they agree, then solve for the weights that are kept.

Shape suffixes: O out, I in, M columns of one group.
"""

import torch
from torch import Tensor

from sparsepass.passes.criteria.criterion import CriterionOptions, Pruned, check_matrix, finished, pieces, unit_gram
from sparsepass.passes.criteria.refinement import solve_rows
from sparsepass.passes.maths import InputStatistics, NMPattern, keep_largest

_FIRST_RHO = 0.1
# How much rho grows at a check: a row whose support moved by more than this share of its kept weights, by this factor.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_ITERATIONS_PER_CHECK = 3
_FEWEST_ITERATIONS, _MOST_ITERATIONS = 30, 300
_GRADIENT_STEPS = 10


@torch.no_grad()
def alps(weight_OI: Tensor, statistics: InputStatistics | None, pattern: NMPattern, options: CriterionOptions) -> Pruned:
    """Prunes a weight by ALPS: ADMM finds which weights to keep, conjugate gradients their best values.

    With ``A`` the damped Gram matrix, scaled to ones on its diagonal, and ``W`` the dense weight scaled to match, ADMM
    repeats: ``B = (A + rho I)^-1 (A W - V + rho D)``; ``D = `` the N largest of each group of ``B + V / rho``;
    ``V = V + rho (B - D)``. It starts from ``D = `` the N largest of ``W``, ``V = 0`` and ``rho = 0.1``. At every third
    iteration rho grows by 1.3, 1.2 or 1.1, the more the more of the support has moved since the last time: more than 10%, more
    than 0.5%, at all. It ends at a support that did not move, after 30 to 300 iterations. Ten steps of conjugate gradients
    on that support follow; their preconditioner, the diagonal, is the identity in this scale. A row that
    would end with more error than the dense weight leaves behind the same mask takes the latter.

    The problem falls apart into rows, and so does the method here: each row has its own rho and its own end, where the
    published code lets all rows of a layer share them. Sibling layers that read the same input can therefore be stacked
    along O, which changes nothing and saves all but one of the eigendecompositions. As with SparseGPT, features that were
    never active get no weight.

    Cost: one eigendecomposition, about 10 I^3 operations, and 4 I^2 for each row and iteration, of which most rows take 30
    to 40. On one core 576 x 576 takes 1 s, 3072 x 576 takes 4 and 576 x 1536 takes 5: several times as long as SparseGPT.

    Shapes: ``[O, I]``.

    Args:
        weight_OI: The dense weight, any float dtype; computed in fp32 (fp64 for a weight in fp64).
        statistics: The inputs' Gram matrix.
        pattern: The pattern along the last axis.
        options: Damping.

    Returns:
        The reconstructed weight with +0.0 for what is dropped, and the mask.

    Raises:
        SparsepassError: The weight holds NaN or Inf or is not 2-D, I is not a multiple of M, the statistics are missing
            or do not fit or hold NaN or Inf, or the result does not fit the weight's dtype.

    Source: arXiv 2406.07831; the thresholds of rho from its published code; methods.md section 1.

    Exactness: equals the definition but for rounding, whatever is stacked.

    >>> statistics = InputStatistics(num_tokens=4, gram_II=torch.eye(4) + 1.0)
    >>> options = CriterionOptions(damping=0.0)
    >>> alps(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), statistics, NMPattern(2, 4), options).weight_OI.round(decimals=4)
    tensor([[0., 0., 4., 5.]])
    """
    known = check_matrix(weight_OI, statistics, pattern, method="ALPS")
    gram_II, scale_I, dead_I = unit_gram(known, weight_OI, options.damping, options.damping_of)
    # Features in the order: all groups' first, all groups' second, ... A plain view then has a group along its first axis.
    order_I = torch.arange(weight_OI.shape[1], device=weight_OI.device).view(-1, pattern.m).T.reshape(-1)
    gram_II = gram_II[order_I[:, None], order_I]
    eigenvalues_I, basis_II = torch.linalg.eigh(gram_II)
    eigenvalues_I.clamp_(min=0)
    basis_II[dead_I[order_I]] = 0  # their weights stay exactly zero, where rounding would leave something to rank
    restore_I = order_I.argsort()

    pruned_OI = torch.empty_like(weight_OI, memory_format=torch.contiguous_format)
    mask_OI = torch.empty_like(pruned_OI, dtype=torch.bool)
    for rows in pieces(weight_OI):
        scaled_OI = weight_OI[rows].to(gram_II.dtype).masked_fill(dead_I, 0) * scale_I
        scaled_IO = scaled_OI[:, order_I].T.contiguous()
        goal_IO = gram_II @ scaled_IO
        kept_IO, support_IO = _admm(scaled_IO, goal_IO, eigenvalues_I, basis_II, pattern)
        kept_IO = solve_rows(scaled_IO, kept_IO, support_IO, gram_II, num_steps=_GRADIENT_STEPS)
        mask_OI[rows] = support_IO.T[:, restore_I]
        pruned_OI[rows] = (kept_IO.T[:, restore_I] / scale_I).to(weight_OI.dtype)
    pruned_OI = finished(pruned_OI, "the weights that ALPS reconstructed", damping=options.damping)
    return Pruned(weight_OI=pruned_OI, mask_OI=mask_OI)


def _admm(
    weight_IO: Tensor, goal_IO: Tensor, eigenvalues_I: Tensor, basis_II: Tensor, pattern: NMPattern
) -> tuple[Tensor, Tensor]:
    """Each row's D at the end, and its support. Rows that have come to their end are taken out of the computation."""
    in_features, out_features = weight_IO.shape
    num_kept = in_features // pattern.m * pattern.n
    support_IO = _largest(weight_IO, pattern)
    result_IO, result_support_IO = torch.empty_like(weight_IO), torch.empty_like(support_IO)
    running_O = torch.arange(out_features, device=weight_IO.device)
    rho_O = weight_IO.new_full((out_features,), _FIRST_RHO)
    kept_IO, dual_IO, checked_IO = weight_IO * support_IO, torch.zeros_like(weight_IO), support_IO
    for iteration in range(1, _MOST_ITERATIONS + 1):
        if len(running_O) == 0:
            break
        target_IO = torch.addcmul(goal_IO, kept_IO, rho_O).sub_(dual_IO)
        dense_IO = basis_II @ (basis_II.T @ target_IO).div_(eigenvalues_I.unsqueeze(1) + rho_O)
        dense_IO += dual_IO.div_(rho_O)
        support_IO = _largest(dense_IO, pattern)
        kept_IO = dense_IO * support_IO
        dual_IO = torch.sub(dense_IO, kept_IO, out=dual_IO).mul_(rho_O)  # V + rho (B - D) = rho (B + V / rho - D)
        if iteration % _ITERATIONS_PER_CHECK:
            continue
        moved_O = (support_IO != checked_IO).sum(0)
        checked_IO = support_IO
        growth_O = torch.ones_like(rho_O)
        for share, factor in reversed(_GROWTH):
            growth_O[moved_O > share * num_kept] = factor
        rho_O = rho_O * growth_O
        ends_O = (moved_O == 0) & (iteration >= _FEWEST_ITERATIONS)
        if iteration + _ITERATIONS_PER_CHECK > _MOST_ITERATIONS:
            ends_O = torch.ones_like(ends_O)
        if bool(ends_O.any()):
            result_IO[:, running_O[ends_O]] = kept_IO[:, ends_O]
            result_support_IO[:, running_O[ends_O]] = support_IO[:, ends_O]
            goes_on_O = ~ends_O
            running_O, rho_O = running_O[goes_on_O], rho_O[goes_on_O]
            goal_IO, kept_IO, dual_IO, checked_IO = (t[:, goes_on_O] for t in (goal_IO, kept_IO, dual_IO, checked_IO))
    return result_IO, result_support_IO


def _largest(weight_IO: Tensor, pattern: NMPattern) -> Tensor:
    """The N largest of each group, whose members stand I / M features apart."""
    return keep_largest(weight_IO.abs().view(pattern.m, -1), pattern.n).view_as(weight_IO)
