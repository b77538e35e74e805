"""Text: Python's own documentation, UTF-8 files, and sequences of tokens made of them.

Sequences are joined from many texts, or taken from places spread evenly over a long one.
"""

import io
import math
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, final

import torch

from sparsepass.graph.support import SparsepassError
from sparsepass.graph.texts import last_cut, tokenizing
from sparsepass.passes.data.sources import special_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        cut = last_cut(held)
        if cut is None and len(held) >= _LONGEST_PIECE:
            cut = held.rfind("\n", 0, len(held) - 1) + 1 or len(held) - 1
        if cut:
            yield {"text": held[:cut], "begins": begins, "ends": False}
            held, begins = held[cut:], False
    yield {"text": held, "begins": begins, "ends": True}


def default_text(part: Literal["calibration", "evaluation"]) -> str:
    """Return text that is always there: Python's own documentation topics, in two disjoint parts.

    Of the topics in alphabetical order every third belongs to the evaluation part. Topics quote each other, so a
    paragraph that occurs in both parts is left out of the calibration part, and repeated paragraphs are kept once. The
    text follows the version of Python: compare figures only within one.

    Args:
        part: "calibration" or "evaluation".

    Returns:
        Plain text, some 200,000 characters for calibration and 170,000 for evaluation.

    Raises:
        SparsepassError: If ``part`` is neither, or this Python was built without its documentation topics.

    Example:
        >>> len(default_text("calibration")) > 100_000
        True
    """
    if part not in ("calibration", "evaluation"):
        raise SparsepassError(f"part has to be 'calibration' or 'evaluation', and {part!r} was given")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SparsepassError(
            "this Python comes without pydoc_data, its documentation topics; pass a text file of your own as "
            "calibration and evaluation text"
        ) from error
    names = sorted(topics)
    evaluation = {name for index, name in enumerate(names) if index % 3 == 2}
    seen = {_squeeze(text) for name in evaluation for text in _paragraphs(topics[name])} if part == "calibration" else set()
    kept: list[str] = []
    for name in names:
        if (name in evaluation) == (part == "evaluation"):
            for paragraph in _paragraphs(topics[name]):
                key = _squeeze(paragraph)
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
    return "\n\n".join(kept) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def _squeeze(text: str) -> str:
    return " ".join(text.split())


@final
@dataclass(frozen=True)
class Packer:
    """Makes full sequences of text, each framed by the special tokens that the tokenizer itself puts around a text.

    Args:
        tokenizer: Turns text into ids.
        context: Tokens of a sequence.
        num_sequences: At most so many are used; None takes all there are.
        seed: Chooses where in a text the sequences lie.
    """

    tokenizer: "PreTrainedTokenizerBase"
    context: int
    num_sequences: int | None
    seed: int

    def join(self, texts: Iterator[str]) -> Iterator[list[int]]:
        """Join texts (a blank line between) into full sequences, tokenizing one text at a time.

        Raises:
            SparsepassError: If there is not enough for one sequence.
        """
        waiting: list[int] = []
        num_body, num_made = self._num_body, 0
        for text in texts:
            waiting.extend(self._tokens(text + "\n\n"))
            start = 0
            while len(waiting) - start >= num_body:
                yield self._framed(waiting[start : start + num_body])
                start += num_body
                num_made += 1
            del waiting[:start]
        if num_made == 0:
            raise self._too_short(len(waiting))

    def spread(self, data: bytes | mmap.mmap, what: str) -> Iterator[list[int]]:
        """Take sequences spread evenly over a text; of a long one only the parts that are used are tokenized.

        Args:
            data: UTF-8.
            what: For messages.

        Raises:
            SparsepassError: If the text is not UTF-8 or not enough for one sequence.
        """
        sequences = self._spots(data, what)
        if sequences is None:
            ids = self._tokens(text_between(data, 0, len(data), what))
            num_full = len(ids) // self._num_body
            if num_full == 0:
                raise self._too_short(len(ids))
            num_taken = min(num_full, self.num_sequences or num_full)
            starts = [index * num_full // num_taken * self._num_body for index in range(num_taken)]
            sequences = (ids[start : start + self._num_body] for start in starts)
        for sequence in sequences:
            yield self._framed(sequence)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        before, after = special_frame(self.tokenizer)
        if len(before) + len(after) >= self.context:
            raise SparsepassError(
                f"context of {self.context} tokens leaves no room beside the tokenizer's {len(before) + len(after)} "
                "special tokens; choose a larger context"
            )
        return before, after

    @property
    def _num_body(self) -> int:
        """Tokens of the text in a sequence."""
        before, after = self._frame
        return self.context - len(before) - len(after)

    def _framed(self, ids: list[int]) -> list[int]:
        before, after = self._frame
        return [*before, *ids, *after]

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: a text longer than the model's context is what is meant here, and not worth a warning.
        with tokenizing(self.tokenizer, text):
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _too_short(self, num_tokens: int) -> SparsepassError:
        return SparsepassError(
            f"calibration text is too short: it has {num_tokens} tokens, and one sequence of context {self.context} "
            f"needs {self._num_body}; give more text or a smaller context"
        )

    def _spots(self, data: bytes | mmap.mmap, what: str) -> Iterator[list[int]] | None:
        """Take one sequence from each of ``num_sequences`` equal parts of the text; None if a part may be too short."""
        if self.num_sequences is None:
            return None
        middle, num_body = len(data) // 2, self._num_body
        sample = text_between(data, max(0, middle - 8192), middle + 8192, what)
        bytes_per_token = len(sample.encode()) / max(1, len(self._tokens(sample)))
        # Half as much again as expected: texts are not even, and the sample is small.
        num_bytes = math.ceil(num_body * bytes_per_token * 1.5) + 64
        part = len(data) // self.num_sequences
        if part < 2 * num_bytes:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        offsets = torch.randint(part - num_bytes, (self.num_sequences,), generator=generator).tolist()

        def read() -> Iterator[list[int]]:
            for index, offset in enumerate(offsets):
                start, end = index * part + offset, (index + 1) * part
                for stop in (start + num_bytes, end):
                    ids = self._tokens(text_between(data, start, stop, what))
                    if len(ids) > num_body:  # more than needed: the last token may be a word cut in two
                        break
                else:
                    # An unusually dense stretch: begin at the part's start, and go as far as it takes.
                    ids = self._tokens(text_between(data, index * part, min(len(data), end + num_bytes), what))
                if len(ids) >= num_body:
                    yield ids[:num_body]

        return read()
