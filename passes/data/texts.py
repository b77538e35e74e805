"""The text of UTF-8 files: between two places of a file, or piece by piece from its beginning."""

import io
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.data.python_docs import default_text

PYTHON_DOCS = "python-docs"
"""The name of the calibration part of Python's documentation topics, where a text file could be named."""

# Characters read at a time from a text file, and how many may pass without a place to cut.
_PIECE, _LONGEST_PIECE = 1 << 16, 1 << 20


def open_bytes(path: Path) -> mmap.mmap:
    """Map a file that is not empty into memory, to read it at any place."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def text_between(data: bytes | mmap.mmap, start: int, stop: int, what: str) -> str:
    """Return the text between two byte offsets, from the first word boundary (or character) after ``start``.

    Args:
        data: UTF-8.
        start: The first byte.
        stop: The byte after the last.
        what: For messages: "calibration text FILE".

    Raises:
        SparsepassError: If it is not UTF-8.

    Example:
        >>> text_between(b"one two three", 1, 10, "text")
        'two th'
    """
    piece = data[max(0, start) : stop]
    if start > 0:
        boundary = re.search(rb"\s", piece[:200])
        if boundary:
            piece = piece[boundary.end() :]
        else:
            piece = piece[next((i for i, byte in enumerate(piece[:4]) if byte & 0xC0 != 0x80), 0) :]
    elif piece.startswith(b"\xef\xbb\xbf"):
        piece = piece[3:]
    try:
        text = piece.decode()
    except UnicodeDecodeError as error:
        cut = stop < len(data) and error.start >= len(piece) - 3
        if not cut:
            raise _not_utf8(what, f"byte {start + error.start}: {error.reason}") from error
        text = piece[: error.start].decode()
    return text.replace("\r\n", "\n")


def text_pieces(files: Sequence[str], what: str = "training data") -> Iterator[dict[str, Any]]:
    """Read text files in pieces, so that a file of any size is tokenized in little memory.

    A piece ends behind a line break that stands between two characters which are no white space: the tokenizers of
    GPT-2, Llama and their kin never make a token across it, so that the ids are those of the whole text.

    Args:
        files: Paths, or "python-docs" for the calibration part of Python's documentation topics.
        what: For messages.

    Returns:
        Rows of ``text``, ``begins`` and ``ends``: whether the file, and so the document, begins and ends with it.

    Raises:
        SparsepassError: If a file is missing or not UTF-8.

    Example:
        >>> [len(row["text"]) > 60_000 for row in text_pieces(["python-docs"])][:2]
        [True, True]
    """
    for file in files:
        try:
            with _open(file) as text:
                yield from _pieces(text)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{what} {file}", error.reason) from error
        except OSError as error:
            raise SparsepassError(f"{what} {file} cannot be read: {error}") from error


def _not_utf8(what: str, reason: str) -> SparsepassError:
    return SparsepassError(f"{what} is not UTF-8 ({reason}); convert it, for example with `iconv -t UTF-8`")


def _open(file: str) -> IO[str]:
    if file == PYTHON_DOCS:
        return io.StringIO(default_text("calibration"))
    return Path(file).open(encoding="utf-8-sig")


def _pieces(text: IO[str]) -> Iterator[dict[str, Any]]:
    held, begins = "", True
    while new := text.read(_PIECE):
        held += new
        cut = _last_cut(held)
        if cut is None and len(held) >= _LONGEST_PIECE:
            cut = held.rfind("\n", 0, len(held) - 1) + 1 or len(held) - 1
        if cut:
            yield {"text": held[:cut], "begins": begins, "ends": False}
            held, begins = held[cut:], False
    yield {"text": held, "begins": begins, "ends": True}


def _last_cut(text: str) -> int | None:
    at = len(text) - 1
    while (at := text.rfind("\n", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    return None
