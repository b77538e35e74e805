"""Times of dense against sparse, and from how many tokens on sparse is faster."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """Median times of both engines at one size.

    Attributes:
        batch: Sequences at once.
        sequence: Tokens of each that are run at once.
        past: Tokens in the cache before them.
        dense_ms: Time of the engine without sparse tactics.
        sparse_ms: Time of the engine with them.
    """

    batch: int
    sequence: int
    past: int = 0
    dense_ms: float
    sparse_ms: float

    @property
    def gain(self) -> float:
        """How many times faster the sparse engine is."""
        return self.dense_ms / self.sparse_ms

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def break_even(points: Iterable[Point]) -> str:
    """Say from how many tokens at once (batch times sequence) the sparse engine is never slower.

    Example:
        >>> slow, fast = (Point(batch=8, sequence=n, dense_ms=3, sparse_ms=ms) for n, ms in ((1, 4), (64, 2)))
        >>> break_even([slow, fast])
        'sparse is faster from 512 tokens at once on (1.50x there), and slower below (0.75x at 8)'
    """
    sizes: dict[int, float] = {}
    for point in points:
        tokens = point.batch * point.sequence
        sizes[tokens] = min(point.gain, sizes.get(tokens, point.gain))
    ordered = sorted(sizes)
    if not ordered:
        return "nothing was measured"
    slower = [tokens for tokens in ordered if sizes[tokens] <= 1]
    if not slower:
        return f"sparse is faster everywhere in what was measured ({min(sizes.values()):.2f}x to {max(sizes.values()):.2f}x)"
    if slower[-1] == ordered[-1]:
        best = max(ordered, key=lambda tokens: sizes[tokens])
        return f"no break-even in what was measured: at best {sizes[best]:.2f}x, at {best} tokens at once"
    first = next(tokens for tokens in ordered if tokens > slower[-1])
    return (
        f"sparse is faster from {first} tokens at once on ({sizes[first]:.2f}x there), and slower below "
        f"({sizes[slower[-1]]:.2f}x at {slower[-1]})"
    )
