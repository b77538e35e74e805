"""News of long work: lines of the log, given to whoever waits."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STAGES = "sparsepass.export"
"""The logger below which stages say at level INFO which step begins. Training has a progress line of its own."""


@contextmanager
def listen(show: Callable[[str], None], name: str = STAGES, *, level: int = logging.INFO) -> Iterator[None]:
    """Give each line of news to a function, as long as the block runs.

    Args:
        show: Called with one line at the beginning of each step.
        name: The logger that is listened to, with those below it.
        level: The least level.

    Example:
        >>> with listen(print):
        ...     logging.getLogger("sparsepass.export.stages").info("loading %s", "a model")
        loading a model
    """
    logger, handler = logging.getLogger(name), _Show(show, level)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), level))
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


class _Show(logging.Handler):
    """Calls a function with each line. Final."""

    def __init__(self, show: Callable[[str], None], level: int) -> None:
        super().__init__(level)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show one line."""
        self._show(record.getMessage())
