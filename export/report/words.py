"""Figures for people."""

from collections.abc import Iterable
from typing import Any


def number(value: Any) -> str:
    """A figure: four digits that count.

    Example:
        >>> [number(value) for value in (0.123456, 7, True, None)]
        ['0.1235', '7', 'yes', '']
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rate(value: float) -> str:
    """Tokens a second.

    Example:
        >>> [rate(value) for value in (1.234, 56.78, 1234.5)]
        ['1.23', '56.8', '1,234']
    """
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def size(num_bytes: float) -> str:
    """A number of bytes.

    Example:
        >>> size(538_000_000)
        '538.0 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def percent(share: float | None) -> str:
    """A share in percent; empty if it is not known."""
    return "" if share is None else f"{100 * share:.4g}%"


def times(value: float | None) -> str:
    """A factor; empty if it is not known."""
    return "" if value is None else f"{value:.2f}x"


def dimensions(shape: Iterable[int]) -> str:
    """A shape, such as 4096x1024."""
    return "x".join(map(str, shape))
