"""Soft masks: each group of M weights behind a mix of its C(M, N) candidate masks, which MaskLLM learns. Pure functions.

What a group needs for each candidate is made for a few rows at a time, in the forward pass and again in the backward pass:
whole, it would be six numbers for every four weights.

Shape suffixes: R rows (every axis of a weight but the one that N:M runs along, which stands last here), C candidates, G groups
of a row, M entries of a group, I = G * M, K distinct values of the noise.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

MAX_CANDIDATES = 128
"""Candidate masks of a pattern at most: each of them is a trained number for every group."""

# Logits per piece. On a processor what a piece needs should fit in the second-level cache; on a GPU it bounds the memory.
_CPU_PIECE, _GPU_PIECE = 1 << 16, 1 << 25
_NOISE_BITS = 16
_WORD = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How soft masks are drawn from logits.

    Attributes:
        scale: ``kappa``, what the logits are multiplied by.
        temperature: ``tau``, above 0.
        key: Numbers the noise: 0 to 2^53. The same key gives the same noise.
        first_row: Number of the first row, where the logits are those of a part of the rows.
    """

    scale: float
    temperature: float
    key: int
    first_row: int = 0


def num_candidates(n: int, m: int) -> int:
    """How many masks keep N of M.

    Raises:
        SparsepassError: If there are more than `MAX_CANDIDATES`.

    >>> num_candidates(2, 4)
    6
    """
    number = math.comb(m, n)
    if number > MAX_CANDIDATES:
        raise SparsepassError(
            f"{n}:{m} has {number} candidate masks, and each would be a trained number for every group of {m} weights; masks "
            f"are learned for at most {MAX_CANDIDATES} candidates, as in 2:4 (6), 4:8 (70) or 2:16 (120)"
        )
    return number


