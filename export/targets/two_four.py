"""What sparse tensor cores take: 2:4, on GPUs from Ampere on."""

from collections.abc import Mapping
from typing import Final

LOWEST_SM: Final = 80
"""Compute capability of Ampere, the first generation with sparse tensor cores."""


def check_two_four(patterns: Mapping[str, str], runtime: str, otherwise: str) -> None:
    """Refuse patterns that sparse tensor cores do not know.

    Args:
        patterns: Weight -> its pattern.
        runtime: Whose kernels are meant, for the message.
        otherwise: What to do instead of pruning again, for the message.

    Raises:
        SparsepassError: If a weight has another pattern than 2:4.

    Example:
        >>> check_two_four({"fc.weight": "2:4"}, "torch", "use the target hf")
    """
    other = {name: pattern for name, pattern in patterns.items() if pattern != "2:4"}
    if other:
        from sparsepass.graph.support import SparsepassError

        name, pattern = next(iter(other.items()))
        raise SparsepassError(
            f"{name} is {pattern}{f', and {len(other) - 1} more are not 2:4' if len(other) > 1 else ''}: {runtime} has sparse "
            f"kernels for 2:4 only; prune with nm_sparsify{{pattern=2:4}}, or {otherwise}"
        )
