"""Calls of a tokenizer, which is made of files that come with a model: what goes wrong in it is told as the fault of these."""

import contextlib
import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sparsepass.graph.support import SparsepassError, first_line

_PLAIN: Final = "a b"
_MIXED: Final = "A b, the 2nd fox [/b] <s>\x1b\n\tcafe\u0301 é 語 \u200b\U0001f98a"
"""A text with something of everything: damaged tables of characters show on one of their own only."""
_SCREEN: Final = threading.RLock()
_BESIDE_WORDS: Final = {"boxes": [0, 0, 1, 1], "xpaths": "/html/body"}
"""What tokenizers of pages (LayoutLM, MarkupLM) want for each word, and take no text without."""


def whole_text(text: str, where: str) -> str:
    """The text itself, unless it holds half of a character: JSON can, UTF-8 and tokenizers cannot.

    Args:
        text: Any.
        where: What it is, for the message.

    Raises:
        SparsepassError: If it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise SparsepassError(
            f"{where} holds half of a character ({half}, a lone surrogate), which is no text; mend it"
        ) from error
    return text


@contextmanager
def tokenizing(tokenizer: Any, *texts: str) -> Iterator[None]:
    """Tell what a tokenizer raises as an error of its files; a panic of its Rust code is no `Exception` of Python's.

    Args:
        tokenizer: The one that is called inside, for its name.
        texts: What it is given. Halves of characters in them are no fault of its files.

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
        for text in texts:
            whole_text(text, "the text")
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
    """Take texts apart and put them together again, so that a tokenizer's damage shows when it is loaded.

    A text of odd characters may be none of a sound tokenizer's, and is refused then; what it must not do is panic.

    Raises:
        SparsepassError: If it fails.
    """
    with tokenizing(tokenizer), panics_unseen():
        _take_apart(tokenizer, _PLAIN)
        try:
            tokenizer.decode(_take_apart(tokenizer, _MIXED))
        except Exception:  # noqa: BLE001  # of any kind: the package raises plain ones
            return


def _take_apart(tokenizer: Any, text: str) -> Any:
    words = text.split()
    known = inspect.signature(tokenizer.__call__).parameters
    beside: dict[str, Any] = {name: [each] * len(words) for name, each in _BESIDE_WORDS.items() if name in known}
    return tokenizer(words if beside else text, add_special_tokens=False, **beside)["input_ids"]


@contextmanager
def panics_unseen() -> Iterator[None]:
    """Keep what Rust itself writes about a panic off the screen: the error holds it too. All else is written at the end."""
    with contextlib.ExitStack() as stack:
        try:
            written = stack.enter_context(tempfile.TemporaryFile())
            stack.enter_context(_SCREEN)
            sys.stderr.flush()
            screen = os.dup(2)
        except OSError:  # no room, or no screen: then it is seen
            yield
            return
        try:
            os.dup2(written.fileno(), 2)
            yield
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            written.seek(0)
            if b"panicked at" not in (text := written.read()):
                sys.stderr.write(text.decode(errors="replace"))
