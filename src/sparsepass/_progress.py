"""How progress is shown: what the command line knows and the functions that work do not. Nothing heavy is imported here."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal

LOG: Final = "sparsepass.progress"
"""The logger that says how far long work is, where that is shown as lines."""

Shown = Literal["bar", "lines", "nothing"]
_SHOWN: ContextVar[Shown | None] = ContextVar("how progress is shown", default=None)


def shown() -> Shown | None:
    """How progress is shown; None where nobody has said."""
    return _SHOWN.get()


@contextmanager
def showing(how: Shown) -> Iterator[None]:
    """Show progress as bars, as lines of the log, or not at all, as long as the block runs, whatever functions are asked for.

    Example:
        >>> with showing("nothing"):
        ...     shown()
        'nothing'
    """
    before = _SHOWN.set(how)
    try:
        yield
    finally:
        _SHOWN.reset(before)
