"""Calibration data: whatever a user brings, as batches named by a program's inputs.

Shape legend: B sequences, T tokens of a sequence.
"""

import itertools
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError
from sparsepass.graph.texts import find_text_column, path_kind, records, row_text, spread_order
from sparsepass.passes.data.inputs import MASK, ModelInputs, Row
from sparsepass.passes.data.sources import check_one_split, load_data_set, locate
from sparsepass.passes.data.texts import Packer, open_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_NAME: Final = 4096
_KNOWN_FORMS = (
    "a tensor, a dict of tensors, an iterable or DataLoader of either, a list of texts, a datasets.Dataset, the path "
    "of a .txt, .jsonl or .parquet file, several of them, or the name of a hub data set ('name', 'name:config' or "
    "'name:config:split')"
)


@dataclass(frozen=True, kw_only=True)
class CalibrationBatch:
    """One batch of model inputs, and which of its positions are real.

    Args:
        inputs: Tensors by the program's input names; the first dimension is the batch.
        valid_BT: True where a token is real, False where it is padding; None if no position is padding.
    """

    inputs: dict[str, Tensor]
    valid_BT: Tensor | None = None  # noqa: N815


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Where rows come from: a name for the report, and a function that starts reading from the beginning."""

    name: str
    kind: str
    rows: Callable[[], Iterator[Row]]
    once: bool = False
    facts: dict[str, object] = field(default_factory=dict)


@final
class CalibrationData:
    """Batches of calibration inputs, read as they are asked for; made by :func:`calibration_batches`.

    Iterating gives dicts of tensors named by the program's inputs. It can be iterated again, unless it was made from a
    generator, which can be read only once.
    """

    def __init__(self, source: _Given, input_names: tuple[str, ...], *, num_sequences: int | None, batch_size: int) -> None:
        self._source = source
        self._input_names = input_names
        self._num_sequences = num_sequences
        self._batch_size = batch_size
        self._count_sequences = self._count_tokens = self._count_padding = 0
        self._complete = False
        # The first batch is made here, so that a mistake shows before anything expensive starts.
        self._started: Iterator[CalibrationBatch] | None = self._start()

    def _start(self) -> Iterator[CalibrationBatch]:
        batches = self._read()
        first = next(batches, None)
        if first is None:
            raise SparsepassError(
                f"calibration data is empty: {self._source.kind} {self._source.name} gave no sequence; expected {_KNOWN_FORMS}"
            )
        return itertools.chain([first], batches)

    def _read(self) -> Iterator[CalibrationBatch]:
        rows = itertools.islice(self._source.rows(), self._num_sequences)
        for _, alike in itertools.groupby(rows, key=_signature):
            while batch := list(itertools.islice(alike, self._batch_size)):
                yield self._batch(batch)

    def _batch(self, rows: list[Row]) -> CalibrationBatch:
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        valid_BT = None
        mask_BT = tensors.get(MASK)
        ids_BT = tensors.get("input_ids")
        if mask_BT is not None and ids_BT is not None and mask_BT.shape == ids_BT.shape and not mask_BT.bool().all():
            valid_BT = mask_BT.bool()
        return CalibrationBatch(
            inputs={name: tensors[name] for name in self._input_names if name in tensors}, valid_BT=valid_BT
        )

    def batches(self) -> Iterator[CalibrationBatch]:
        """Return an iterator over the batches with their padding.

        Raises:
            SparsepassError: If a sequence is malformed, or the data came from a generator that was read before.
        """
        started, self._started = self._started, None
        if started is None:
            if self._source.once:
                raise SparsepassError(
                    f"calibration data from a {self._source.kind} can be read only once and was; pass a list, a data "
                    "set or a file, which can be read again"
                )
            started = self._start()
        self._count_sequences = self._count_tokens = self._count_padding = 0
        self._complete = False
        return self._counted(started)

    def _counted(self, batches: Iterator[CalibrationBatch]) -> Iterator[CalibrationBatch]:
        for batch in batches:
            ids_BT = batch.inputs.get("input_ids")
            self._count_sequences += next(iter(batch.inputs.values())).shape[0]
            if ids_BT is not None:
                num_padding = 0 if batch.valid_BT is None else int((~batch.valid_BT).sum())
                self._count_tokens += ids_BT.numel() - num_padding
                self._count_padding += num_padding
            yield batch
        self._complete = True

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (batch.inputs for batch in self.batches())

    def describe(self) -> dict[str, object]:
        """Return what was used, for the report.

        Returns:
            JSON-ready facts: source and kind, sequences and tokens read so far in the latest pass over the data
            (padding counted apart), whether that pass reached its end, and how the sequences were chosen.
        """
        return {
            "source": self._source.name,
            "kind": self._source.kind,
            "num_sequences": self._count_sequences,
            "num_sequences_asked": self._num_sequences,
            "num_tokens": self._count_tokens,
            "num_padding": self._count_padding,
            "complete": self._complete,
            "batch_size": self._batch_size,
            "input_names": list(self._input_names),
            **self._source.facts,
        }


def calibration_batches(
    calibration: object,
    *,
    input_names: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    num_sequences: int | None = 128,
    context: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> CalibrationData:
    """Turn whatever a user brings into batches of a program's inputs.

    Text is tokenized, joined and cut into full sequences of ``context`` tokens, each framed by the special tokens that
    the tokenizer itself puts around a text. From a text or a file, the sequences are spread evenly over the whole of
    it, and only the parts that are used are tokenized. Tensors and tokenized rows keep their own lengths.
    ``attention_mask`` is ones and ``token_type_ids`` zeros where the program has that input and the data lacks it. Rows
    of equal shape share a batch.

    Shapes: ids and masks are [B, T]; pixel values [B, channels, height, width]; every input has the batch first.

    Args:
        calibration: A tensor, a dict of tensors, an iterable (list, generator, DataLoader) of either, texts (a list of
            strings, or one string that has a line break in it or is longer than any path), a ``datasets.Dataset`` or
            ``IterableDataset`` with tokenized columns or a text column, the path of a .txt, .jsonl or .parquet file, a list
            of such ``Path`` objects (of each file as many sequences), the path of a data set's folder, or the name of a hub
            data set: ``name``, ``name:config`` or ``name:config:split``
            (``name::split`` leaves the config out; the split is "train" if not said).
        input_names: The program's input names.
        tokenizer: Needed for text.
        num_sequences: At most so many sequences are used, from any source; None takes all there are.
        context: Tokens in a sequence made from text.
        batch_size: Sequences in a batch.
        seed: Chooses where in the text or in which rows the sequences lie.
        text_column: The column that holds text or chats; by default ``text``, or else ``messages``. A chat, a list of
            messages, goes through the tokenizer's chat template.
        vocab_size: Token ids have to be below it, if given.

    Returns:
        The batches, made as they are read.

    Raises:
        SparsepassError: If the data is empty, of the wrong shape or type, has names the program does not know, holds
            token ids outside the vocabulary or values that are not finite, is text without a tokenizer or too short for
            one sequence, or cannot be found.

    Exactness: the same arguments give the same batches, bitwise.

    Example:
        >>> ids = torch.arange(12).reshape(3, 4)
        >>> data = calibration_batches(ids, input_names=["input_ids", "attention_mask"], batch_size=2)
        >>> [batch["input_ids"].shape for batch in data]
        [torch.Size([2, 4]), torch.Size([1, 4])]
        >>> data.describe()["num_tokens"]
        12
    """
    if isinstance(calibration, CalibrationData):
        return calibration
    for name, value in (("num_sequences", num_sequences), ("context", context), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise SparsepassError(f"{name} has to be at least 1, and {value} was given")
    if not input_names:
        raise SparsepassError("input_names is empty: calibration needs the names of the program's inputs")
    reader = _Reader(
        inputs=ModelInputs(names=tuple(input_names), vocab_size=vocab_size),
        tokenizer=tokenizer,
        num_sequences=num_sequences,
        context=context,
        seed=seed,
        text_column=text_column,
    )
    return CalibrationData(reader.source(calibration), tuple(input_names), num_sequences=num_sequences, batch_size=batch_size)


def _signature(row: Row) -> tuple[tuple[str, torch.Size, torch.dtype, torch.device], ...]:
    return tuple((name, value.shape, value.dtype, value.device) for name, value in row.items())


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """The settings of one call, and a method for each form of data."""

    inputs: ModelInputs
    tokenizer: "PreTrainedTokenizerBase | None"
    num_sequences: int | None
    context: int
    seed: int
    text_column: str | None

    # Which form is it?

    def source(self, calibration: object) -> _Given:
        if isinstance(calibration, str):
            return self._from_string(calibration)
        if isinstance(calibration, Path):
            return self._from_path(calibration, str(calibration))
        if isinstance(calibration, (Tensor, np.ndarray)):
            return _Given(name=f"shape {list(calibration.shape)}", kind="tensor", rows=lambda: self.inputs.rows([calibration]))
        if (datasets := sys.modules.get("datasets")) is not None:
            check_one_split(calibration, "calibration")
            if isinstance(calibration, datasets.Dataset | datasets.IterableDataset):
                return self._from_dataset(calibration, type(calibration).__name__)
        if isinstance(calibration, (list, tuple)) and calibration and all(isinstance(each, Path) for each in calibration):
            return self._from_files(calibration)
        if isinstance(calibration, Mapping):
            return _Given(name=", ".join(map(str, calibration)), kind="dict", rows=lambda: self.inputs.rows([calibration]))
        if isinstance(calibration, torch.utils.data.Dataset) and not isinstance(calibration, Iterable):
            length = len(calibration)  # type: ignore[arg-type]  # a map-style data set has a length
            items: Any = calibration
            return _Given(
                name=type(calibration).__name__,
                kind="torch data set",
                rows=lambda: self.inputs.record_rows(self.inputs.named(items[index]) for index in range(length)),
            )
        if isinstance(calibration, Iterable):
            return self._from_iterable(calibration)
        raise SparsepassError(f"calibration of type {type(calibration).__name__} is not understood; expected {_KNOWN_FORMS}")

    def _from_string(self, text: str) -> _Given:
        if "\n" in text or len(text) > LONGEST_NAME:
            return self._from_text(text.encode(), "text given in memory", "text")
        path = locate(text, what="calibration", forms=_KNOWN_FORMS)
        return self._from_hub(text) if path is None else self._from_path(path, text)

    def _from_path(self, path: Path, name: str) -> _Given:
        kind = path_kind(path, name, what="calibration", forms=_KNOWN_FORMS)
        if kind == "folder":
            return self._from_hub(name)
        if kind == "text":
            return self._from_text(open_bytes(path), name, "text file")
        return self._from_records(
            lambda: records(path, what="calibration", seed=self.seed), name, f".{kind} file", "rows spread evenly"
        )

    def _from_files(self, paths: Sequence[Path]) -> _Given:
        """Several files, of any kinds: an equal share of the sequences from each."""
        number, count = self.num_sequences, len(paths)
        if number is not None and number < count:
            raise SparsepassError(
                f"num_sequences is {number}, and there are {count} calibration files; give at least one to each"
            )
        shares = [None if number is None else (index + 1) * number // count - index * number // count for index in range(count)]
        parts = [
            replace(self, num_sequences=share)._from_path(path.expanduser(), str(path))
            for path, share in zip(paths, shares, strict=True)
        ]

        def rows() -> Iterator[Row]:
            for part, share in zip(parts, shares, strict=True):
                yield from itertools.islice(part.rows(), share)

        shared = {key: value for key, value in parts[0].facts.items() if all(part.facts.get(key) == value for part in parts)}
        facts = shared | {"files": [part.facts | {"source": part.name, "kind": part.kind} for part in parts]}
        return _Given(name=", ".join(part.name for part in parts), kind=f"{count} files", rows=rows, facts=facts)

    def _from_hub(self, text: str) -> _Given:
        return self._from_dataset(load_data_set(text, what="calibration", streaming=True), text)

    def _from_dataset(self, data: Any, name: str) -> _Given:
        import datasets

        if isinstance(data, datasets.Dataset):
            if len(data) == 0:
                raise SparsepassError(f"calibration data is empty: data set {name} has no rows")
            return self._from_records(
                lambda: (data[index] for index in spread_order(len(data), self.seed)),
                name,
                "data set",
                "rows spread evenly",
            )
        return self._from_records(lambda: iter(data), name, "streamed data set", "first rows, in order")

    def _from_iterable(self, items: Iterable[object]) -> _Given:
        once = isinstance(items, Iterator)
        kind = "generator" if once else type(items).__name__
        iterator = iter(items)
        try:
            first = next(iterator)
        except StopIteration:
            raise SparsepassError(f"calibration data is empty: the {kind} gave nothing; expected {_KNOWN_FORMS}") from None
        everything = itertools.chain([first], iterator)

        def read() -> Iterator[object]:
            return everything if once else iter(items)

        if isinstance(first, str):
            if isinstance(items, (list, tuple)):
                joined = "\n\n".join(self._strings(items))
                return self._from_text(joined.encode(), f"{len(items)} texts given in memory", "texts")
            packer = self._packer("data")
            facts = self._text_facts("first texts, in order", packer)

            def rows() -> Iterator[Row]:
                return self._text_rows(packer.join(self._strings(read())))

            return _Given(name=kind, kind="texts", rows=rows, once=once, facts=facts)
        if isinstance(items, (list, tuple)) and isinstance(first, (int, float)):
            return _Given(name="list of numbers", kind="list", rows=lambda: self.inputs.rows([torch.as_tensor(items)]))
        return _Given(name=kind, kind=kind, rows=lambda: self.inputs.rows(read()), once=once)

    def _strings(self, items: Iterable[object]) -> Iterator[str]:
        for index, item in enumerate(items):
            if not isinstance(item, str):
                raise SparsepassError(
                    f"calibration mixes texts with {type(item).__name__} (item {index}); pass only texts, or only tensors"
                )
            yield item

    # Records: rows of a data set or file

    def _from_records(self, read: Callable[[], Iterator[Mapping[str, object]]], name: str, kind: str, selection: str) -> _Given:
        first = next(read(), None)
        if first is None:
            raise SparsepassError(f"calibration data is empty: {kind} {name} has no rows")
        if any(column in self.inputs.names for column in first):
            facts: dict[str, object] = {"selection": selection, "seed": self.seed}
            return _Given(name=name, kind=kind, rows=lambda: self.inputs.record_rows(read()), facts=facts)
        column = find_text_column(
            first, self.text_column, f"calibration {kind} {name} (without the program's {', '.join(self.inputs.names)})"
        )
        packer = self._packer(name)

        def texts() -> Iterator[str]:
            for index, record in enumerate(read()):
                if text := row_text(
                    record.get(column), self.tokenizer, f"calibration {kind} {name}, row {index}: column {column!r}"
                ):
                    yield text

        facts = self._text_facts(selection, packer)
        return _Given(name=name, kind=kind, rows=lambda: self._text_rows(packer.join(texts())), facts=facts)

    # Text

    def _packer(self, name: str) -> Packer:
        if "input_ids" not in self.inputs.names:
            raise SparsepassError(
                f"calibration {name} is text, and the program takes {', '.join(self.inputs.names)}; give tensors by these names"
            )
        if self.tokenizer is None:
            raise SparsepassError(
                f"calibration {name} is text, and there is no tokenizer to turn it into ids; pass tokenizer=..., or token ids"
            )
        return Packer(self.tokenizer, self.context, self.num_sequences, self.seed)

    def _from_text(self, data: bytes | mmap.mmap, name: str, kind: str) -> _Given:
        packer = self._packer(name)
        facts = self._text_facts("spread evenly over the text", packer) | {"text_bytes": len(data)}
        what = f"calibration text {name}"
        return _Given(name=name, kind=kind, rows=lambda: self._text_rows(packer.spread(data, what)), facts=facts)

    def _text_facts(self, selection: str, packer: Packer) -> dict[str, object]:
        tokenizer = str(packer.tokenizer.name_or_path)
        return {"context": self.context, "selection": selection, "seed": self.seed, "tokenizer": tokenizer}

    def _text_rows(self, sequences: Iterator[list[int]]) -> Iterator[Row]:
        return (self.inputs.checked({"input_ids": torch.tensor([ids])}, "text") for ids in sequences)
