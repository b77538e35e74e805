"""Sparse kernels: what they take, whether a runtime used them (four states for each layer), and where they are faster."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, final

if TYPE_CHECKING:
    from sparsepass.graph import Program

Known = Literal["yes", "no", "unknown"]

LOWEST_SM: Final = 80
"""Compute capability of Ampere, the first generation with sparse tensor cores."""


@final
@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """What is known of one weight in one engine.

    Attributes:
        engine: Name of the engine.
        layer: Node of the graph that multiplies the weight.
        op: Its operation.
        weight: Name of the stored weight.
        shape: Its shape as stored.
        dtype: Its type.
        axis: Axis that the product sums over.
        conforms: Whether the stored weight is 2:4 along that axis; unknown for one that is dense on purpose.
        flag_requested: Whether the builder was allowed to use sparse tactics.
        eligible: Whether the builder found the layer fit for them.
        chosen: Whether it took one.
        ran_sparse: What follows from these.
        reason: Why, in words.
        tactic: Name of the kernel, where the engine inspector tells.
        dense_ms: Fastest dense tactic that the builder timed.
        sparse_ms: Fastest sparse one.
    """

    engine: str
    layer: str
    op: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    conforms: Known
    flag_requested: Known
    eligible: Known
    chosen: Known
    ran_sparse: Known
    reason: str
    tactic: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"shape": list(self.shape)}


def counts(layers: Iterable[LayerEvidence]) -> dict[str, Any]:
    """Count each state, over all layers that are meant to be sparse, and what ran sparse, engine by engine."""
    meant = [layer for layer in layers if layer.conforms != "unknown"]
    states = ("conforms", "flag_requested", "eligible", "chosen", "ran_sparse")
    values: tuple[Known, ...] = ("yes", "no", "unknown")

    def count(part: list[LayerEvidence]) -> dict[str, dict[str, int]]:
        return {state: {value: sum(getattr(layer, state) == value for layer in part) for value in values} for state in states}

    engines = list(dict.fromkeys(layer.engine for layer in meant))
    return {"total": count(meant), "engines": {name: count([x for x in meant if x.engine == name]) for name in engines}}


def pattern_summary(file: str, found: Mapping[str, Any]) -> str:
    """What verification says of the pattern of a file's weights, in one line."""
    if not found["conforms"]:
        return str(found["summary"])
    return f"{file}: the {found['num_sparse']} weights that have to be sparse are, along the axis that is summed over"


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


def check_two_four(program: "Program", runtime: str, otherwise: str) -> None:
    """Refuse patterns that sparse tensor cores do not know.

    Args:
        program: What is lowered.
        runtime: Whose kernels are meant, for the message.
        otherwise: What to do instead of pruning again, for the message.

    Raises:
        SparsepassError: If a weight has another pattern than 2:4.
    """
    other = {name: state.pattern for name, state in program.sparse.items() if state.pattern != "2:4"}
    if other:
        from sparsepass.graph.support import SparsepassError

        name, pattern = next(iter(other.items()))
        raise SparsepassError(
            f"{name} is {pattern}{f', and {len(other) - 1} more are not 2:4' if len(other) > 1 else ''}: {runtime} has sparse "
            f"kernels for 2:4 only; prune with nm_sparsify{{pattern=2:4}}, or {otherwise}"
        )
