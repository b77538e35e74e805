"""Why a weight breaks its pattern, as far as its own values tell, and what to do about it.

Only what is stored is looked at, so a cause is likely and never proven:

1. The pattern lies on another axis: it was made for another layout.
2. In most groups the M - N smallest values are far smaller than the others: the places of the zeros were filled after
   pruning. If these values alone fit a matrix of low rank (completed by alternating least squares, and tested on values
   held back), an adapter was merged; if not, the weight was trained without its mask.
3. No more nonzeros than the pattern allows in all, but unevenly spread: unstructured sparsity, or channels permuted.
4. A few groups only: single values changed.
5. All else is dense: it was never pruned, or changed beyond recognition.

Shape suffixes: R rows, C columns, X rank.
"""

import math
from dataclasses import dataclass
from typing import final

import ml_dtypes
import numpy as np

from sparsepass.export.pattern.bits import Array, BitView, GroupCount

# Of dense weights the median over groups is about 0.6 (the 2nd smallest of four by the 3rd); filled zeros are far below.
_FILLED_RATIO = 0.25
_FEW_GROUPS = 0.05
_BLOCK = 256
_RANKS = (4, 8, 16, 32)
# Relative error on values held back. Noise gives 1 or more; a merged adapter of fitting rank 0.05 or less.
_FITS = 0.1
_NUM_STEPS = 12
_FLOATS = {
    **{name: np.dtype(np.float32) for name in ("float", "f32")},
    **{name: np.dtype(np.float16) for name in ("float16", "f16")},
    **{name: np.dtype(np.float64) for name in ("double", "f64")},
    **{name: np.dtype(ml_dtypes.bfloat16) for name in ("bfloat16", "bf16")},
}


@final
@dataclass(frozen=True, kw_only=True)
class Cause:
    """What probably happened to a weight.

    Attributes:
        kind: "wrong axis", "merged adapter", "trained without mask", "not in groups", "single values" or "dense".
        text: The cause, in words.
        advice: What to do.
    """

    kind: str
    text: str
    advice: str


def wrong_axis(axis: int, conforming: tuple[int, ...]) -> Cause:
    """The cause for a weight that conforms along another axis than K.

    >>> wrong_axis(0, (1,)).text
    'groups were made along axis 1 and the product sums over axis 0: pruned in another layout, or transposed since'
    """
    others = ", ".join(map(str, conforming))
    return Cause(
        kind="wrong axis",
        text=f"groups were made along axis {others} and the product sums over axis {axis}: pruned in another layout, or "
        "transposed since",
        advice="Prune the dense weights again along the axis of K (sparsepass prune does). If the axis of K is wrong "
        "here (a checkpoint names no operations), give it as axes to check_pattern.",
    )


def likely_cause(
    view: BitView, dtype: str, n: int, m: int, axis: int, count: GroupCount, *, look_for_rank: bool = True
) -> Cause:
    """Tell why a weight that conforms along no axis probably does not.

    Args:
        view: Its bits.
        dtype: Its stored type, in lower case.
        n: Nonzeros allowed.
        m: Group size.
        axis: Axis of the groups.
        count: What `count_groups` found.
        look_for_rank: Also look for a merged adapter, which takes up to a second.

    Returns:
        The cause.

    >>> from sparsepass.export.pattern.bits import count_groups, view_bits
    >>> dense = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    >>> view = view_bits(dense, has_sign=True)
    >>> likely_cause(view, "float", 2, 4, 1, count_groups(view, 2, 4, 1)).kind
    'dense'
    """
    if count.num_nonzeros * m <= count.num_groups * m * n:
        return Cause(
            kind="not in groups",
            text=f"it has no more nonzeros in all than {n}:{m} allows, but they do not lie in groups of {m} along K: "
            "unstructured sparsity, or the channels were permuted or shifted after pruning",
            advice=f"Prune with an {n}:{m} pass (sparsepass prune), or undo the permutation.",
        )
    values_RC = _sample(view, dtype, axis)
    small_RC, ratio = (None, 1.0) if values_RC is None else _smallest(values_RC, n, m)
    if values_RC is not None and small_RC is not None and ratio < _FILLED_RATIO:
        rank = low_rank(values_RC, small_RC) if look_for_rank else None
        filled = (
            f"the zeros were filled after pruning with values about {1 / max(ratio, 1e-9):.0f} times smaller than those kept"
        )
        if rank is not None:
            return Cause(
                kind="merged adapter",
                text=f"{filled}, and these form a matrix of rank {rank} or less: likely a LoRA adapter was merged into it",
                advice="Take the weights from before the merge and keep the adapter beside them, or prune again after "
                "the merge (and retrain with the mask).",
            )
        return Cause(
            kind="trained without mask",
            text=f"{filled}: likely fine-tuned without its mask (or an adapter of high rank was merged into it)",
            advice="Train with the mask in the forward pass (sparsepass retrain), or prune again with the old mask: "
            "setting the filled values to zero again changes the outputs.",
        )
    if count.num_violations <= _FEW_GROUPS * count.num_groups:
        return Cause(
            kind="single values",
            text="all but a few groups conform: single values were changed after pruning (by rounding, an edit, or damage)",
            advice="Look at the first place named, and export again from the pruned weights.",
        )
    return Cause(
        kind="dense",
        text="it looks never pruned, or was overwritten since (dense weights loaded, a large adapter merged, long training "
        "without its mask)",
        advice="Prune it; if it is dense on purpose, name it with --ignore.",
    )


