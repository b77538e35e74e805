"""Loss of a student's logits against a teacher and the true tokens, with the gradient written out.

Pure tensor functions over the rows of one chunk. Logits stay in the dtype they come in; only a piece of rows at a time is
upcast, small enough that on a processor it stays in the cache, and on a GPU the memory is bounded.

Tensor shape legend: N rows (tokens), V vocabulary, K the teacher's kept entries.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

# Elements of the piece that is upcast at a time.
_CPU_PIECE, _GPU_PIECE = 1 << 19, 1 << 24


class RowLosses(NamedTuple):
    """What `row_losses` finds.

    Attributes:
        kl: 0-dim, sum over rows of KL(teacher || student) at the temperature, without the factor T^2; 0 without a teacher.
        ce: 0-dim, sum over rows of the cross-entropy at temperature 1.
        gradient: [N, V], of the mixed loss, summed over rows, to the student's logits, in their dtype; or None.
    """

    kl: Tensor
    ce: Tensor
    gradient: Tensor | None


class Distribution(ABC):
    """What a teacher says about the next token at each of N places."""

    @abstractmethod
    def check(self, num_rows: int, vocab_size: int, temperature: float) -> None:
        """Check that this can stand against logits of a shape at a temperature.

        Raises:
            SparsepassError: It cannot.
        """

    @abstractmethod
    def kl(self, log_q_NV: Tensor, rows: slice, temperature: float, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Divergence of the student from this teacher at some rows. Overwrites its argument.

        Args:
            log_q_NV: The student's log-probabilities at the temperature, at these rows.
            rows: Which of the teacher's rows these are.
            temperature: What the student's logits were divided by.
            gradient: Whether the gradient is wanted.

        Returns:
            KL of each row, [N]; and its gradient to the student's logits over the temperature, [N, V].
        """


@final
class FullDistribution(Distribution):
    """A teacher's logits over the whole vocabulary; they must be finite.

    Args:
        logits_NV: The logits, in any floating dtype.

    Exactness: KL and its gradient are those of the formula, in the dtype of the student's log-probabilities.
    """

    def __init__(self, logits_NV: Tensor) -> None:
        self._logits_NV = logits_NV

    def check(self, num_rows: int, vocab_size: int, temperature: float) -> None:
        """Raise unless the shapes are equal; any temperature will do."""
        if self._logits_NV.shape != (num_rows, vocab_size):
            raise SparsepassError(
                f"the teacher's logits are {tuple(self._logits_NV.shape)}, the student's {(num_rows, vocab_size)}: "
                "distillation on logits needs one vocabulary; choose a teacher with the student's tokenizer, or kd_weight=0"
            )

    def kl(self, log_q_NV: Tensor, rows: slice, temperature: float, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """See `Distribution.kl`: sum over v of p (log p - log q), and q - p."""
        log_p_NV = log_probabilities(self._logits_NV[rows], temperature, log_q_NV.dtype)
        p_NV = log_p_NV.exp()
        kl_N = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV))
        return kl_N, log_q_NV.exp_().sub_(p_NV) if gradient else None


