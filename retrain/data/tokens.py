"""Tokens as flat columns: made from text or from tokenized rows, checked, padded, and read at any place.

A row is what a data set holds: a text or a list of ids. A sequence is what the model is trained on: ``context`` tokens.
Columns are ``input_ids`` and, where the data has them, ``labels`` and ``attention_mask``; flat, int32, one row after another.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from sparsepass.graph.support import SparsepassError
from sparsepass.graph.texts import row_text, tokenizing
from sparsepass.passes.data import special_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array: TypeAlias = NDArray[Any]
Columns: TypeAlias = dict[str, Array]

IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
IGNORED_LABEL = -100
# The fingerprint of a table reads at most so many pieces of so many tokens; a table up to 16 million tokens is read whole.
_PIECES, _PIECE = 4096, 4096


@final
@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Some rows: their tokens one row after another, and how many tokens each row has."""

    columns: Columns
    lengths: Array

    def __len__(self) -> int:
        return int(self.columns[IDS].shape[0])

    def checked(self, *, vocab_size: int | None, what: str) -> "TokenRows":
        """Return the part itself if its ids, labels and masks are in order.

        Raises:
            SparsepassError: If an id or a label lies outside the vocabulary, or a mask is neither 0 nor 1.
        """
        if not len(self):
            return self
        low, high = int(self.columns[IDS].min()), int(self.columns[IDS].max())
        if low < 0:
            raise SparsepassError(
                f"{what} holds the negative id {low}; padding is told by attention_mask, not by {IGNORED_LABEL}"
            )
        if vocab_size is not None and high >= vocab_size:
            raise SparsepassError(
                f"{what} holds the id {high}, and the model's vocabulary has {vocab_size}; was another model's tokenizer used?"
            )
        if (labels := self.columns.get(LABELS)) is not None:
            wrong = ((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= (vocab_size or 2**31 - 1))
            if wrong.any():
                raise SparsepassError(
                    f"{what} holds the label {int(labels[wrong][0])}; labels are token ids"
                    + (f" below {vocab_size}" if vocab_size else "")
                    + f", or {IGNORED_LABEL} where nothing is to be learned"
                )
        if (mask := self.columns.get(MASK)) is not None and not ((mask == 0) | (mask == 1)).all():
            raise SparsepassError(f"{what}: attention_mask may hold only 0 (padding) and 1")
        return self

    def without_padding(self) -> "TokenRows":
        """Leave out the positions where the mask is 0, and the mask."""
        mask = self.columns.get(MASK)
        if mask is None:
            return self
        columns = {name: values for name, values in self.columns.items() if name != MASK}
        if mask.all():
            return TokenRows(columns=columns, lengths=self.lengths)
        kept = mask.astype(bool)
        before = np.concatenate([[0], np.cumsum(kept)])
        ends = np.cumsum(self.lengths)
        return TokenRows(
            columns={name: values[kept] for name, values in columns.items()},
            lengths=before[ends] - before[ends - self.lengths],
        )

    def padded(self, context: int, pad_id: int) -> "TokenRows":
        """Bring every row to ``context`` tokens: longer ones are cut, shorter ones padded on the right; empty ones left out.

        Returns:
            The rows with an ``attention_mask`` that is 0 on padding; labels are -100 there.

        Example:
            >>> part = part_of_rows({"input_ids": [[5, 6, 7], [8]]}, "data")
            >>> part.padded(2, 0).columns["input_ids"].tolist(), part.padded(2, 0).columns["attention_mask"].tolist()
            ([5, 6, 8, 0], [1, 1, 1, 0])
        """
        starts = np.cumsum(self.lengths) - self.lengths
        rows = [(int(start), int(min(length, context))) for start, length in zip(starts, self.lengths, strict=True) if length]
        given = {MASK: np.ones(len(self), np.int32), **self.columns}
        columns: Columns = {}
        for name, values in given.items():
            fill = {IDS: pad_id, LABELS: IGNORED_LABEL, MASK: 0}[name]
            filled = np.full((len(rows), context), fill, dtype=np.int32)
            for index, (start, length) in enumerate(rows):
                filled[index, :length] = values[start : start + length]
            columns[name] = filled.reshape(-1)
        return TokenRows(columns=columns, lengths=np.full(len(rows), context, dtype=np.int64))


@final
@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns texts into ids, each text by itself, so that it does not matter which texts stand beside it.

    Rules:
    1. A document is its text, tokenized without special tokens, and then the tokenizer's EOS, if it has one.
    2. What the tokenizer itself puts before a text (BOS, for some models) begins every sequence, not every document:
       models that were trained so expect it there.
    3. An empty text gives nothing.

    Args:
        tokenizer: Makes the ids.
        framed: Whether each document is a sequence of its own, and so begins like one.
        what: For messages.
    """

    tokenizer: "PreTrainedTokenizerBase"
    framed: bool
    what: str

    @cached_property
    def before(self) -> list[int]:
        """The tokens that begin a sequence."""
        return special_frame(self.tokenizer)[0]

    @cached_property
    def eos(self) -> list[int]:
        """The token that ends a document, or nothing."""
        return [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]

    @cached_property
    def fingerprint(self) -> str:
        """Tells tokenizers apart that give other ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            facts = repr((type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())))
        else:
            # Truncation and padding are settings of the latest call, and are not used here.
            facts = json.dumps(json.loads(backend.to_str()) | {"truncation": None, "padding": None}, sort_keys=True)
        return hashlib.blake2b(repr((facts, self.before, self.eos)).encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[object], *, first_row: int = 0) -> list[Array]:
        """Return the ids of each document; None counts as an empty text, and a chat goes through the chat template.

        Args:
            texts: The documents.
            first_row: The number of the first, for messages.

        Raises:
            SparsepassError: If a document is neither text nor a chat, or the tokenizer has no chat template.
        """
        begin = self.before if self.framed else []
        encoded = self._ids(
            [
                row_text(text, self.tokenizer, f"{self.what}, row {first_row + index}: the text column")
                for index, text in enumerate(texts)
            ]
        )
        return [_array([*begin, *ids, *self.eos] if ids else []) for ids in encoded]

    def encode_pieces(self, rows: Sequence[Mapping[str, Any]]) -> list[Array]:
        """Return the ids of each piece of a text file; each row tells whether the file begins and ends with it."""
        # A tokenizer may treat the beginning of a text in its own way. A piece that goes on follows a line break, so it is
        # tokenized behind one, whose ids are then taken off.
        (lead,) = self._ids(["\n"])
        encoded = self._ids([row["text"] if row["begins"] else "\n" + row["text"] for row in rows])
        found = []
        for row, ids in zip(rows, encoded, strict=True):
            if not row["begins"]:
                led = ids[: len(lead)] == lead
                ids = ids[len(lead) :] if led else self._ids([row["text"]])[0]
            found.append(_array([*ids, *self.eos] if row["ends"] else ids))
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a text longer than the model's context is what is meant here, and not worth a warning.
        with tokenizing(self.tokenizer, *texts):
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            return list(encoded["input_ids"])