@functools.cache
def candidate_masks(n: int, m: int) -> Tensor:
    """All masks that keep N of M, the one that keeps the first N entries first, in lexicographic order of what is kept.

    Shapes: bool ``[C, M]``.

    >>> candidate_masks(1, 3).int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    found_CM = torch.zeros(num_candidates(n, m), m, dtype=torch.bool)
    for number, kept in enumerate(itertools.combinations(range(m), n)):
        found_CM[number, list(kept)] = True
    return found_CM


def hard_mask(logits_RCG: Tensor, n: int, m: int) -> Tensor:
    """The candidate with the largest logit of each group; ties go to the lowest index.

    Shapes: ``[..., C, G]`` to a bool ``[..., G * M]``.

    Source: MaskLLM, arXiv 2409.17481, section 3.

    >>> hard_mask(torch.tensor([[0.5], [2.0], [2.0]]), 1, 3)
    tensor([False,  True, False])
    """
    table_CM = candidate_masks(n, m).to(logits_RCG.device)
    mask = torch.empty(*logits_RCG.shape[:-2], logits_RCG.shape[-1], m, dtype=torch.bool, device=logits_RCG.device)
    for part, _ in _pieces(logits_RCG):
        mask[part] = table_CM[logits_RCG[part].argmax(-2)]
    return mask.flatten(-2)


def gumbel_noise(
    num_rows: int, num_candidates: int, num_groups: int, key: int, *, first_row: int, device: torch.device
) -> Tensor:
    """Gumbel noise of some rows: a function of the key and the place alone, the same on every device and in every process.

    Each number is ``-log(-log(u))``, u one of 2^16 equally likely values in (0, 1), chosen by half a word of a hash of its
    place. It lies between -2.5 and 11.8.

    Shapes: float32 ``[R, C, G]``.

    Args:
        num_rows: R.
        num_candidates: C.
        num_groups: G.
        key: See `Draw`.
        first_row: Number of the first row.
        device: Where it is made.

    Source: the hash is C. Wellons' lowbias32.

    >>> whole = gumbel_noise(5, 6, 3, 7, first_row=0, device=torch.device("cpu"))
    >>> torch.equal(whole[2:], gumbel_noise(3, 6, 3, 7, first_row=2, device=torch.device("cpu")))
    True
    """
    words = -(-num_candidates * num_groups // 2)
    offset, stride = _mixed(key), _mixed(key + (1 << 60)) | 1
    first = first_row * words * stride + offset
    x = torch.arange(num_rows * words, dtype=torch.int32, device=device).mul_(_signed(stride)).add_(_signed(first))
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1))  # a shift of a signed number copies its sign
        if factor != 1:
            x.mul_(_signed(factor))
    place = x.view(torch.int16).to(torch.int32).add_(1 << _NOISE_BITS - 1)
    noise = _gumbel_values(device).index_select(0, place).view(num_rows, 2 * words)[:, : num_candidates * num_groups]
    return torch.unflatten(noise, 1, (num_candidates, num_groups))


def soft_weight(weight_RI: Tensor, logits_RCG: Tensor, n: int, m: int, draw: Draw) -> Tensor:
    """A weight behind soft masks: ``W .* (y S)``, ``y = softmax((kappa pi + g) / tau)`` over the candidates S.

    Shapes: weight ``[..., I]``, logits ``[..., C, G]`` with the same leading axes; the result is like the weight, contiguous.

    Args:
        weight_RI: In any floating dtype.
        logits_RCG: ``pi``; computed in their dtype, in float32 where that is narrower.
        n: Entries kept of a group.
        m: Length of a group.
        draw: Scale, temperature and noise.

    Source: MaskLLM, arXiv 2409.17481, section 3 (Gumbel softmax over masks).

    >>> draw = Draw(scale=100.0, temperature=0.01, key=3)
    >>> soft_weight(torch.ones(1, 4), torch.tensor([[[1.0], [0], [0], [0], [0], [0]]]), 2, 4, draw)
    tensor([[1., 1., 0., 0.]])
    """
    out = torch.empty(weight_RI.shape, dtype=weight_RI.dtype, device=weight_RI.device)
    for part, first in _pieces(logits_RCG):
        mask_MG = _soft_mask(_soft_choice(logits_RCG[part], draw, first), n, m)
        torch.mul(weight_RI[part].unflatten(-1, (-1, m)), mask_MG.transpose(-1, -2), out=out[part].unflatten(-1, (-1, m)))
    return out


def soft_weight_gradient(grad_RI: Tensor, weight_RI: Tensor, logits_RCG: Tensor, n: int, m: int, draw: Draw) -> Tensor:
    """Gradient of `soft_weight` to the logits.

    Shapes: ``[..., I]``, ``[..., I]`` and ``[..., C, G]`` to ``[..., C, G]``.

    Args:
        grad_RI: Gradient to what `soft_weight` returned.
        weight_RI: As it was given there.
        logits_RCG: As they were given there.
        n: Entries kept of a group.
        m: Length of a group.
        draw: As it was given there: the choice is computed again.

    >>> draw = Draw(scale=1.0, temperature=1.0, key=3)
    >>> grad = soft_weight_gradient(torch.ones(1, 4), torch.tensor([[1.0, 1, 0, 0]]), torch.zeros(1, 6, 1), 2, 4, draw)
    >>> bool(grad[0, 0] > 0), bool(grad[0, 5] < 0)
    (True, True)
    """
    out = torch.empty(logits_RCG.shape, dtype=logits_RCG.dtype, device=logits_RCG.device)
    for part, first in _pieces(logits_RCG):
        choice_CG = _soft_choice(logits_RCG[part], draw, first)
        slope = (grad_RI[part] * weight_RI[part]).to(choice_CG.dtype).unflatten(-1, (-1, m))
        out[part] = _through_softmax(choice_CG, slope, n, m).mul_(draw.scale / draw.temperature)
    return out


def kept_norm(
    weight_RI: Tensor, logits_RCG: Tensor, n: int, m: int, draw: Draw, gradient: Tensor | None, factor: float
) -> float:
    """Squared norm of a weight behind soft masks, ``sum ||W .* M~||^2``, and its gradient.

    Shapes: weight ``[..., I]``, logits and gradient ``[..., C, G]``.

    Args:
        weight_RI: The weight.
        logits_RCG: ``pi``.
        n: Entries kept of a group.
        m: Length of a group.
        draw: As it was for the forward pass.
        gradient: Gets ``factor`` times the gradient added; None if only the norm is wanted.
        factor: Minus lambda, to make the norm grow.

    Returns:
        The squared norm.

    Source: MaskLLM, arXiv 2409.17481, section 3 (sparse weight regularisation).

    >>> kept_norm(torch.full((1, 4), 2.0), torch.zeros(1, 6, 1), 2, 4, Draw(scale=1e3, temperature=1e-3, key=1), None, 0.0)
    8.0
    """
    total = torch.zeros((), dtype=torch.float64, device=weight_RI.device)
    for part, first in _pieces(logits_RCG):
        choice_CG = _soft_choice(logits_RCG[part], draw, first)
        mask_GM = _soft_mask(choice_CG, n, m).transpose(-1, -2)
        weight_GM = weight_RI[part].to(choice_CG.dtype).unflatten(-1, (-1, m))
        soft_GM = mask_GM * weight_GM
        total += soft_GM.square().sum(dtype=torch.float64)
        if gradient is not None:
            slope = soft_GM.mul_(weight_GM).mul_(2 * factor * draw.scale / draw.temperature)
            gradient[part] += _through_softmax(choice_CG, slope, n, m)
    return float(total)


def largest_probabilities(logits_RCG: Tensor, scale: float, threshold: float) -> tuple[int, int]:
    """How many groups are all but decided: the largest probability of ``softmax(kappa pi)`` is above a threshold.

    These are the probabilities with which the noise chooses a candidate; the temperature plays no part in them.

    Shapes: ``[..., C, G]``.

    Returns:
        Groups above it, and groups in all.

    >>> largest_probabilities(torch.tensor([[0.0, 9.0], [0.0, 0.0]]), 1.0, 0.99)
    (1, 2)
    """
    decided = 0
    for part, _ in _pieces(logits_RCG):
        logits_CG = logits_RCG[part].to(torch.promote_types(logits_RCG.dtype, torch.float32)) * scale
        decided += int((logits_CG.amax(-2) - logits_CG.logsumexp(-2) > math.log(threshold)).sum())
    return decided, logits_RCG.numel() // logits_RCG.shape[-2] if logits_RCG.numel() else 0


def noise_key(seed: int, step: int, name: int) -> int:
    """A key for the noise of one step at one place, all three mixed.

    >>> noise_key(0, 1, 2) == noise_key(0, 1, 2), noise_key(0, 1, 2) == noise_key(0, 2, 1)
    (True, False)
    """
    key = 0
    for value in (seed, step, name):
        key = _splitmix(key ^ (value & (_WORD * _WORD - 1)))
    return key >> 11


def _soft_choice(logits_CG: Tensor, draw: Draw, first_row: int) -> Tensor:
    """``y``, a new tensor, at least float32. The leading axes count as rows."""
    *rows, candidates, groups = logits_CG.shape
    noise_CG = gumbel_noise(
        math.prod(rows), candidates, groups, draw.key, first_row=draw.first_row + first_row, device=logits_CG.device
    ).view(logits_CG.shape)
    wide = logits_CG.to(torch.promote_types(logits_CG.dtype, torch.float32))
    return torch.softmax(torch.add(noise_CG, wide, alpha=draw.scale).div_(draw.temperature), -2)


def _soft_mask(choice_CG: Tensor, n: int, m: int) -> Tensor:
    """``(y S)^T``, [..., M, G]."""
    table_MC = _table(n, m, choice_CG.dtype, choice_CG.device).t()
    return torch.matmul(table_MC, choice_CG)


def _through_softmax(choice_CG: Tensor, slope_GM: Tensor, n: int, m: int) -> Tensor:
    """Gradient to what goes into the softmax, from that to the mask."""
    slope_CG = torch.matmul(_table(n, m, choice_CG.dtype, choice_CG.device), slope_GM.transpose(-1, -2))
    mean_G = (choice_CG * slope_CG).sum(-2, keepdim=True)
    return slope_CG.sub_(mean_G).mul_(choice_CG)


@functools.cache
def _table(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return candidate_masks(n, m).to(device, dtype)


@functools.cache
def _gumbel_values(device: torch.device) -> Tensor:
    uniform_K = (torch.arange(1 << _NOISE_BITS, dtype=torch.float64) + 0.5) / (1 << _NOISE_BITS)
    return (-(-uniform_K.log()).log()).to(device, torch.float32)


def _pieces(logits: Tensor) -> Iterator[tuple[tuple[int | slice, ...], int]]:
    """Index of a few rows at a time, and the number of the first of them."""
    *axes, candidates, groups = logits.shape
    if not logits.numel():
        return
    *outer, rows = axes or [1]
    limit = _GPU_PIECE if logits.is_cuda else _CPU_PIECE
    size = max(1, limit // (candidates * groups))
    for number, index in enumerate(itertools.product(*map(range, outer))):
        if not axes:
            yield (), 0
            return
        for start in range(0, rows, size):
            yield (*index, slice(start, start + size)), number * rows + start


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % (1 << 64)
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    value = (value ^ value >> 27) * 0x94D049BB133111EB % (1 << 64)
    return value ^ value >> 31


def _mixed(value: int) -> int:
    return _splitmix(value) % _WORD


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
