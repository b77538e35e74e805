"""The sequences of a run, in one global order that each process takes its rows of; and those of a table.

The order comes from integer arithmetic alone, so it is the same on every machine and in every version.

Shape legend: B sequences, T tokens of a sequence.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.retrain.data.tokens import IDS, IGNORED_LABEL, LABELS, MASK, Columns, TokenRows, TokenTable

Rows: TypeAlias = slice | Sequence[int] | None
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's mix of each value; one value goes to one value.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), with Stafford's constants.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return 0..count-1 in an order that the key chooses.

    Args:
        count: How many.
        key: Numbers such as seed and epoch; another key gives another order.

    Exactness: bitwise, whatever the versions of Python and numpy.

    Example:
        >>> permutation(8, 0, 1).tolist()
        [4, 1, 7, 5, 0, 6, 3, 2]
    """
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        state = _mix(state + _GAMMA + np.asarray([number & (2**64 - 1)], dtype=np.uint64))
    return np.argsort(_mix(state + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA), kind="stable")


def spread(count: int, total: int) -> NDArray[np.int64]:
    """Return ``count`` places spread evenly over ``total``: the middle of each of ``count`` equal parts.

    Example:
        >>> spread(3, 12).tolist()
        [2, 6, 10]
    """
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


@final
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some sequences.

    Shapes: all [B, T], int64.

    Args:
        input_ids: Token ids.
        attention_mask: 0 on padding; None if the data has no padding at all, whatever the batch.
        labels: Token ids at their own positions (the loss shifts them), -100 where nothing is to be learned; None if the
            data has none, so that ``input_ids`` are the labels.
        indices: The sequences' numbers in the run: 0 is the run's first.
        places: Where they stand in the data: the same sequence has the same place in every epoch.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    indices: list[int]
    places: list[int]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice) -> "Batch":
        return replace(self._changed(lambda tensor: tensor[rows]), indices=self.indices[rows], places=self.places[rows])

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return self._changed(lambda tensor: tensor.to(device))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=None if self.attention_mask is None else change(self.attention_mask),
            labels=None if self.labels is None else change(self.labels),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Shape:
    """How tokens become sequences.

    Args:
        context: Tokens of a sequence.
        packing: Whether a sequence is cut from the joined rows; else it is one row, padded.
        before: Tokens that begin every packed sequence.
        pad_id: What stands on padding.
    """

    context: int
    packing: bool
    before: tuple[int, ...] = ()
    pad_id: int = 0

    @property
    def num_body(self) -> int:
        """Tokens of the data in one sequence (of a padded row: its whole length)."""
        return self.context - len(self.before)

    def framed(self, body: Columns) -> Columns:
        """Put the tokens that begin a sequence before its body."""
        if not self.before:
            return body
        starts = {IDS: self.before, LABELS: (IGNORED_LABEL,) * len(self.before)}
        return {name: np.concatenate([np.asarray(starts[name], np.int32), values]) for name, values in body.items()}


def cut(columns: Columns, size: int) -> list[Columns]:
    """Cut flat columns into pieces of a size; what is left over is dropped."""
    count = len(columns[IDS]) // size
    return [{name: values[i * size : (i + 1) * size] for name, values in columns.items()} for i in range(count)]


def batch_of(sequences: Sequence[Columns], names: Sequence[str], context: int, indices: list[int], places: list[int]) -> Batch:
    """Stack sequences."""
    none = np.empty((0, context), np.int64)
    stacked = {name: np.stack([columns[name] for columns in sequences]) if sequences else none for name in names}
    tensors = {name: torch.from_numpy(values.astype(np.int64)) for name, values in stacked.items()}
    return Batch(**tensors, indices=indices, places=places)


