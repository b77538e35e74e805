"""What a command says, and where: results on standard output, everything else on standard error."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, Final, Literal, TextIO

from sparsepass import _progress

Talk = Literal["quiet", "normal", "verbose"]
JSON_KEYS: Final = ("command", "sparsepass", "exit_code")
"""What the JSON of every command begins with; what else it holds is the command's own."""

NAME_WIDTH: Final = 40
"""Columns that a layer's name may take of a table of 80 before it goes on in the next line."""

_RESULTS: ContextVar[TextIO | None] = ContextVar("where results go", default=None)


def results() -> TextIO:
    """Where results go: standard output as the command found it."""
    return _RESULTS.get() or sys.stdout


def stdout() -> Any:
    """Console for results."""
    from sparsepass._terminal import Terminal

    file = results()
    return Terminal(file=file, soft_wrap=not file.isatty())


def show(found: Any) -> None:
    """Print text and tables. A table takes the width of the terminal, or 80 columns; text is not wrapped but at a terminal."""
    from rich.console import Group
    from rich.table import Table

    from sparsepass._terminal import Terminal

    for each in found.renderables if isinstance(found, Group) else [found]:
        if isinstance(each, Group):
            show(each)
        elif isinstance(each, Table):
            for column in each.columns:
                column.overflow = "fold"  # a figure or name that is cut off would be another one
            Terminal(file=results()).print(each)
        else:
            stdout().print(each, highlight=False)


def print_text(text: str, *, end: str = "\n") -> None:
    """Print a result as it is, but for what a terminal would obey."""
    from sparsepass._terminal import for_terminal

    results().write(for_terminal(text) + end)


def print_json(command: str, document: Mapping[str, Any], *, exit_code: int = 0) -> None:
    """Print the result of a command as one JSON object.

    Args:
        command: The command's name.
        document: Its own keys, which are none of `JSON_KEYS`.
        exit_code: The code that it ends with.
    """
    from importlib.metadata import version

    from sparsepass.export.report import plain_json

    head = dict(zip(JSON_KEYS, (command, version("sparsepass"), exit_code), strict=True))
    assert not head.keys() & document.keys(), command
    print_text(json.dumps(plain_json(head | dict(document)), indent=1, default=str))


def say(text: str, *, lead: str = "", style: str = "") -> None:
    """Print a line of news on standard error.

    Args:
        text: The line.
        lead: What stands before it, in yellow.
        style: How the line looks, as rich calls it.
    """
    from rich.text import Text

    from sparsepass._terminal import Terminal

    Terminal(stderr=True).print(Text.assemble((lead, "yellow"), (text, style)), highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print an error in red on standard error."""
    from rich.text import Text

    from sparsepass._terminal import Terminal

    Terminal(stderr=True).print(Text.assemble(("Error:", "bold red"), " ", (text, "red")), highlight=False, soft_wrap=True)


@contextmanager
def talking(how: Talk) -> Iterator[None]:
    """Send results to standard output and all else to standard error, as long as the block runs.

    1. At a terminal, a line says which step begins, and bars show progress.
    2. Elsewhere, both are lines of a log, with the time.
    3. ``quiet`` shows neither, ``verbose`` also what is logged at level DEBUG.

    Args:
        how: How much is said.
    """
    from sparsepass.export.stages import listen

    is_terminal = sys.stderr.isatty()
    progress: _progress.Shown = "nothing" if how == "quiet" else "bar" if is_terminal else "lines"

    def show(text: str) -> None:
        from sparsepass.retrain.run import is_first_process

        if is_first_process():
            say(text if is_terminal else f"{time.strftime('%H:%M:%S')} {text}", style="dim" if is_terminal else "")

    with ExitStack() as stack:
        token = _RESULTS.set(sys.stdout)
        stack.callback(_RESULTS.reset, token)
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(_progress.showing(progress))
        if how == "verbose":
            stack.enter_context(listen(show, "sparsepass", level=logging.DEBUG))
        elif how == "normal":
            stack.enter_context(listen(show))
            stack.enter_context(listen(show, _progress.LOG))
        yield
