"""What holds for the length of a block: a line of progress, silent libraries, evaluation mode, a default dtype."""

import contextlib
import functools
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from threading import RLock
from typing import Final, ParamSpec, TypeVar

import torch

from sparsepass import _progress

_LINE_SECONDS: Final = 10.0
T = TypeVar("T")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_TRACING = RLock()


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function wait until no other thread is in it, or in another one marked so, and run in torch's ordinary mode.

    torch.export keeps its state for the whole process, and so do the filters of warnings, the default dtype and the patches
    of transformers' exporters: two traces at once would meet each other's. What is learned needs gradients, and what is made
    has to be trained later, whether the caller is in `torch.no_grad` or `torch.inference_mode` or not.

    Example:
        >>> one_at_a_time(len)([1, 2])
        2
    """

    @functools.wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _TRACING, torch.inference_mode(False):
            return function(*args, **kwargs)

    return waiting


@contextlib.contextmanager
def item_progress(shown: bool, title: str, total: int | None, *, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show a bar on standard error while a block runs, or lines of the log now and then, where the command line asks for them.

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
    how = _progress.shown()
    if not shown or how == "nothing":
        yield lambda _: None
        return
    if how == "lines":
        yield _Lines(title, total, done).advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sparsepass._terminal import Terminal

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[item]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Terminal(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, item="")
        yield lambda item: bar.update(task, advance=1, item=item)


@contextlib.contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show progress, where it is shown, of work that tells how much is done and how much there is in all.

    Args:
        title: What is being done.

    Yields:
        What the work calls with the two numbers; None where nothing is shown.

    Example:
        >>> with count_progress("count") as progress:
        ...     progress is None
        True
    """
    if not shows_progress(None):
        yield None
        return
    with contextlib.ExitStack() as stack:
        opened: list[Callable[[str], None]] = []
        seen = 0

        def progress(done: int, total: int) -> None:
            nonlocal seen
            if not opened:
                opened.append(stack.enter_context(item_progress(True, title, total)))
            for _ in range(done - seen):
                opened[0]("")
            seen = done

        yield progress


def counted(items: Sequence[T], title: str) -> Iterator[T]:
    """Go through items, and show progress where it is shown.

    Args:
        items: The items.
        title: What is being done with them.

    Example:
        >>> list(counted("ab", "spell"))
        ['a', 'b']
    """
    with item_progress(shows_progress(None), title, len(items)) as advance:
        for item in items:
            yield item
            advance("")


def shows_progress(progress: bool | None) -> bool:
    """What was asked for; if nothing was, whether standard error is a terminal, or the command line says so.

    Example:
        >>> shows_progress(True)
        True
    """
    how = _progress.shown()
    if how == "nothing":
        return False
    return (how is not None or sys.stderr.isatty()) if progress is None else progress


class _Lines:
    """Says in the log, now and then, how far something is. Final."""

    def __init__(self, title: str, total: int | None, done: int) -> None:
        self._title, self._total, self._done, self._new = title, total, done, 0
        self._began = self._said = time.monotonic()

    def advance(self, item: str) -> None:
        """One more item is done."""
        self._new += 1
        now = time.monotonic()
        if now - self._said < _LINE_SECONDS:
            return
        self._said = now
        count = self._done + self._new
        left = "" if self._total is None else f"/{self._total}"
        if self._total is not None:
            seconds = (now - self._began) / self._new * (self._total - count)
            left += f", about {timedelta(seconds=round(seconds))} left"
        logging.getLogger(_progress.LOG).info("%s: %d%s%s", self._title, count, left, f" ({item})" if item else "")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the bars and reports of transformers: what they tell is checked by the caller, and raised or noted."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_export(*loggers: str) -> Iterator[None]:
    """Silence the warnings of an export, and what the loggers named say below an error.

    transformers warns about each torch version that its exporter was not tried with, torch.onnx about operators that
    torchvision would bring.

    Args:
        loggers: Names of loggers, such as ``transformers``.

    Example:
        >>> with quiet_export("transformers"):
        ...     logging.getLogger("transformers").isEnabledFor(logging.WARNING)
        False
    """
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards each of its modules back into its own mode."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in a dtype unless they are given one."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)
