"""Which kernel a layer gets, from measured times: a 2:4 kernel only at sizes where it was faster, so that no layer slows down.

Tokens at once are batch times sequence: the time of a linear layer depends on nothing else of its input. Nothing heavy is
imported here, because the options of the target need this file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from sparsepass.export.targets.contract import option_error
from sparsepass.export.targets.evidence import Point, break_even

MIN_GAIN: Final = 1.02
"""Least gain that counts as faster: the scatter of repeated measurements is below it."""

Shapes = tuple[tuple[int, int], ...]
"""Batch and sequence of each size."""


@final
@dataclass(frozen=True, kw_only=True)
class ChoiceRules:
    """How layers are chosen.

    Attributes:
        shapes: Batch and sequence to measure at; empty for sizes from one token up to the model's limit.
        sparse_only: Whether a layer is lowered only where its 2:4 kernel is faster at every size.
        compiled: Whether layers are measured compiled.

    Raises:
        SparsepassError: If a size is without a token.
    """

    shapes: Shapes = ()
    sparse_only: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if any(batch < 1 or sequence < 1 for batch, sequence in self.shapes):
            raise option_error(f"shapes are pairs of batch and sequence, each at least 1; got {self.shapes}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"shapes": [list(shape) for shape in self.shapes]}


@final
@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one layer at one size.

    Attributes:
        batch: Sequences at once.
        sequence: Tokens of each.
        dense_ms: Time of the dense kernel.
        sparse_ms: Backend -> time of its 2:4 kernel.
    """

    batch: int
    sequence: int
    dense_ms: float
    sparse_ms: Mapping[str, float]

    @property
    def tokens(self) -> int:
        """Tokens at once."""
        return self.batch * self.sequence

    def point(self, backend: str) -> Point:
        """The times of one backend, as they are reported."""
        return Point(batch=self.batch, sequence=self.sequence, dense_ms=self.dense_ms, sparse_ms=self.sparse_ms[backend])

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@final
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was decided for a layer.

    Attributes:
        backend: Whose 2:4 kernel it gets; None if it stays dense.
        min_tokens: Tokens at once from which that kernel runs; 0 if it always does.
        reason: Why, with the figures.
    """

    backend: str | None
    min_tokens: int
    reason: str


def parse_shapes(text: str) -> Shapes:
    """Read sizes, batch times sequence: ``1x512,8x4096``.

    Raises:
        SparsepassError: If it cannot be read.

    Example:
        >>> parse_shapes("1x512, 8x4096")
        ((1, 512), (8, 4096))
    """
    found = []
    for item in text.split(","):
        batch, _, sequence = item.strip().lower().partition("x")
        if not (batch.isdecimal() and sequence.isdecimal()):
            raise option_error(
                f"--measure-shapes {item.strip()!r} cannot be read; expected BATCHxSEQUENCE, such as 1x512 or 8x4096, "
                "separated by commas"
            )
        found.append((int(batch), int(sequence)))
    return tuple(dict.fromkeys(found))


def decide(timings: Iterable[Timing], *, sparse_only: bool = False) -> Verdict:
    """Choose between the dense kernel and the 2:4 kernels of each backend.

    1. A backend is used from the smallest measured number of tokens on, from which all measured gains reach `MIN_GAIN`.
    2. If that is the smallest number that was measured, it is used always, and no dense weight is kept.
    3. With `sparse_only`, that is the only case in which it is used.
    4. Of several backends, the one with the largest gain over all sizes is taken (geometric mean, 1 where dense runs).

    Args:
        timings: Times of one layer.
        sparse_only: Whether no dense weight may be kept beside the packed one.

    Example:
        >>> slow, fast = (Timing(batch=1, sequence=n, dense_ms=2, sparse_ms={"cutlass": ms}) for n, ms in ((1, 4), (512, 1)))
        >>> decide([slow, fast]).min_tokens, decide([fast]).min_tokens, decide([slow]).backend
        (512, 0, None)
    """
    measured = tuple(timings)
    gains = {backend: _gains(measured, backend) for backend in sorted({b for t in measured for b in t.sparse_ms})}
    if not gains:
        return Verdict(backend=None, min_tokens=0, reason="no time of a 2:4 kernel was measured")
    starts = {backend: _start(found) for backend, found in gains.items()}
    usable = {b: start for b, start in starts.items() if start is not None and not (sparse_only and start > min(gains[b]))}
    if usable:
        backend = max(usable, key=lambda b: _mean_log_gain(gains[b], usable[b]))
        always = usable[backend] == min(gains[backend])
        reason = f"{backend}: {_said(measured, backend)}"
        return Verdict(backend=backend, min_tokens=0 if always else usable[backend], reason=reason)
    backend = max(gains, key=lambda b: max(gains[b].values()))
    said = _said(measured, backend)
    if starts[backend] is not None:
        said += "; a dense weight would have to be kept for smaller sizes, and --sparse-only forbids that"
    elif max(gains[backend].values()) > 1:
        said += f"; it has to be {MIN_GAIN:g}x at least, also at all larger sizes"
    return Verdict(backend=None, min_tokens=0, reason=f"dense kernel faster: {backend}: {said}")


def _gains(timings: tuple[Timing, ...], backend: str) -> dict[int, float]:
    """Tokens at once -> gain, the smallest one where a number of tokens was measured more than once."""
    found: dict[int, float] = {}
    for timing in timings:
        if backend in timing.sparse_ms:
            gain = timing.dense_ms / timing.sparse_ms[backend]
            found[timing.tokens] = min(gain, found.get(timing.tokens, gain))
    return dict(sorted(found.items()))


def _start(gains: Mapping[int, float]) -> int | None:
    start = None
    for tokens in sorted(gains, reverse=True):
        if gains[tokens] < MIN_GAIN:
            break
        start = tokens
    return start


def _mean_log_gain(gains: Mapping[int, float], start: int) -> float:
    return sum(math.log(gain) for tokens, gain in gains.items() if tokens >= start) / len(gains)


def _said(timings: Iterable[Timing], backend: str) -> str:
    return break_even(timing.point(backend) for timing in timings if backend in timing.sparse_ms)