@final
class TopKDistribution(Distribution):
    """A teacher's K most probable tokens, and all others as one lumped event.

    The divergence over these K + 1 events is a lower bound of the full one (data processing inequality), equal to it if K = V.

    Args:
        index_NK: The tokens, distinct in each row.
        log_p_NK: Their log-probabilities at ``temperature``.
        log_tail_N: Log-probability of all others together, -inf if there are none.
        vocab_size: V.
        temperature: What these probabilities were taken at.
    """

    def __init__(self, index_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor, *, vocab_size: int, temperature: float) -> None:
        self._index_NK, self._log_p_NK, self._log_tail_N = index_NK.long(), log_p_NK, log_tail_N
        self._vocab_size, self._temperature = vocab_size, temperature

    def check(self, num_rows: int, vocab_size: int, temperature: float) -> None:
        """Raise unless rows, vocabulary and temperature are those of the student."""
        if vocab_size != self._vocab_size or num_rows != len(self._index_NK):
            raise SparsepassError(
                f"the teacher's top-k entries are for {len(self._index_NK)} rows of {self._vocab_size} tokens, the student's "
                f"logits are {(num_rows, vocab_size)}: distillation on logits needs one vocabulary"
            )
        if temperature != self._temperature:
            raise SparsepassError(
                f"the teacher's top-k entries were taken at temperature {self._temperature}, the loss asks for {temperature}; "
                "use one of the two for both"
            )

    def kl(self, log_q_NV: Tensor, rows: slice, temperature: float, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """See `Distribution.kl`.

        The gradient is ``q - p`` at the kept entries and ``q (1 - p_tail / q_tail)`` at the others.
        """
        dtype = log_q_NV.dtype
        index_NK = self._index_NK[rows]
        log_p_NK, log_tail_N = self._log_p_NK[rows].to(dtype), self._log_tail_N[rows].to(dtype)
        log_q_NK = log_q_NV.gather(-1, index_NK)
        q_NV = log_q_NV.exp_().scatter_(-1, index_NK, 0)
        # A sum of what is left, not 1 minus the rest: exact where the tail is small. The floor only keeps 0 / 0 away.
        q_tail_N = q_NV.sum(-1).clamp_min_(torch.finfo(dtype).tiny)
        p_NK, p_tail_N = log_p_NK.exp(), log_tail_N.exp()
        kl_N = torch.linalg.vecdot(p_NK, log_p_NK - log_q_NK)
        kl_N = kl_N + torch.where(p_tail_N > 0, p_tail_N * (log_tail_N - q_tail_N.log()), 0.0)
        if not gradient:
            return kl_N, None
        gradient_NV = q_NV.mul_((1 - p_tail_N / q_tail_N).unsqueeze(-1))
        return kl_N, gradient_NV.scatter_(-1, index_NK, log_q_NK.exp_().sub_(p_NK))


class TeacherTargets(ABC):
    """What a teacher says about the positions of one batch, asked for a chunk at a time."""

    @abstractmethod
    def rows(self, rows_N: Tensor) -> Distribution:
        """The teacher's distributions at some positions.

        Args:
            rows_N: Positions of the flattened batch, ``b * T + t``.
        """


def row_losses(
    logits_NV: Tensor,
    targets_N: Tensor,
    teacher: Distribution | None,
    *,
    kd_weight: float,
    temperature: float,
    gradient: bool,
) -> RowLosses:
    """Sums over rows of KL and cross-entropy, and the gradient of ``a T^2 KL + (1 - a) CE``.

    Shapes: logits_NV [N, V]; targets_N [N], all in 0 .. V-1.

    Args:
        logits_NV: The student's logits; kept as they are.
        targets_N: The true next tokens.
        teacher: What the teacher says at these rows; None for cross-entropy alone.
        kd_weight: ``a``; 0 without a teacher.
        temperature: ``T`` of the divergence.
        gradient: Whether the gradient is wanted.

    Returns:
        The sums and the gradient ``a T (q_T - p_T) + (1 - a) (q - onehot)``; with equal logits KL is 0 to rounding.

    Source: arXiv 2407.20584, section 3.2; the factor T^2, arXiv 1503.02531, section 2.1.

    Exactness: computed in fp32 (fp64 for fp64 logits), then rounded to the dtype of the logits.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> found = row_losses(logits, torch.tensor([1]), None, kd_weight=0.0, temperature=1.0, gradient=True)
        >>> round(found.ce.item(), 4), found.gradient.tolist()
        (0.6931, [[0.5, -0.5]])
    """
    num_rows, width = logits_NV.shape
    if teacher is not None:
        teacher.check(num_rows, width, temperature)
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    kl, ce = logits_NV.new_zeros((), dtype=dtype), logits_NV.new_zeros((), dtype=dtype)
    gradient_NV = torch.empty_like(logits_NV) if gradient else None
    step = max((_GPU_PIECE if logits_NV.is_cuda else _CPU_PIECE) // width, 1)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        target_N1 = targets_N[rows].unsqueeze(-1)
        log_q_NV = log_probabilities(logits_NV[rows], 1.0, dtype)
        ce -= log_q_NV.gather(-1, target_N1).sum()
        soft_NV = None
        if teacher is not None:
            # What the teacher gets is overwritten, and the cross-entropy's gradient needs it again.
            if temperature != 1:
                log_qT_NV = log_probabilities(logits_NV[rows], temperature, dtype)
            else:
                log_qT_NV = log_q_NV.clone() if gradient and kd_weight < 1 else log_q_NV
            kl_N, soft_NV = teacher.kl(log_qT_NV, rows, temperature, gradient=gradient and kd_weight > 0)
            kl += kl_N.sum()
        if gradient_NV is None:
            continue
        if kd_weight == 1 and soft_NV is not None:
            gradient_NV[rows] = soft_NV.mul_(temperature)
            continue
        hard_NV = log_q_NV.exp_()
        hard_NV.scatter_add_(-1, target_N1, hard_NV.new_full((), -1.0).expand_as(target_N1))
        if soft_NV is not None:
            hard_NV.mul_(1 - kd_weight).add_(soft_NV, alpha=kd_weight * temperature)
        gradient_NV[rows] = hard_NV
    return RowLosses(kl, ce, gradient_NV)


def log_probabilities(logits_NV: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Log-softmax of logits over a temperature, as a new tensor of a wider dtype.

    Example:
        >>> log_probabilities(torch.zeros(1, 2), 2.0, torch.float64).exp().tolist()
        [[0.5, 0.5]]
    """
    scaled_NV = logits_NV.to(dtype)
    return torch.log_softmax(scaled_NV if temperature == 1 else scaled_NV / temperature, dim=-1)