def _array(ids: Sequence[int]) -> Array:
    return np.asarray(ids, dtype=np.int32)


def part_of_rows(rows: Mapping[str, Sequence[Any]], what: str) -> TokenRows:
    """Join rows of ids (and labels and masks) into one part.

    Raises:
        SparsepassError: If a row is not a flat list of whole numbers.

    Example:
        >>> part_of_rows({"input_ids": [[1, 2], [3]]}, "data").lengths.tolist()
        [2, 1]
    """
    columns: Columns = {}
    lengths: dict[str, list[int]] = {}
    for name in (IDS, LABELS, MASK):
        if name not in rows:
            continue
        arrays = []
        for index, row in enumerate(rows[name]):
            array = np.asarray([] if row is None else row)
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
                raise SparsepassError(
                    f"{what}, row {index}: {name} has to be a list of whole numbers, and is of shape {list(array.shape)} and "
                    f"type {array.dtype}"
                )
            arrays.append(array)
        columns[name] = _int32(np.concatenate([np.empty(0, np.int32), *arrays]), name, what)
        lengths[name] = [len(array) for array in arrays]
    return TokenRows(columns=columns, lengths=_same_lengths(lengths, what))


def parts_of_arrow(table: Any, what: str) -> Iterator[TokenRows]:
    """Return a data set's arrow table as parts, without copying what is int32 already (it may lie on disk).

    Raises:
        SparsepassError: If a column does not hold lists of whole numbers, or columns have rows of different lengths.
    """
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets; has no type information

    names = [name for name in (IDS, LABELS, MASK) if name in table.column_names]
    for batch in table.select(names).to_batches():
        columns: Columns = {}
        lengths: dict[str, Array] = {}
        for name in names:
            lists = batch.column(name)
            kind = getattr(lists.type, "value_type", None)
            if kind is None or not (pyarrow.types.is_integer(kind) or pyarrow.types.is_boolean(kind)):
                raise SparsepassError(f"{what}: {name} has to hold lists of whole numbers, and is {lists.type}")
            values = lists.flatten()
            if values.null_count:
                raise SparsepassError(f"{what}: a row of {name} holds null instead of a number")
            columns[name] = _int32(values.to_numpy(zero_copy_only=False), name, what)
            lengths[name] = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        yield TokenRows(columns=columns, lengths=_same_lengths(lengths, what))


