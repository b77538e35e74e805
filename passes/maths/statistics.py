"""The statistics of a layer's inputs: the norms of its features, and the Gram matrix where a criterion needs it.

Shape suffixes: T tokens, I in.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

# Width of the strips that the upper triangle is computed in: wide enough for the matrix product to run at full speed,
# narrow enough to waste little below the diagonal. 192 was the fastest of 96...768 at 576 and 1536 features.
_STRIP = 192
# For the Gram matrix, inputs that are not fp32 are converted in pieces of about this many elements (32 MiB). Squares
# are summed in pieces that stay in the cache (1 MiB), which is six times as fast as in one go.
_GRAM_PIECE_ELEMENTS, _GRAM_PIECE_MIN_TOKENS = 1 << 23, 512
_NORMS_PIECE_ELEMENTS, _NORMS_PIECE_MIN_TOKENS = 1 << 18, 32


class InputStatistics:
    """Sums over the calibration tokens that one site has seen.

    Of a Gram matrix only the upper block triangle is summed, which takes about 60% of the work of ``x.T @ x``. The lower one is
    filled in when the matrix is read. The sums of squares are its diagonal.

    Args:
        num_tokens: Tokens summed so far.
        sum_squares_I: Sum over tokens of each feature's square; not taken with ``gram_II``.
        gram_II: Symmetric sum over tokens of ``x x^T``. Both tensors are taken over, not copied.

    Raises:
        SparsepassError: Not exactly one of the two tensors is given, or its shape is wrong.

    >>> statistics = InputStatistics.zeros(2, gram=True)
    >>> statistics.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> statistics.num_tokens, statistics.gram_II
    (2, tensor([[10.,  2.],
            [ 2.,  4.]]))
    """

    __slots__ = ("_gram_II", "_is_mirrored", "_sum_squares_I", "num_tokens")

    def __init__(self, *, num_tokens: int, sum_squares_I: Tensor | None = None, gram_II: Tensor | None = None) -> None:
        if (sum_squares_I is None) == (gram_II is None):
            raise SparsepassError("input statistics are made of either sum_squares_I or gram_II, and of exactly one of them")
        if sum_squares_I is not None and sum_squares_I.dim() != 1:
            raise SparsepassError(f"sum_squares_I must be [in], got shape {tuple(sum_squares_I.shape)}")
        if gram_II is not None and (gram_II.dim() != 2 or gram_II.shape[0] != gram_II.shape[1]):
            raise SparsepassError(f"gram_II must be [in, in], got shape {tuple(gram_II.shape)}")
        self.num_tokens = num_tokens
        self._sum_squares_I = None if sum_squares_I is None else sum_squares_I.detach().to(torch.float32)
        self._gram_II = None if gram_II is None else gram_II.detach().to(torch.float32)
        self._is_mirrored = True

    @staticmethod
    def zeros(in_features: int, *, gram: bool, device: torch.device | str = "cpu") -> "InputStatistics":
        """Statistics of no tokens yet.

        Args:
            in_features: Features of the input.
            gram: Whether to accumulate the whole Gram matrix or only the sums of squares.
            device: Where to accumulate; inputs are moved there.

        Returns:
            Empty statistics.

        >>> InputStatistics.zeros(8, gram=False).sum_squares_I.shape
        torch.Size([8])
        """
        if gram:
            return InputStatistics(num_tokens=0, gram_II=torch.zeros(in_features, in_features, device=device))
        return InputStatistics(num_tokens=0, sum_squares_I=torch.zeros(in_features, device=device))

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self._storage.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sums are kept."""
        return self._storage.device

    @property
    def has_gram(self) -> bool:
        """Whether the Gram matrix is accumulated."""
        return self._gram_II is not None

    @property
    def sum_squares_I(self) -> Tensor:  # noqa: N802
        """Sum over tokens of each feature's square, fp32."""
        return self._storage if self._gram_II is None else self._gram_II.diagonal().clone()

    @property
    def gram_II(self) -> Tensor | None:  # noqa: N802
        """Sum over tokens of ``x x^T``, fp32 and exactly symmetric, or None where it is not accumulated.

        This is the accumulator itself, not a copy: do not write to it, and read it again after an update.
        """
        gram_II = self._gram_II
        if gram_II is not None and not self._is_mirrored:
            for start, stop in self._strips():
                square = gram_II[start:stop, start:stop]
                square.copy_(square.triu() + square.triu(1).T)
                gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
            self._is_mirrored = True
        return gram_II

    def mean_gram(self) -> Tensor:
        """The mean over tokens of ``x x^T``.

        Shapes: ``[I, I]``.

        Returns:
            A new fp32 tensor, exactly symmetric.

        Raises:
            SparsepassError: No tokens were seen, or the Gram matrix is not accumulated.

        >>> statistics = InputStatistics(num_tokens=2, gram_II=torch.tensor([[10.0, 2.0], [2.0, 4.0]]))
        >>> statistics.mean_gram()
        tensor([[5., 1.],
                [1., 2.]])
        """
        gram_II = self.gram_II
        if gram_II is None:
            raise SparsepassError("these input statistics hold norms only; gather them with gram=True")
        if self.num_tokens == 0:
            raise SparsepassError("these input statistics have seen no tokens, so they have no mean; run calibration first")
        return gram_II / self.num_tokens

    def norms(self) -> Tensor:
        """The 2-norm of each feature over all tokens, ``||X_j||_2``.

        Shapes: ``[I]``.

        Returns:
            A new fp32 tensor.

        >>> InputStatistics(num_tokens=1, sum_squares_I=torch.tensor([9.0, 0.0])).norms()
        tensor([3., 0.])
        """
        return self.sum_squares_I.sqrt()

    @torch.no_grad()
    def update(self, x_TI: Tensor) -> None:
        """Adds the tokens of one batch.

        Shapes: ``[T, I]`` or ``[..., T, I]``.

        Args:
            x_TI: Inputs of the site, any float dtype; anything but fp32 is converted in pieces.

        Raises:
            SparsepassError: The feature count or dtype is wrong, or a value is NaN or Inf. After NaN or Inf the sums
                are spoilt: discard them.

        Exactness: fp32 sums; the Gram matrix is within 1e-6 of its largest entry per 16384 tokens.

        >>> statistics = InputStatistics.zeros(1, gram=False)
        >>> statistics.update(torch.ones(4, 3, 1, dtype=torch.bfloat16))
        >>> statistics.num_tokens, statistics.sum_squares_I
        (12, tensor([12.]))
        """
        if not x_TI.is_floating_point():
            raise SparsepassError(f"input statistics take floating-point activations, got {x_TI.dtype}")
        if x_TI.dim() == 0 or x_TI.shape[-1] != self.in_features:
            raise SparsepassError(
                f"input statistics of {self.in_features} features got activations of shape {tuple(x_TI.shape)}, "
                f"whose last axis should be {self.in_features}"
            )
        x_TI = x_TI.detach().reshape(-1, self.in_features)
        num_tokens = x_TI.shape[0]
        if num_tokens == 0:
            return
        if not self.has_gram:
            piece = max(_NORMS_PIECE_MIN_TOKENS, _NORMS_PIECE_ELEMENTS // self.in_features)
        elif x_TI.dtype == torch.float32 and x_TI.device == self.device:
            piece = num_tokens
        else:
            piece = max(_GRAM_PIECE_MIN_TOKENS, _GRAM_PIECE_ELEMENTS // self.in_features)
        self._is_mirrored = False
        for start in range(0, num_tokens, piece):
            self._add(x_TI[start : start + piece].to(device=self.device, dtype=torch.float32))
        self._check_finite(x_TI)
        self.num_tokens += num_tokens

    @torch.no_grad()
    def extend(self, other: "InputStatistics") -> None:
        """Adds what other statistics of the same input have summed, such as another process's share of the data.

        Args:
            other: Statistics with the same features and of the same kind; left as they are.

        Raises:
            SparsepassError: Features or kind differ.

        >>> a, b = (InputStatistics(num_tokens=1, sum_squares_I=torch.tensor([value])) for value in (1.0, 4.0))
        >>> a.extend(b)
        >>> a.num_tokens, a.norms()
        (2, tensor([2.2361]))
        """
        if other.in_features != self.in_features or other.has_gram != self.has_gram:
            kinds = [f"{s.in_features} features with {'a Gram matrix' if s.has_gram else 'norms only'}" for s in (self, other)]
            raise SparsepassError(f"cannot merge input statistics of {kinds[0]} and of {kinds[1]}")
        # What lies below the diagonal is summed too, and is as good as the less fresh of the two.
        self._is_mirrored = self._is_mirrored and other._is_mirrored
        self._storage.add_(other._storage.to(self.device))
        self.num_tokens += other.num_tokens

    @property
    def _storage(self) -> Tensor:
        storage = self._sum_squares_I if self._gram_II is None else self._gram_II
        assert storage is not None
        return storage

    def _strips(self) -> list[tuple[int, int]]:
        # Even widths: MKL (2024.2) sums a last strip of a few columns token by token, and is off by 1e-5 after 30000.
        width = math.ceil(self.in_features / max(1, round(self.in_features / _STRIP)))
        starts = range(0, self.in_features, width)
        return [(start, min(start + width, self.in_features)) for start in starts]

    def _add(self, x_TI: Tensor) -> None:
        if self._gram_II is None:
            self._storage.add_(x_TI.square().sum(0))
            return
        for start, stop in self._strips():
            self._gram_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])

    def _check_finite(self, x_TI: Tensor) -> None:
        # Every NaN and Inf of a feature shows in its sum of squares, which is cheaper to look at than the activations.
        finite_I = self.sum_squares_I.isfinite()
        if bool(finite_I.all()):
            return
        bad_I = (~x_TI.isfinite()).any(0)
        if bool(bad_I.any()):
            num_bad = int((~x_TI.isfinite()).sum())
            raise SparsepassError(
                f"{num_bad} of {x_TI.numel()} calibration activations are NaN or Inf, in {_features(bad_I)}; "
                "run the model on this batch and look for the layer where they begin, or calibrate in a dtype with "
                "more range (bf16 or fp32)"
            )
        raise SparsepassError(
            f"the calibration activations are finite but their squares overflow fp32, in {_features(~finite_I)}; "
            "activations this large (above 1e18) point to a broken model or batch"
        )


