"""What a training run left, as the report's section ``retraining``: its settings and results, and its curves in few points."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

NUM_POINTS: Final = 200
"""Points of a curve in the report; `metrics.jsonl` in the run folder has every step."""

_MEANS: Final = ("loss", "kl", "ce", "grad_norm", "flip_rate", "tokens_per_second")
_LASTS: Final = ("step", "tokens", "lr", "decay", "flips_since_first", "decided", "kept_norm", "memory_bytes")


def retraining_run(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bring the record of a run and its measurements together, as an entry of ``retraining.runs``.

    Args:
        record: The last entry of `Program.retraining`.
        metrics: Lines of ``metrics.jsonl``; may be empty.
    """
    seconds = float(record["seconds"])
    taken = {name: value for name, value in record.items() if name != "flips_since_first_by_layer"}
    return {
        **taken,
        "method": record["settings"]["method"],
        "tokens_per_second": record["num_tokens"] / seconds if seconds > 0 else 0.0,
        "flips_by_layer": {name: _short(value) for name, value in record["flips_since_first_by_layer"].items()},
        "curve": curve([line for line in metrics if "loss" in line]),
    }


def curve(lines: Sequence[Mapping[str, Any]], num_points: int = NUM_POINTS) -> dict[str, list[float | None]]:
    """Make columns of at most so many points: means over equal pieces of the run, and what stood at the end of each.

    Args:
        lines: One mapping a logged step, in order.
        num_points: Points at most.

    Returns:
        Column -> values; a value is None where nothing finite was measured.

    Example:
        >>> curve([{"step": i, "loss": 10.0 - i, "lr": 0.1} for i in range(1, 5)], 2)
        {'step': [2, 4], 'lr': [0.1, 0.1], 'loss': [8.5, 6.5]}
    """
    if not lines:
        return {}
    count = min(num_points, len(lines))
    ends = [(index + 1) * len(lines) // count for index in range(count)]
    pieces = [lines[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    found: dict[str, list[float | None]] = {}
    for name in _LASTS:
        if name in lines[-1]:
            found[name] = [piece[-1].get(name) for piece in pieces]
    for name in _MEANS:
        if name in lines[-1]:
            found[name] = [_mean([line.get(name) for line in piece]) for piece in pieces]
    return found


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return _short(sum(known) / len(known)) if known else None


def _short(value: float) -> float:
    """Five digits: what a picture can show."""
    return float(f"{value:.5g}")