def _int32(values: Array, name: str, what: str) -> Array:
    if values.dtype != np.int32:
        if values.size and (int(values.max()) >= 2**31 or int(values.min()) < -(2**31)):
            raise SparsepassError(f"{what}: {name} holds numbers beyond 32 bits, which are no token ids")
        values = values.astype(np.int32)
    return values


def _same_lengths(lengths: Mapping[str, Any], what: str) -> Array:
    arrays = {name: np.asarray(found, dtype=np.int64) for name, found in lengths.items()}
    for name, array in arrays.items():
        if not np.array_equal(array, arrays[IDS]):
            row = int(np.flatnonzero(array != arrays[IDS])[0])
            raise SparsepassError(
                f"{what}: a row has {int(arrays[IDS][row])} input_ids and {int(array[row])} {name}; they have to be equal"
            )
    return arrays[IDS]


@final
class TokenTable:
    """All tokens of a source, read at any place; the parts may lie in memory or be mapped from disk."""

    def __init__(self, parts: Iterable[TokenRows]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self.names = tuple(self._parts[0].columns) if self._parts else (IDS,)
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in self._parts)])
        # An empty row has no tokens, so that the ends of the others stay where they are.
        self.lengths: Array = lengths[lengths > 0]
        self.row_ends = np.cumsum(self.lengths)
        self.num_empty = len(lengths) - len(self.lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def read(self, start: int, stop: int) -> Columns:
        """Return the columns of the tokens from ``start`` to before ``stop``."""
        index = int(np.searchsorted(self._ends, start, side="right"))
        found: dict[str, list[Array]] = {name: [] for name in self.names}
        while start < stop:
            part = self._parts[index]
            offset = int(self._ends[index]) - len(part)
            end = min(stop, offset + len(part))
            for name in self.names:
                found[name].append(part.columns[name][start - offset : end - offset])
            start, index = end, index + 1
        return {name: np.concatenate([np.empty(0, np.int32), *arrays]) for name, arrays in found.items()}

    def followed_by(self, other: "TokenTable", multiple: int) -> "TokenTable":
        """This table's tokens and then another one's, which begin at the next multiple of so many tokens."""
        gap = -len(self) % multiple
        filler = TokenRows(
            columns={name: np.zeros(gap, np.int32) for name in self.names}, lengths=np.asarray([gap], dtype=np.int64)
        )
        return TokenTable([*self._parts, filler, *other._parts])

    def fingerprint(self) -> str:
        """Return a hash of the size and of up to 16 million tokens spread evenly over the table: of all, if it is smaller."""
        digest = hashlib.blake2b(repr((self.names, len(self), len(self.lengths))).encode(), digest_size=16)
        num_pieces = min(_PIECES, -(-len(self) // _PIECE))
        for index in range(num_pieces):
            start = index * len(self) // num_pieces
            for values in self.read(start, min(start + _PIECE, len(self))).values():
                digest.update(np.ascontiguousarray(values, dtype="<i4").data)
        return digest.hexdigest()


def hash_columns(columns: Columns) -> str:
    """Return a hash of some columns' content."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(columns[name], dtype="<i4").data)
    return digest.hexdigest()
