"""AWQ's factors: small weights of channels with large inputs are lifted before rounding, so that less of the output is lost.

Tensor shapes: E experts, O out, I in, F factors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsepass.graph.rounding import RoundingGrid, round_to_nearest
from sparsepass.passes.maths.statistics import InputStatistics, output_size

EXPONENTS = tuple(step / 20 for step in range(20))
"""Of the sizes of inputs: from none to nearly all of a difference in size."""
_LEAST = 1e-4


def awq_factors(sizes_F: Tensor, exponent: float) -> Tensor:
    """What weights are multiplied by, and inputs divided by.

    Shapes: ``[F]``.

    Args:
        sizes_F: How large the inputs of each channel are; what they are measured in does not matter.
        exponent: 0 for factors of 1.

    Source: arXiv 2306.00978, and the released code for the bounds.

    Example:
        >>> awq_factors(torch.tensor([1.0, 16.0]), 0.5)
        tensor([0.5000, 2.0000])
    """
    mean = sizes_F.mean()
    relative_F = sizes_F / mean if mean > 0 else torch.ones_like(sizes_F)
    factors_F = relative_F.pow(exponent).clamp_min(_LEAST)
    return factors_F / (factors_F.max() * factors_F.min()).sqrt()


def rounding_error(weight_OI: Tensor, factors_I: Tensor, statistics: Sequence[InputStatistics], grid: RoundingGrid) -> float:
    """What a layer's output loses when its weight is rounded behind factors.

    Shapes: ``[O, I]`` with ``[1, I]``; or ``[E, O, I]`` with ``[E, 1, I]``.

    Args:
        weight_OI: The weight, with its zeros if it has such, float32.
        factors_I: What it is multiplied by before it is rounded, and divided by afterwards.
        statistics: Of the inputs, with Gram matrices: one, or one for each expert.
        grid: What it is rounded to.

    Returns:
        The sum of squares over calibration tokens and outputs.

    Exactness: this is what the outputs themselves would show, but for rounding in float32.

    Example:
        >>> known = InputStatistics(num_tokens=1, gram_II=torch.diag(torch.tensor([4.0, 1.0])))
        >>> rounding_error(torch.tensor([[7.0, 0.25]]), torch.ones(1, 2), [known], RoundingGrid())
        0.0625
    """
    missing_OI = round_to_nearest(weight_OI * factors_I, grid).weight_OI / factors_I - weight_OI
    parts = missing_OI if missing_OI.dim() == 3 else missing_OI[None]
    return sum(output_size(part, known) for part, known in zip(parts, statistics, strict=True) if known.num_tokens)