@final
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source is read as sequences.

    Args:
        shape: How tokens become sequences.
        names: The columns of a sequence.
        settings: What has to be the same when a position is restored.
        seed: Chooses the orders; None keeps that of the source.
        what: For messages.
    """

    shape: Shape
    names: tuple[str, ...]
    settings: Mapping[str, object]
    seed: int | None
    what: str


class Sequences(ABC):
    """An endless row of sequences, epoch after epoch, at a position that can be saved and restored.

    Args:
        reading: How the source is read.

    Attributes:
        shape: How tokens become sequences.
        position: How many sequences have been taken, by all processes together.
        num_tokens: How many tokens have been taken, by all processes together, without padding.
        num_sequences: Sequences of an epoch; None while that is not known.
    """

    def __init__(self, reading: Reading) -> None:
        self.shape, self._reading = reading.shape, reading
        self.position = self.num_tokens = 0
        self.num_sequences: int | None = None

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch of the next sequence, from 0."""

    @abstractmethod
    def _walk(self, count: int, wanted: frozenset[int]) -> tuple[list[int], dict[int, Columns], int]:
        """Step over ``count`` sequences.

        Returns:
            The places of all, the columns of the wanted ones, and the number of tokens of all.
        """

    @abstractmethod
    def _place(self) -> dict[str, Any]: ...

    @abstractmethod
    def _go_to(self, place: Mapping[str, Any]) -> None: ...

    def take(self, count: int, rows: Rows = None) -> Batch:
        """Take the next sequences, and make the tensors of some of them.

        Each process takes the same ``count`` and its own rows; together they see what one process sees.

        Args:
            count: How many sequences to go on by.
            rows: Which of them to return: a slice, a range or a list of numbers below ``count``; None means all.

        Returns:
            The wanted rows, in the order asked for.

        Raises:
            SparsepassError: If ``count`` is negative, a row lies outside it, or streamed data is malformed.
        """
        if count < 0:
            raise SparsepassError(f"{self._reading.what}: cannot take {count} sequences")
        rows = slice(None) if rows is None else rows
        chosen = list(range(count)[rows]) if isinstance(rows, slice) else list(rows)
        if any(not 0 <= row < count for row in chosen):
            raise SparsepassError(f"{self._reading.what}: rows {chosen} are not all among the {count} sequences that are taken")
        places, columns, num_tokens = self._walk(count, frozenset(chosen))
        indices = [self.position + row for row in chosen]
        self.position += count
        self.num_tokens += num_tokens
        return batch_of(
            [columns[row] for row in chosen], self._reading.names, self.shape.context, indices, [places[row] for row in chosen]
        )

    def state(self) -> dict[str, Any]:
        """Return the exact position, as JSON; it is the same on every process."""
        return {
            "settings": dict(self._reading.settings),
            "position": self.position,
            "num_tokens": self.num_tokens,
            "place": self._place(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position that ``state`` gave: what follows is bit for bit what followed then.

        Raises:
            SparsepassError: If the data or how it is read is not what it was.
        """
        saved, here = state["settings"], self._reading.settings
        changed = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
        if changed:
            facts = "; ".join(f"{name} was {saved.get(name)!r} and is {here.get(name)!r}" for name in changed)
            raise SparsepassError(
                f"{self._reading.what} is not what the checkpoint was made with, so its place cannot be found again: {facts}. "
                "Give the same data and settings, or start a new run from the checkpoint's weights (--from-checkpoint)"
            )
        self._go_to(state["place"])
        self.position, self.num_tokens = int(state["position"]), int(state["num_tokens"])


def table_sequence(table: TokenTable, shape: Shape, place: int) -> Columns:
    """Return one sequence of a table."""
    if shape.packing:
        return shape.framed(table.read(place * shape.num_body, (place + 1) * shape.num_body))
    end, length = int(table.row_ends[place]), int(table.lengths[place])
    columns = table.read(end - length, end - length + min(length, shape.context))
    part = TokenRows(columns=columns, lengths=np.asarray([len(columns[IDS])], dtype=np.int64))
    return part.padded(shape.context, shape.pad_id).columns


@final
class TableSequences(Sequences):
    """The sequences of a table, in an order drawn anew for each epoch.

    Args:
        table: The tokens.
        places: Which of the table's sequences these are.
        reading: See `Reading`.
    """

    def __init__(self, table: TokenTable, places: Any, reading: Reading) -> None:
        super().__init__(reading)
        self._table, self._places, self.num_sequences = table, places, len(places)
        self._order: tuple[int, Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next sequence, from 0."""
        return self.position // len(self._places)

    def _walk(self, count: int, wanted: frozenset[int]) -> tuple[list[int], dict[int, Columns], int]:
        places = [self._place_of(self.position + row) for row in range(count)]
        columns = {row: table_sequence(self._table, self.shape, places[row]) for row in wanted}
        if self.shape.packing:
            return places, columns, count * self.shape.context
        if MASK not in self._table.names:
            return places, columns, int(np.minimum(self._table.lengths[places], self.shape.context).sum())
        everything = (table_sequence(self._table, self.shape, place) for place in places)
        return places, columns, sum(int(sequence[MASK].sum()) for sequence in everything)

    def _place_of(self, number: int) -> int:
        epoch, offset = divmod(number, len(self._places))
        if self._reading.seed is None:
            return int(self._places[offset])
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._places), self._reading.seed, epoch))
        return int(self._places[self._order[1][offset]])

    def _place(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def _go_to(self, place: Mapping[str, Any]) -> None:
        """The position tells all."""