def _features(bad_I: Tensor) -> str:
    indices = bad_I.nonzero().flatten().tolist()
    listed = ", ".join(str(index) for index in indices[:8])
    more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    return f"{'feature' if len(indices) == 1 else 'features'} {listed}{more}"


def dampings(first: float, *, retry: float) -> list[float]:
    """What to damp a matrix with, one after the other, until it is positive definite: ten times as much each time, up to 1.

    Args:
        first: A fraction of the mean of its diagonal.
        retry: The second is at least this.

    >>> dampings(0.0, retry=0.01)
    [0.0, 0.01, 0.1, 1.0]
    """
    found = [first]
    while found[-1] < 1:
        found.append(min(max(found[-1] * 10, retry), 1.0))
    return found


def relative_error(parts: Iterable[tuple[Tensor, Tensor]], statistics: Sequence[InputStatistics]) -> float:
    """Output error of a weight of which something is missing, relative to its output, over the calibration tokens.

    Without tokens it is the error of the weight itself.

    Shapes: both of a pair ``[O, I]``, fp32.

    Args:
        parts: What is missing of a weight, and the whole weight: one pair, or one for each expert.
        statistics: Of the inputs: one, or one for each expert; or none.

    >>> relative_error([(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))], ())
    0.6
    """
    error = total = 0.0
    for index, (missing_OI, weight_OI) in enumerate(parts):
        known = statistics[index] if statistics else None
        error += output_size(missing_OI, known)
        total += output_size(weight_OI, known)
    return (max(error, 0.0) / total) ** 0.5 if total > 0 else 0.0


def output_size(weight_OI: Tensor, known: InputStatistics | None) -> float:
    """Sum of squares of all outputs over the calibration tokens; of the weight itself without any."""
    if known is not None and known.gram_II is not None:
        return float(((weight_OI @ known.gram_II) * weight_OI).sum())
    return float((weight_OI if known is None else weight_OI * known.norms()).square().sum())
