"""One line for work whose items are counted: how many are done, how long it took, how long it will take."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def item_progress(shown: bool, title: str, total: int | None, *, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show a bar on standard error while a block runs.

    Args:
        shown: Whether anything is shown at all.
        title: What is being done.
        total: Number of items; None if unknown.
        done: Items done before.

    Yields:
        A function to call after each item, with a word on it.

    Example:
        >>> with item_progress(False, "count", 2) as advance:
        ...     advance("one")
    """
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[item]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, item="")
        yield lambda item: bar.update(task, advance=1, item=item)


def shows_progress(progress: bool | None) -> bool:
    """What was asked for; if nothing was, whether standard error is a terminal.

    Example:
        >>> shows_progress(True)
        True
    """
    return sys.stderr.isatty() if progress is None else progress
