"""Calls of a tokenizer, which is made of files that come with a model: what goes wrong in it is told as the fault of these."""

import inspect
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sparsepass.graph.support import SparsepassError, first_line

_PROBE = "A b, the 2nd fox [/b] <s>\x1b\n\tcafe\u0301 é 語 \u200b\U0001f98a"
"""A text with something of everything: damaged tables of characters show on one of their own only."""
_BESIDE_WORDS: Final = {"boxes": [0, 0, 1, 1], "xpaths": "/html/body"}
"""What tokenizers of pages (LayoutLM, MarkupLM) want for each word, and take no text without."""


@contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Tell what a tokenizer raises as an error of its files; a panic of its Rust code is no `Exception` of Python's.

    Args:
        tokenizer: The one that is called inside, for its name.

    Raises:
        SparsepassError: If it fails.

    Example:
        >>> with tokenizing(None):
        ...     raise IndexError("index out of bounds")
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: the tokenizer fails: IndexError: index out of bounds. Its files (tokenizer.json ...
    """
    try:
        yield
    except BaseException as error:
        if not is_tokenizer_fault(error):
            raise
        place = getattr(tokenizer, "name_or_path", None)
        raise SparsepassError(
            f"the tokenizer{f' of {place}' if place else ''} fails: {type(error).__name__}: {first_line(error)}. Its files "
            "(tokenizer.json or the vocabulary beside it) are damaged, or of another version of tokenizers; copy them again"
        ) from error


def is_tokenizer_fault(error: BaseException) -> bool:
    """Whether an error comes of a tokenizer: its package raises plain Exceptions, and panics, which are none.

    Example:
        >>> is_tokenizer_fault(Exception("no variant")), is_tokenizer_fault(KeyboardInterrupt())
        (True, False)
    """
    if isinstance(error, SparsepassError | MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def try_tokenizer(tokenizer: Any) -> None:
    """Take a text apart and put it together again, so that a tokenizer's damage shows when it is loaded.

    Raises:
        SparsepassError: If it fails.
    """
    with tokenizing(tokenizer), panics_unseen():
        words = _PROBE.split()
        known = inspect.signature(tokenizer.__call__).parameters
        beside: dict[str, Any] = {name: [each] * len(words) for name, each in _BESIDE_WORDS.items() if name in known}
        ids = tokenizer(words if beside else _PROBE, add_special_tokens=False, **beside)["input_ids"]
        tokenizer.decode(ids)


@contextmanager
def panics_unseen() -> Iterator[None]:
    """Keep what Rust itself writes about a panic off the screen: the error holds it too."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as unseen:
        screen = os.dup(2)
        try:
            os.dup2(unseen.fileno(), 2)
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)
