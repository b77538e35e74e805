"""Sequences of a stream: shuffled block by block, so that a position is small and found again by reading one block.

The stream is cut into blocks of so many sequences, and each block is put into an order of its own. A position is then the
place in the source where its block begins (data sets know their place) and a number in the block.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np

from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.graph.texts import RecordError
from sparsepass.retrain.data.sequences import Reading, Sequences, cut, permutation
from sparsepass.retrain.data.tokens import IDS, MASK, Columns, TokenRows, hash_columns

Encode: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], TokenRows]

# Rows are tokenized together until there are so many, or so many characters or tokens.
_ROWS, _ELEMENTS = 256, 1 << 18


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in a stream of tokens.

    Args:
        source: The data set's own state before some row; None is its beginning.
        skip: Tokens from there.
        passed: Tokens from the beginning, from which the place can be found even where the data set's state is not exact.
    """

    source: Any = None
    skip: int = 0
    passed: int = 0


def readable(rows: Iterable[Mapping[str, Any]], what: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set that is read as it goes, with an error of ours where it cannot be read on.

    Args:
        rows: A ``datasets.IterableDataset``.
        what: For messages.

    Raises:
        SparsepassError: If a file is cut off or damaged, or the network fails.

    Example:
        >>> list(readable([{"text": "a"}], "training data"))
        [{'text': 'a'}]
    """
    import datasets

    place = 0
    try:
        for place, row in enumerate(rows, start=1):  # noqa: B007
            yield row
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, SparsepassError) and not isinstance(error, RecordError):
            raise
        cause = error.__cause__ or error
        reason = str(error) if isinstance(error, RecordError) else f"{type(cause).__name__}: {first_line(cause)}"
        raise SparsepassError(f"{what} could not be read on after {place} rows: {reason}; is a file cut off?") from error


@final
class TokenStream:
    """The tokens of a data set's rows, in order, from a place on.

    Args:
        data: A ``datasets.IterableDataset``.
        encode: Turns rows into tokens.
        place: Where to begin.
        what: For messages.
    """

    def __init__(self, data: Any, encode: Encode, place: Place, what: str = "the data") -> None:
        # A copy: the user's own object stays where it stands.
        self._data = copy.copy(data)
        if not _has_form(self._data.state_dict(), place.source):
            place = dataclasses.replace(place, source=None, skip=place.passed)
        self._data.load_state_dict(place.source)
        self._rows: Iterator[Mapping[str, Any]] = readable(self._data, what)
        self._encode = encode
        self._before = self._after = place.source
        self._batch: Columns = {IDS: np.empty(0, np.int32)}
        self._used = 0
        self._passed = place.passed - place.skip
        self.read(place.skip)

    @property
    def place(self) -> Place:
        """The place of the next token."""
        return Place(source=self._before, skip=self._used, passed=self._passed)

    def read(self, count: int) -> Columns:
        """Return the next ``count`` tokens; fewer at the end of the stream."""
        found: list[Columns] = []
        missing = count
        while missing and (self._used < len(self._batch[IDS]) or self._pull()):
            stop = self._used + missing
            found.append({name: values[self._used : stop] for name, values in self._batch.items()})
            num_taken = len(found[-1][IDS])
            self._used, self._passed, missing = self._used + num_taken, self._passed + num_taken, missing - num_taken
        names = found[0] if found else self._batch
        return {name: np.concatenate([np.empty(0, np.int32), *(part[name] for part in found)]) for name in names}

    def skip_to(self, passed: int) -> None:
        """Go on until so many tokens from the beginning have passed."""
        while self._passed < passed and len(self.read(min(passed - self._passed, _ELEMENTS))[IDS]):
            pass

    def _pull(self) -> bool:
        """Tokenize the next rows that give any token; False at the end of the stream."""
        while True:
            rows: list[Mapping[str, Any]] = []
            num_elements = 0
            self._before = self._after
            for row in self._rows:
                rows.append(row)
                num_elements += sum(len(value) for value in row.values() if isinstance(value, (str, list)))
                if len(rows) >= _ROWS or num_elements >= _ELEMENTS:
                    break
            self._used = 0
            if not rows:
                self._batch = {name: values[:0] for name, values in self._batch.items()}
                return False
            self._after = json.loads(json.dumps(self._data.state_dict(), default=int))
            self._batch = self._encode(rows).columns
            if len(self._batch[IDS]):
                return True


@final
@dataclass(frozen=True, kw_only=True)
class StreamBlock:
    """Where a block begins, and what tells that it was found again.

    Args:
        epoch: Which time the stream is read.
        first: The number of the block's first sequence.
        place: Where that begins.
        check: Its hash; None if it has not been read.
    """

    epoch: int
    first: int
    place: Place
    check: str | None


@final
class StreamedSequences(Sequences):
    """The sequences of a stream, block by block, each block in an order of its own.

    Args:
        data: A ``datasets.IterableDataset``; it has to give the same rows in every epoch.
        encode: Turns rows into tokens; into padded rows if the shape does not pack.
        start: Where an epoch begins, behind what is held out.
        block: Sequences of a block.
        limit: Sequences of an epoch at most.
        reading: See `Reading`.
    """

    def __init__(
        self, data: Any, encode: Encode, *, start: StreamBlock, block: int, limit: int | None, reading: Reading
    ) -> None:
        super().__init__(reading)
        self._data, self._encode = data, encode
        self._start, self._block_size, self._limit = start, block, limit
        self._block, self._offset = self._start, 0
        self._stream: TokenStream | None = None
        self._loaded: list[Columns] | None = None
        self._order: Any = None

    @property
    def epoch(self) -> int:
        """The epoch of the latest block."""
        return self._block.epoch

    def _walk(self, count: int, wanted: frozenset[int]) -> tuple[list[int], dict[int, Columns], int]:
        places: list[int] = []
        columns: dict[int, Columns] = {}
        num_tokens = 0
        for row in range(count):
            loaded = self._current()
            index = int(self._order[self._offset])
            self._offset += 1
            sequence = loaded[index]
            places.append(self._block.first + index)
            num_tokens += int(sequence[MASK].sum()) if MASK in sequence else self.shape.context
            if row in wanted:
                columns[row] = self.shape.framed(sequence)
        return places, columns, num_tokens

    def _current(self) -> list[Columns]:
        """Return the block of the next sequence, reading it if need be."""
        if self._loaded is None:
            self._load()
        while self._loaded is not None and self._offset >= len(self._loaded):
            block = self._block
            following = block.first + len(self._loaded)
            assert self._stream is not None
            self._block = dataclasses.replace(block, first=following, place=self._stream.place, check=None)
            self._load()
            if not self._loaded:
                self.num_sequences = following - self._start.first
                self._block = dataclasses.replace(self._start, epoch=block.epoch + 1)
                self._stream = None
                self._load()
        assert self._loaded
        return self._loaded

    def _load(self) -> None:
        """Read the block, from where the stream stands, or from the block's own place."""
        if self._stream is None:
            self._stream = TokenStream(self._data, self._encode, self._block.place, self._reading.what)
        loaded = self._read(self._stream)
        if self._block.check is not None and not _is_checked(loaded, self._block.check):
            # The data set's own state was not exact (a shuffled stream's is not): read up to here from the beginning.
            self._stream = TokenStream(self._data, self._encode, Place(), self._reading.what)
            self._stream.skip_to(self._block.place.passed)
            loaded = self._read(self._stream)
            if not _is_checked(loaded, self._block.check):
                raise SparsepassError(
                    f"{self._reading.what}: the stream gives other text than before at sequence {self._block.first} of epoch "
                    f"{self._block.epoch}; training can only go on with a stream that is the same whenever it is read. Give "
                    "it without shuffling of its own (shuffle_buffer does that), or streaming=False"
                )
        self._loaded, self._offset = loaded, 0
        if loaded:
            self._block = dataclasses.replace(self._block, check=hash_columns(loaded[0]))
        seed, key = self._reading.seed, (self._block.epoch, self._block.first)
        self._order = np.arange(len(loaded)) if seed is None else permutation(len(loaded), seed, *key)

    def _read(self, stream: TokenStream) -> list[Columns]:
        wanted = self._block_size
        if self._limit is not None:
            wanted = min(wanted, self._start.first + self._limit - self._block.first)
        return cut(stream.read(wanted * self.shape.num_body), self.shape.num_body)

    def _place(self) -> dict[str, Any]:
        return {"block": dataclasses.asdict(self._block), "offset": self._offset, "num_sequences": self.num_sequences}

    def _go_to(self, place: Mapping[str, Any]) -> None:
        block = dict(place["block"])
        self._block = StreamBlock(**{**block, "place": Place(**block["place"])})
        self.num_sequences = place["num_sequences"]
        self._stream = None
        self._load()
        self._offset = int(place["offset"])


def _is_checked(loaded: Sequence[Columns], check: str) -> bool:
    return bool(loaded) and hash_columns(loaded[0]) == check


def _has_form(own: Any, saved: Any) -> bool:
    """Whether a saved state fits a data set: the states of another kind of reader have other fields."""
    if saved is None or not isinstance(own, dict):
        return True
    same = isinstance(saved, dict) and own.keys() == saved.keys() and own.get("type") == saved.get("type")
    return same and all(_has_form(own[name], saved[name]) for name in own)
