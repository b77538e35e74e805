"""What holds for the length of a block: a line of progress, silent libraries, evaluation mode, a default dtype."""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from threading import RLock
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_TRACING = RLock()


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a function wait until no other thread is in it, or in another one marked so.

    torch.export keeps its state for the whole process, and so do the filters of warnings, the default dtype and the patches
    of transformers' exporters: two traces at once would meet each other's.

    Example:
        >>> one_at_a_time(len)([1, 2])
        2
    """

    @functools.wraps(function)
    def waiting(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _TRACING:
            return function(*args, **kwargs)

    return waiting


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sparsepass._terminal import Terminal

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[item]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Terminal(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, item="")
        yield lambda item: bar.update(task, advance=1, item=item)


def shows_progress(progress: bool | None) -> bool:
    """What was asked for; if nothing was, whether standard error is a terminal.

    Example:
        >>> shows_progress(True)
        True
    """
    return sys.stderr.isatty() if progress is None else progress


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
