"""Orders of input channels in which groups of M keep more of a score.

Shape suffixes: C channels, R rows, G groups.
"""

from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths.pattern import NMPattern, keep_largest_of_groups

PermutationMethod = Literal["assignment", "greedy"]
_Places: TypeAlias = NDArray[np.int64]
# Refinement goes round the M places of the groups until a round gains no more than this share of the kept score.
_LEAST_GAIN = 1e-4
_MOST_ROUNDS = 20


def kept_score(score_CR: Tensor, pattern: NMPattern) -> float:
    """The sum of the N largest scores of every M consecutive channels, in every row.

    Shapes: ``[C, R]``.

    Args:
        score_CR: Scores of at least 0, a channel of the weight in each row.
        pattern: N:M along the channels.

    Example:
        >>> kept_score(torch.tensor([[4.0], [3.0], [2.0], [1.0]]), NMPattern(2, 4))
        7.0
    """
    score_RC = score_CR.T.contiguous()
    return float(score_RC.masked_fill(~keep_largest_of_groups(score_RC, pattern), 0).sum(dtype=torch.float64))


@torch.no_grad()
def best_order(score_CR: Tensor, pattern: NMPattern, method: PermutationMethod = "assignment") -> Tensor:
    """An order of the channels in which groups of M consecutive ones keep at least as much as in the given order.

    1. Channels are sorted by their summed score and dealt out, as cards are: one to each group, then another one to each group
       in the reverse order, and so on.
    2. ``greedy``: only the first N are dealt to each group, of which nothing is lost. Each later channel, the largest first,
       goes where the score that is kept rises most; each group takes one before any takes the next.
    3. ``assignment``: in turn for each place of the groups, the channels there are taken out of all groups and assigned anew,
       in the best way there is while the others stay; until that gains no more.
    4. If all this keeps no more than the given order, the given one stays.

    Shapes: ``[C, R]`` to ``[C]``.

    Args:
        score_CR: Scores of at least 0, a channel of the weight in each row; on the processor.
        pattern: N:M along the channels, whose number M divides.
        method: How to search. Greedy takes a fifth to a tenth of the time.

    Returns:
        Which channel comes to each place.

    Raises:
        SparsepassError: M does not divide the number of channels.

    Source: RIA's channel permutation (ICLR 2024); methods.md section 1.

    Example:
        >>> best_order(torch.tensor([[9.0], [8.0], [7.0], [1.0], [1.0], [1.0], [1.0], [6.0]]), NMPattern(2, 4)).tolist()
        [0, 2, 3, 6, 1, 7, 4, 5]
    """
    num_channels = len(score_CR)
    if num_channels % pattern.m:
        raise SparsepassError(f"{num_channels} channels do not make groups of {pattern.m}")
    dealt = _dealt(score_CR, pattern)
    places = _refined(score_CR, dealt, pattern) if method == "assignment" else _greedy(score_CR, dealt, pattern)
    order_C = _in_groups(places)
    keeps_more = kept_score(score_CR[order_C], pattern) > kept_score(score_CR, pattern)
    return order_C if keeps_more else torch.arange(num_channels)


def _in_groups(places: _Places) -> Tensor:
    """Channels at [M, G] as an order of channels: group after group."""
    return torch.from_numpy(places.T.reshape(-1).copy())


def _dealt(score_CR: Tensor, pattern: NMPattern) -> _Places:
    """The channel at each place of each group, [M, G]."""
    ranked = score_CR.sum(1, dtype=torch.float64).argsort(descending=True, stable=True).numpy().reshape(pattern.m, -1)
    ranked[1::2] = ranked[1::2, ::-1].copy()
    return ranked


def _greedy(score_CR: Tensor, places: _Places, pattern: NMPattern) -> _Places:
    for taken in range(pattern.n, pattern.m):
        threshold_GR = _nth_largest(score_CR, places[:taken], pattern.n)
        channels = np.sort(places[taken])
        channels = channels[np.argsort(-score_CR[channels].sum(1, dtype=torch.float64).numpy(), kind="stable")]
        gain_GC = _gains(threshold_GR, score_CR[channels])
        for column, channel in enumerate(channels.tolist()):
            group = int(gain_GC[:, column].argmax())
            places[taken, group] = channel
            gain_GC[group] = -np.inf
    return places


def _refined(score_CR: Tensor, places: _Places, pattern: NMPattern) -> _Places:
    total = kept_score(score_CR[_in_groups(places)], pattern)
    for _ in range(_MOST_ROUNDS):
        gained = 0.0
        for place in range(pattern.m):
            threshold_GR = _nth_largest(score_CR, np.delete(places, place, 0), pattern.n)
            gain_GC = _gains(threshold_GR, score_CR[places[place]])
            chosen = linear_sum_assignment(gain_GC, maximize=True)[1]
            gained += float((gain_GC[np.arange(len(chosen)), chosen] - gain_GC.diagonal()).sum())
            places[place] = places[place][chosen]
        if gained <= _LEAST_GAIN * total:
            break
    return places


def _nth_largest(score_CR: Tensor, places: _Places, n: int) -> Tensor:
    """In each row, what a further channel of each group has to surpass in order to be kept."""
    found = [score_CR[members] for members in places]
    for first in range(n):
        for second in range(first + 1, len(found)):
            larger = torch.maximum(found[first], found[second])
            found[second] = torch.minimum(found[first], found[second])
            found[first] = larger
    return found[n - 1]


def _gains(threshold_GR: Tensor, score_CR: Tensor) -> NDArray[np.float64]:
    """How much more each group keeps with each channel: the sum of what its scores are above the threshold."""
    # max(0, b - a) is (|a - b| + b - a) / 2, and torch has a fast kernel for sums of |a - b|.
    apart_GC = torch.cdist(threshold_GR, score_CR, p=1).double()
    sums_C, sums_G = (each.sum(1, dtype=torch.float64) for each in (score_CR, threshold_GR))
    gain_GC: NDArray[np.float64] = ((apart_GC + sums_C - sums_G.unsqueeze(1)) / 2).numpy()
    return gain_GC