def low_rank(values_RC: Array, known_RC: Array) -> int | None:
    """Find the lowest rank of 4, 8, 16 and 32 that explains the known entries of a matrix, if one does.

    Shapes:
        values_RC: [R, C] the entries; known_RC: [R, C] bool, those that belong to the matrix looked for.

    Args:
        values_RC: The entries.
        known_RC: Which of them are known.

    Returns:
        The rank, or None.

    Exactness:
        A tenth of the known entries is held back; the rank is accepted if they are met within 10%. Ranks whose
        parameters are more than 60% of the entries fitted are not tried: they would explain anything.

    Source:
        Matrix completion by alternating least squares (Jain, Netrapalli and Sanghavi, arXiv 1212.0467).

    >>> rng = np.random.default_rng(0)
    >>> merged, known = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 64)), rng.random((64, 64)) < 0.5
    >>> low_rank(merged, known), low_rank(rng.standard_normal((64, 64)), known)
    (4, None)
    """
    rng = np.random.default_rng(0)
    held_RC = known_RC & (rng.random(known_RC.shape) < 0.1)
    fitted_RC = known_RC & ~held_RC
    scale = float(np.sqrt(np.mean(values_RC[fitted_RC] ** 2))) if fitted_RC.any() else 0.0
    if scale == 0.0 or not held_RC.any() or not np.isfinite(scale):
        return None
    values_RC = values_RC / scale
    for rank in _RANKS:
        if rank * (sum(values_RC.shape) - rank) > 0.6 * np.count_nonzero(fitted_RC):
            return None
        completed_RC = _complete(np.where(fitted_RC, values_RC, 0.0), fitted_RC.astype(np.float64), rank, rng)
        error = np.mean((completed_RC - values_RC)[held_RC] ** 2) / np.mean(values_RC[held_RC] ** 2)
        if error < _FITS**2:
            return rank
    return None


def _complete(values_RC: Array, known_RC: Array, rank: int, rng: np.random.Generator) -> Array:
    num_rows, num_columns = values_RC.shape
    left_RX: Array = rng.standard_normal((num_rows, rank))
    right_CX: Array = rng.standard_normal((num_columns, rank))
    ridge_XX = 1e-6 * np.eye(rank)
    for _ in range(_NUM_STEPS):
        for is_left in (True, False):
            known, values, fixed = (known_RC, values_RC, right_CX) if is_left else (known_RC.T, values_RC.T, left_RX)
            grams = (fixed[:, :, None] * fixed[:, None, :]).reshape(len(fixed), -1)
            normal = (known @ grams).reshape(-1, rank, rank) + ridge_XX
            solved: Array = np.linalg.solve(normal, (values @ fixed)[..., None])[..., 0]
            left_RX, right_CX = (solved, right_CX) if is_left else (left_RX, solved)
    completed: Array = left_RX @ right_CX.T
    return completed


def _sample(view: BitView, dtype: str, axis: int) -> Array | None:
    """Up to 256 rows, spread out, of the first 256 or so entries along K, in float64; None for what is no plain float."""
    kind = _FLOATS.get(dtype)
    if kind is None or view.bits.dtype.itemsize != kind.itemsize:
        return None
    bits = np.moveaxis(view.bits, axis, -1)[..., :_BLOCK]
    rows = np.linspace(0, math.prod(bits.shape[:-1]) - 1, min(_BLOCK, math.prod(bits.shape[:-1])), dtype=np.int64)
    sampled = bits[np.unravel_index(rows, bits.shape[:-1])] if bits.ndim > 1 else bits[None]
    values_RC: Array = np.ascontiguousarray(sampled).view(kind).astype(np.float64)
    return values_RC


def _smallest(values_RC: Array, n: int, m: int) -> tuple[Array, float]:
    """The M - N smallest of each group, and the median over groups of the largest of them by the smallest kept."""
    width = values_RC.shape[1] - values_RC.shape[1] % m
    magnitudes = np.abs(values_RC[:, :width]).reshape(len(values_RC), -1, m)
    order = magnitudes.argsort(axis=-1, kind="stable")
    small = np.zeros(magnitudes.shape, np.bool_)
    np.put_along_axis(small, order[..., : m - n], True, axis=-1)
    small_RC = np.zeros(values_RC.shape, np.bool_)
    small_RC[:, :width] = small.reshape(len(values_RC), -1)
    ordered = np.take_along_axis(magnitudes, order, axis=-1)
    below, above = ordered[..., m - n - 1], ordered[..., m - n]
    changed = below > 0
    if not changed.any():
        return small_RC, 1.0
    return small_RC, float(np.median(below[changed] / above[changed]))
