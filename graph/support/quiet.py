"""Silencing the libraries below for the length of a block, and leaving them as they were."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


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
