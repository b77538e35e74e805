"""N:M patterns: which of every M consecutive weights are kept, whether a tensor keeps to a pattern, and a mask as logits.

The logits are those that masks are learned from; the axis that N:M runs along comes last in them.

Shape suffixes: O out, I in, G groups, M weights of one group, X any dimensions flattened; of logits, R rows (all other axes)
and C candidates.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsepass.graph.native import TYPES, Kernels, find_kernels
from sparsepass.graph.soft_masks import candidate_masks
from sparsepass.graph.spec import num_broken_groups
from sparsepass.graph.support import SparsepassError

# Up to this M, comparing every pair of a group beats a stable sort by far (about 20 times at M = 4).
_LARGEST_PAIRWISE_M = 16
# An integer of one byte for each weight of a group.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NATIVE_TYPES = {getattr(torch, name): number for name, number in TYPES.items()}


@dataclass(frozen=True)
class NMPattern:
    """At most N nonzeros in every M consecutive weights.

    Args:
        n: Weights kept of each group, 0 < n < m.
        m: Length of a group.

    Raises:
        SparsepassError: N and M are not whole numbers with 0 < N < M.

    >>> pattern = NMPattern.parse("2:4")
    >>> pattern.n, pattern.m, str(pattern)
    (2, 4, '2:4')
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int:
            raise SparsepassError(f"an N:M pattern takes two whole numbers, got n={self.n!r} and m={self.m!r}")
        if not 0 < self.n < self.m:
            if self.n <= 0:
                why = "it would keep nothing"
            elif self.n == self.m:
                why = "it would keep every weight"
            else:
                why = f"it would keep {self.n} weights out of {self.m}; did you mean {self.m}:{self.n}?"
            raise SparsepassError(f"an N:M pattern needs 0 < N < M, as in 2:4, got {self.n}:{self.m}: {why}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @staticmethod
    def parse(text: str) -> "NMPattern":
        """Reads a pattern from its text form.

        Args:
            text: Two whole numbers with a colon between them, such as ``2:4``.

        Returns:
            The pattern, whose ``str()`` is the text again.

        Raises:
            SparsepassError: The text is something else, or does not satisfy 0 < N < M.

        >>> NMPattern.parse("1:8")
        NMPattern(n=1, m=8)
        """
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*", text)
        if match is None:
            raise SparsepassError(
                f"an N:M pattern is written as two whole numbers with a colon between them, as in 2:4, got {text!r}"
            )
        return NMPattern(int(match[1]), int(match[2]))


def nm_mask(score_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Keeps the N largest scores of every M along the last axis; ties go to the lowest index.

    Shapes: ``[..., I]`` to ``[..., I]``.

    Args:
        score_OI: Scores of any real dtype, infinities included.
        pattern: How many to keep of each group.

    Returns:
        A bool mask, exactly N true in each group.

    Raises:
        SparsepassError: I is not a multiple of M, or a score is NaN.

    Source: methods.md section 1; Exactness: bitwise.

    >>> nm_mask(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), NMPattern(2, 4))
    tensor([[False,  True,  True, False]])
    """
    _check_groups(score_OI, pattern, -1)  # refuses what does not divide
    if score_OI.is_floating_point() and score_OI.numel() and bool(score_OI.amax().isnan()):
        raise SparsepassError(
            f"cannot rank scores for a {pattern} mask: {int(score_OI.isnan().sum())} of {score_OI.numel()} are NaN; "
            "check the weights and the activations that the scores come from"
        )
    return keep_largest_of_groups(score_OI, pattern)


def keep_largest_of_groups(score_OI: Tensor, pattern: NMPattern) -> Tensor:
    """Keeps the N largest of every M along the last axis; ties go to the lowest index.

    The unchecked core of `nm_mask`: the last axis is a multiple of M long, and nothing is NaN.

    Shapes: ``[..., I]`` to ``[..., I]``.

    Args:
        score_OI: Scores of any real dtype.
        pattern: How many to keep of each group.

    Returns:
        A bool mask, contiguous.

    >>> keep_largest_of_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), NMPattern(2, 4))
    tensor([ True,  True, False, False])
    """
    if pattern.m == 4 and score_OI.device.type == "cpu" and score_OI.dtype in _NATIVE_TYPES:
        library = find_kernels()
        if not isinstance(library, SparsepassError):
            return _largest_by_library(library, score_OI.contiguous(), pattern.n)
    if pattern.m in _WORDS:
        return _largest_by_words(score_OI.flatten(), pattern).view(score_OI.shape)
    score_OGM = torch.unflatten(score_OI, -1, (score_OI.shape[-1] // pattern.m, pattern.m))
    mask_MOG = keep_largest(score_OGM.movedim(-1, 0).contiguous(), pattern.n)
    return mask_MOG.movedim(0, -1).flatten(-2).contiguous()


def _largest_by_library(library: Kernels, score_OI: Tensor, n: int) -> Tensor:
    mask_OI = torch.empty(score_OI.shape, dtype=torch.bool)
    number, groups = _NATIVE_TYPES[score_OI.dtype], score_OI.numel() // 4
    library.largest_of_four(number, score_OI.data_ptr(), groups, n, mask_OI.data_ptr(), torch.get_num_threads())
    return mask_OI


def _largest_by_words(score_X: Tensor, pattern: NMPattern) -> Tensor:
    # What keep_largest says, without taking the groups apart: gathering every M-th weight would be most of the time.
    # Neighbours at each distance are compared all along, across groups too; then a group's results, a byte each, are one
    # integer, in which pairs across groups are masked out, and each byte counts the weights of its group that it beats.
    # Comparisons keep their dtype: torch's kernels that turn numbers into bools go one by one on a processor.
    word, m = _WORDS[pattern.m], pattern.m
    beaten = torch.zeros(score_X.numel() // m, dtype=word, device=score_X.device)
    earlier_wins = torch.zeros_like(score_X)
    for distance in range(1, m):
        torch.ge(score_X[:-distance], score_X[distance:], out=earlier_wins[:-distance])
        inside = sum(1 << 8 * place for place in range(m - distance))
        wins = earlier_wins.to(torch.bool).view(word).bitwise_and_(inside)
        beaten += wins
        beaten += wins.bitwise_xor_(inside).bitwise_left_shift_(8 * distance)  # the later one wins
    return beaten.view(torch.uint8).ge_(m - pattern.n).view(torch.bool)


def keep_largest(score_MX: Tensor, n: int) -> Tensor:
    """Keeps the n largest along the first axis; ties go to the lowest index. The scores must not hold NaN.

    As `keep_largest_of_groups`, for scores whose groups already lie along the first axis.

    Shapes: ``[M, ...]`` to ``[M, ...]``.

    Args:
        score_MX: Scores, contiguous for speed.
        n: How many to keep, 0 < n < M.

    Returns:
        A bool mask, exactly n true along the first axis.

    >>> keep_largest(torch.tensor([2.0, 2.0, 5.0]), 2)
    tensor([ True, False,  True])
    """
    m = score_MX.shape[0]
    if m > _LARGEST_PAIRWISE_M:
        order_MX = score_MX.argsort(dim=0, descending=True, stable=True)
        kept_MX = torch.zeros_like(score_MX, dtype=torch.bool)
        return kept_MX.scatter_(0, order_MX[:n], True)
    # rank = how many of the group beat this one. Start as if every later one did, then settle all pairs at distance d.
    start_M = torch.arange(m - 1, -1, -1, dtype=torch.int8, device=score_MX.device)
    rank_MX = start_M.view(m, *[1] * (score_MX.dim() - 1)).repeat(1, *score_MX.shape[1:])
    for distance in range(1, m):
        earlier_wins = (score_MX[:-distance] >= score_MX[distance:]).view(torch.int8)
        rank_MX[distance:] += earlier_wins
        rank_MX[:-distance] -= earlier_wins
    return rank_MX < n


def canonical_zeros(tensor: Tensor) -> Tensor:
    """Turns every -0.0 into +0.0; all else is kept bit for bit.

    Some packers of 2:4 weights take -0.0 for a nonzero.

    Shapes: any, unchanged.

    Args:
        tensor: Any dtype.

    Returns:
        A new tensor of the same dtype.

    Exactness: bitwise.

    >>> canonical_zeros(torch.tensor([-0.0, 1.5])).signbit()
    tensor([False, False])
    """
    return torch.where(tensor == 0, torch.zeros((), dtype=tensor.dtype, device=tensor.device), tensor)


def num_violations(weight: Tensor, pattern: NMPattern, axis: int = -1) -> int:
    """Counts the groups that hold more than N nonzeros.

    Shapes: any, with ``weight.shape[axis]`` a multiple of M.

    Args:
        weight: The stored weight; NaN counts as a nonzero, -0.0 as a zero.
        pattern: The pattern to check against.
        axis: The axis that groups run along.

    Returns:
        The number of groups that break the pattern.

    Raises:
        SparsepassError: The axis is not a multiple of M long.

    >>> num_violations(torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), NMPattern(2, 4))
    1
    """
    _check_groups(weight, pattern, axis)
    return num_broken_groups(weight != 0, pattern.n, pattern.m, axis)


def is_nm(weight: Tensor, pattern: NMPattern, axis: int = -1) -> bool:
    """Says whether a tensor keeps to a pattern: at most N nonzeros in every M consecutive entries of an axis.

    Shapes: any, with ``weight.shape[axis]`` a multiple of M.

    Args:
        weight: The stored weight.
        pattern: The pattern to check against.
        axis: The axis that groups run along.

    Returns:
        True if no group breaks the pattern.

    Raises:
        SparsepassError: The axis is not a multiple of M long.

    >>> is_nm(torch.tensor([[0.0, 1.0, 2.0, 0.0]]), NMPattern(2, 4))
    True
    """
    return num_violations(weight, pattern, axis) == 0


def _check_groups(tensor: Tensor, pattern: NMPattern, axis: int) -> None:
    if not -tensor.dim() <= axis < tensor.dim():
        raise SparsepassError(f"a tensor of shape {tuple(tensor.shape)} has no axis {axis} for {pattern} to run along")
    size = tensor.shape[axis]
    if size % pattern.m:
        raise SparsepassError(
            f"{size} features along axis {axis} of a tensor of shape {tuple(tensor.shape)} are not a multiple of "
            f"{pattern.m}, which {pattern} needs; leave this weight alone or choose a pattern whose M divides {size}"
        )


def first_logits(
    rows: tuple[int, ...], num_groups: int, pattern: NMPattern, *, std: float, seed: int, device: torch.device
) -> Tensor:
    """Logits from ``N(0, std^2)``.

    Shapes: float32 ``[..., C, G]``.

    Args:
        rows: The leading axes.
        num_groups: G.
        pattern: N:M.
        std: Standard deviation.
        seed: The same numbers for the same seed, on every device.
        device: Where they go.

    Source: MaskLLM, arXiv 2409.17481, section 4 (settings).

    >>> first_logits((2,), 3, NMPattern(2, 4), std=0.01, seed=0, device=torch.device("cpu")).shape
    torch.Size([2, 6, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (*rows, len(candidate_masks(pattern.n, pattern.m)), num_groups)
    return torch.randn(shape, generator=generator).mul_(std).to(device)


def add_prior(logits_RCG: Tensor, mask_RI: Tensor, pattern: NMPattern, alpha: float) -> Tensor:
    """Move logits towards a mask: ``pi_i += std(pi) (M0 . S_i - N^2 / M) alpha``, S_i the candidates.

    ``N^2 / M`` is the mean of ``M0 . S_i`` over the candidates, so the mean of a group's logits stays.

    Shapes: logits ``[..., C, G]``, mask ``[..., G * M]``; the result is like the logits.

    Args:
        logits_RCG: ``pi``; their standard deviation is taken over all of them.
        mask_RI: M0, bool.
        pattern: N:M.
        alpha: How strong the mask is; 0 leaves the logits as they are.

    Returns:
        New logits.

    Raises:
        SparsepassError: If a group of the mask does not keep exactly N.

    Source: MaskLLM, arXiv 2409.17481, section 3 (transfer learning).

    >>> mask = torch.tensor([[True, True, False, False]])
    >>> logits = torch.tensor([-1.0, 1, -1, 1, -1, 1]).view(1, 6, 1)
    >>> moved = add_prior(logits, mask, NMPattern(2, 4), alpha=3.0) - logits
    >>> [round(x, 2) for x in (moved / logits.std()).flatten().tolist()]
    [3.0, 0.0, 0.0, 0.0, 0.0, -3.0]
    """
    mask_RGM = torch.unflatten(mask_RI, -1, (-1, pattern.m))
    if bool((mask_RGM.sum(-1) != pattern.n).any()):
        raise SparsepassError(
            f"a prior for learned {pattern} masks keeps exactly {pattern.n} of every {pattern.m} weights, and a group of this "
            "mask keeps another number; use the mask of a criterion, or alpha=0"
        )
    if not alpha:
        return logits_RCG.clone()
    table_CM = candidate_masks(pattern.n, pattern.m).to(logits_RCG.device, logits_RCG.dtype)
    overlap_RCG = torch.matmul(table_CM, mask_RGM.to(logits_RCG.dtype).transpose(-1, -2))
    return torch.add(logits_RCG, overlap_RCG - pattern.n**2 / pattern.m, alpha=alpha * float(logits_RCG.std()))
