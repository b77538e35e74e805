"""Pieces of Markdown pages: tables, and figures for people."""

from collections.abc import Iterable
from typing import Any


def markdown_table(headings: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    r"""A table of Markdown.

    Example:
        >>> print(markdown_table(("a", "b"), [(1, "x|y")]))
        | a | b |
        |---|---|
        | 1 | x\|y |
    """
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: Any) -> str:
    """A figure for people: four digits that count."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
