"""Calibration data: whatever a user brings, as batches named by a program's inputs.

Shape legend: B sequences, T tokens of a sequence.
"""

import itertools
import json
import math
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError, closest, first_line
from sparsepass.passes.data.sources import load_data_set, locate, path_kind, special_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Row: TypeAlias = dict[str, Tensor]

_PRIMARY_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values")
_ID_INPUTS = ("input_ids", "decoder_input_ids")
_MASK = "attention_mask"
# What tokenizers and data sets put beside the inputs, and no forward pass without a loss reads.
_IGNORED = ("labels", "label", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length")
_KNOWN_FORMS = (
    "a tensor, a dict of tensors, an iterable or DataLoader of either, a list of texts, a datasets.Dataset, the path "
    "of a .txt, .jsonl or .parquet file, or the name of a hub data set ('name', 'name:config' or 'name:config:split')"
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
class _Source:
    """Where rows come from: a name for the report, and a function that starts reading from the beginning."""

    name: str
    kind: str
    rows: Callable[[], Iterator[_Row]]
    once: bool = False
    facts: dict[str, object] = field(default_factory=dict)


@final
class CalibrationData:
    """Batches of calibration inputs, read as they are asked for; made by :func:`calibration_batches`.

    Iterating gives dicts of tensors named by the program's inputs. It can be iterated again, unless it was made from a
    generator, which can be read only once.
    """

    def __init__(self, source: _Source, input_names: tuple[str, ...], *, num_sequences: int | None, batch_size: int) -> None:
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
        waiting: list[_Row] = []
        for row in rows:
            if waiting and (len(waiting) == self._batch_size or _signature(row) != _signature(waiting[0])):
                yield self._batch(waiting)
                waiting = []
            waiting.append(row)
        if waiting:
            yield self._batch(waiting)

    def _batch(self, rows: list[_Row]) -> CalibrationBatch:
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        valid_BT = None
        mask_BT = tensors.get(_MASK)
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
    text_column: str | None = "text",
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
            strings, or one string with a line break in it), a ``datasets.Dataset`` or ``IterableDataset`` with
            tokenized columns or a text column, the path of a .txt, .jsonl or .parquet file or of a data set's folder,
            or the name of a hub data set: ``name``, ``name:config`` or ``name:config:split`` (``name::split`` leaves
            the config out; the split is "train" if not said).
        input_names: The program's input names.
        tokenizer: Needed for text.
        num_sequences: At most so many sequences are used, from any source; None takes all there are.
        context: Tokens in a sequence made from text.
        batch_size: Sequences in a batch.
        seed: Chooses where in the text or in which rows the sequences lie.
        text_column: The column that holds text; None if the data is tokenized.
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
        input_names=tuple(input_names),
        tokenizer=tokenizer,
        num_sequences=num_sequences,
        context=context,
        seed=seed,
        text_column=text_column,
        vocab_size=vocab_size,
    )
    return CalibrationData(reader.source(calibration), tuple(input_names), num_sequences=num_sequences, batch_size=batch_size)


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


def _signature(row: _Row) -> tuple[tuple[str, torch.Size, torch.dtype, torch.device], ...]:
    return tuple((name, value.shape, value.dtype, value.device) for name, value in row.items())


def _spread_order(count: int, seed: int) -> Iterator[int]:
    """Visit 0..count-1 each once, so that any number of first visits lies evenly over the whole."""
    if count < 1:
        return
    step = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, count) != 1:
        step += 1
    start = int(torch.randint(count, (1,), generator=torch.Generator().manual_seed(seed)))
    for index in range(count):
        yield (start + index * step) % count


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """The settings of one call, and a method for each form of data."""

    input_names: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase | None"
    num_sequences: int | None
    context: int
    seed: int
    text_column: str | None
    vocab_size: int | None

    # Which form is it?

    def source(self, calibration: object) -> _Source:
        if isinstance(calibration, str):
            return self._from_string(calibration)
        if isinstance(calibration, Path):
            return self._from_path(calibration, str(calibration))
        if isinstance(calibration, (Tensor, np.ndarray)):
            return _Source(name=f"shape {list(calibration.shape)}", kind="tensor", rows=lambda: self._rows([calibration]))
        if (datasets := sys.modules.get("datasets")) is not None:
            if isinstance(calibration, datasets.DatasetDict | datasets.IterableDatasetDict):
                raise SparsepassError(
                    f"calibration is a data set with the splits {', '.join(calibration)}: choose one, such as "
                    f"data[{next(iter(calibration), 'train')!r}]"
                )
            if isinstance(calibration, datasets.Dataset | datasets.IterableDataset):
                return self._from_dataset(calibration, type(calibration).__name__)
        if isinstance(calibration, Mapping):
            return _Source(name=", ".join(map(str, calibration)), kind="dict", rows=lambda: self._rows([calibration]))
        if isinstance(calibration, torch.utils.data.Dataset) and not isinstance(calibration, Iterable):
            length = len(calibration)  # type: ignore[arg-type]  # a map-style data set has a length
            items: Any = calibration
            return _Source(
                name=type(calibration).__name__,
                kind="torch data set",
                rows=lambda: self._dataset_rows(self._named(items[index]) for index in range(length)),
            )
        if isinstance(calibration, Iterable):
            return self._from_iterable(calibration)
        raise SparsepassError(f"calibration of type {type(calibration).__name__} is not understood; expected {_KNOWN_FORMS}")

    def _from_string(self, text: str) -> _Source:
        if "\n" in text:
            return self._from_text(text.encode(), "text given in memory", "text")
        path = locate(text, what="calibration", forms=_KNOWN_FORMS)
        return self._from_hub(text) if path is None else self._from_path(path, text)

    def _from_path(self, path: Path, name: str) -> _Source:
        kind = path_kind(path, name, what="calibration", forms=_KNOWN_FORMS)
        if kind == "folder":
            return self._from_hub(name)
        if kind == "jsonl":
            return self._from_records(lambda: _jsonl_records(path, self.seed), name, ".jsonl file", "rows spread evenly")
        if kind == "parquet":
            return self._from_records(lambda: _parquet_records(path, self.seed), name, ".parquet file", "rows spread evenly")
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._from_text(data, name, "text file")

    def _from_hub(self, text: str) -> _Source:
        return self._from_dataset(load_data_set(text, what="calibration", streaming=True), text)

    def _from_dataset(self, data: Any, name: str) -> _Source:
        import datasets

        if isinstance(data, datasets.Dataset):
            if len(data) == 0:
                raise SparsepassError(f"calibration data is empty: data set {name} has no rows")
            return self._from_records(
                lambda: (data[index] for index in _spread_order(len(data), self.seed)),
                name,
                "data set",
                "rows spread evenly",
            )
        return self._from_records(lambda: iter(data), name, "streamed data set", "first rows, in order")

    def _from_iterable(self, items: Iterable[object]) -> _Source:
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
            facts = self._text_facts("first texts, in order")
            return _Source(name=kind, kind="texts", rows=lambda: self._pack(self._strings(read())), once=once, facts=facts)
        if isinstance(items, (list, tuple)) and isinstance(first, (int, float)):
            return _Source(name="list of numbers", kind="list", rows=lambda: self._rows([torch.as_tensor(items)]))
        return _Source(name=kind, kind=kind, rows=lambda: self._rows(read()), once=once)

    def _strings(self, items: Iterable[object]) -> Iterator[str]:
        for index, item in enumerate(items):
            if not isinstance(item, str):
                raise SparsepassError(
                    f"calibration mixes texts with {type(item).__name__} (item {index}); pass only texts, or only tensors"
                )
            yield item

    # Tensors

    def _rows(self, items: Iterable[object]) -> Iterator[_Row]:
        for index, item in enumerate(items):
            batch = self._checked(self._named(item), f"item {index}")
            yield from _split(batch)

    def _dataset_rows(self, records: Iterable[Mapping[str, object]]) -> Iterator[_Row]:
        for index, record in enumerate(records):
            where = f"row {index}"
            row = {
                name: _as_tensor(name, value, where)[None]
                for name, value in record.items()
                if value is not None and (name in self.input_names or name == _MASK)
            }
            yield self._checked(row, where)

    def _named(self, item: object) -> Mapping[str, object]:
        if isinstance(item, Mapping):
            return item
        if isinstance(item, (list, tuple)):
            if item and isinstance(item[0], (Tensor, np.ndarray)):
                if len(item) > len(self.input_names):
                    raise SparsepassError(
                        f"calibration gives {len(item)} tensors at a time, and the program has only the inputs "
                        f"{', '.join(self.input_names)}; give dicts of tensors by name instead"
                    )
                if len(item) == 1:
                    return {self._primary(): item[0]}
                return dict(zip(self.input_names, item, strict=False))
            if item and isinstance(item[0], (int, float)):
                return {self._primary(): torch.as_tensor(item)[None]}
        if isinstance(item, (Tensor, np.ndarray)):
            return {self._primary(): item}
        raise SparsepassError(
            f"calibration gives an item of type {type(item).__name__}; expected a tensor, or a dict of tensors named "
            f"by the program's inputs ({', '.join(self.input_names)})"
        )

    def _primary(self) -> str:
        return next((name for name in _PRIMARY_INPUTS if name in self.input_names), self.input_names[0])

    def _checked(self, item: Mapping[str, object], where: str) -> _Row:
        """Check one batch and bring it into the order of the program's inputs; ``attention_mask`` stays if it came."""
        batch: _Row = {}
        for name, value in item.items():
            if name not in self.input_names and name != _MASK:
                if name in _IGNORED or (name == "token_type_ids" and not _as_tensor(name, value, where).any()):
                    continue
                near = closest(name, self.input_names)
                raise SparsepassError(
                    f"calibration {where} has {name!r}, which is not an input of the program; its inputs are "
                    f"{', '.join(self.input_names)}{f'; did you mean {near!r}?' if near else ''}"
                )
            batch[name] = self._checked_tensor(name, _as_tensor(name, value, where), where)
        if not batch:
            raise SparsepassError(
                f"calibration {where} has none of the program's inputs ({', '.join(self.input_names)}); it has "
                f"{', '.join(map(str, item)) or 'nothing'}"
            )
        self._fill(batch, where)
        self._check_mask(batch, where)
        order = [name for name in self.input_names if name in batch]
        lengths = {name: batch[name].shape[0] for name in order}
        if len(set(lengths.values())) > 1:
            raise SparsepassError(
                f"calibration {where} has inputs with different first dimensions {lengths}; every input has the batch first"
            )
        return {name: batch[name] for name in dict.fromkeys([*order, *batch])}

    def _checked_tensor(self, name: str, value: Tensor, where: str) -> Tensor:
        shape = list(value.shape)
        if name in _ID_INPUTS:
            if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype is torch.bool:
                raise SparsepassError(
                    f"calibration {where}: {name} has to hold integer token ids, and is {value.dtype} of shape {shape}"
                    + self._hint_for(value)
                )
            if value.dim() != 2:
                hint = "; give it a batch dimension with ids[None]" if value.dim() == 1 else self._hint_for(value)
                raise SparsepassError(
                    f"calibration {where}: {name} has to be of shape [batch, tokens], and is of shape {shape}{hint}"
                )
            if value.shape[1] == 0:
                raise SparsepassError(f"calibration {where}: {name} is of shape {shape} and so holds no tokens")
            if value.numel() and int(value.min()) < 0:
                raise SparsepassError(
                    f"calibration {where}: {name} holds the negative id {int(value.min())}; token ids count from 0 "
                    "(padding is told by attention_mask, not by -100)"
                )
            if self.vocab_size is not None and value.numel() and int(value.max()) >= self.vocab_size:
                raise SparsepassError(
                    f"calibration {where}: {name} holds the id {int(value.max())}, and the model's vocabulary has "
                    f"{self.vocab_size}; was another model's tokenizer used?"
                )
            return value.long()
        if name == "pixel_values" and (not value.dtype.is_floating_point or value.dim() not in (4, 5)):
            raise SparsepassError(
                f"calibration {where}: pixel_values has to be floating-point of shape [batch, channels, height, "
                f"width], and is {value.dtype} of shape {shape}; the model's image processor makes it so"
            )
        if value.dim() == 0:
            raise SparsepassError(f"calibration {where}: {name} is a single number; every input has the batch first")
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise SparsepassError(f"calibration {where}: {name} holds NaN or Inf")
        return value

    def _hint_for(self, value: Tensor) -> str:
        if value.dim() == 4:
            return f"; it looks like pixel values, but the program's inputs are {', '.join(self.input_names)}"
        return ""

    def _fill(self, batch: _Row, where: str) -> None:
        ids_BT = batch.get("input_ids")
        for name in self.input_names:
            if name in batch:
                continue
            if ids_BT is not None and name == _MASK:
                batch[name] = torch.ones_like(ids_BT)
            elif ids_BT is not None and name == "token_type_ids":
                batch[name] = torch.zeros_like(ids_BT)
            else:
                raise SparsepassError(
                    f"calibration {where} lacks the program's input {name!r}; it has {', '.join(batch)}. Give dicts "
                    f"with all of {', '.join(self.input_names)}"
                )

    def _check_mask(self, batch: _Row, where: str) -> None:
        mask_BT, ids_BT = batch.get(_MASK), batch.get("input_ids")
        if mask_BT is None or ids_BT is None:
            return
        if mask_BT.shape != ids_BT.shape:
            raise SparsepassError(
                f"calibration {where}: attention_mask is of shape {list(mask_BT.shape)} and input_ids of shape "
                f"{list(ids_BT.shape)}; they have to be equal"
            )
        if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
            raise SparsepassError(f"calibration {where}: attention_mask may hold only 0 (padding) and 1")
        if ids_BT.shape[0] and not bool(mask_BT.bool().any(dim=1).all()):
            raise SparsepassError(f"calibration {where}: a sequence is all padding (its attention_mask is all 0)")

    # Records: rows of a data set or file

    def _from_records(
        self, records: Callable[[], Iterator[Mapping[str, object]]], name: str, kind: str, selection: str
    ) -> _Source:
        first = next(records(), None)
        if first is None:
            raise SparsepassError(f"calibration data is empty: {kind} {name} has no rows")
        if any(column in self.input_names for column in first):
            facts: dict[str, object] = {"selection": selection, "seed": self.seed}
            return _Source(name=name, kind=kind, rows=lambda: self._dataset_rows(records()), facts=facts)
        if self.text_column is None or self.text_column not in first:
            raise SparsepassError(
                f"calibration {kind} {name} has the columns {', '.join(map(str, first))}: neither an input of the "
                f"program ({', '.join(self.input_names)}) nor the text column {self.text_column!r}; name it with "
                "text_column"
            )
        self._check_text_possible(name)
        column = self.text_column

        def texts() -> Iterator[str]:
            for index, record in enumerate(records()):
                value = record.get(column)
                if value is not None and not isinstance(value, str):
                    raise SparsepassError(
                        f"calibration {kind} {name}, row {index}: column {column!r} holds {type(value).__name__}, not text"
                    )
                if value:
                    yield value

        return _Source(name=name, kind=kind, rows=lambda: self._pack(texts()), facts=self._text_facts(selection))

    # Text

    def _check_text_possible(self, name: str) -> "PreTrainedTokenizerBase":
        if "input_ids" not in self.input_names:
            raise SparsepassError(
                f"calibration {name} is text, and the program takes {', '.join(self.input_names)}; give tensors by these names"
            )
        if self.tokenizer is None:
            raise SparsepassError(
                f"calibration {name} is text, and there is no tokenizer to turn it into ids; pass tokenizer=..., or token ids"
            )
        return self.tokenizer

    def _text_facts(self, selection: str) -> dict[str, object]:
        tokenizer = self._check_text_possible("data")
        return {
            "context": self.context,
            "selection": selection,
            "seed": self.seed,
            "tokenizer": str(tokenizer.name_or_path),
        }

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        tokenizer = self._check_text_possible("data")
        before, after = special_frame(tokenizer)
        if len(before) + len(after) >= self.context:
            raise SparsepassError(
                f"context of {self.context} tokens leaves no room beside the tokenizer's {len(before) + len(after)} "
                "special tokens; choose a larger context"
            )
        return before, after

    def _tokens(self, text: str) -> list[int]:
        tokenizer = self._check_text_possible("data")
        # verbose=False: a text longer than the model's context is what is meant here, and not worth a warning.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _row(self, ids: list[int], before: list[int], after: list[int]) -> _Row:
        return self._checked({"input_ids": torch.tensor([[*before, *ids, *after]])}, "text")

    def _too_short(self, num_tokens: int, num_body: int) -> SparsepassError:
        return SparsepassError(
            f"calibration text is too short: it has {num_tokens} tokens, and one sequence of context {self.context} "
            f"needs {num_body}; give more text or a smaller context"
        )

    def _pack(self, texts: Iterator[str]) -> Iterator[_Row]:
        """Join texts (a blank line between) into full sequences, tokenizing one text at a time."""
        before, after = self._frame()
        num_body = self.context - len(before) - len(after)
        waiting: list[int] = []
        num_made = 0
        for text in texts:
            waiting.extend(self._tokens(text + "\n\n"))
            start = 0
            while len(waiting) - start >= num_body:
                yield self._row(waiting[start : start + num_body], before, after)
                start += num_body
                num_made += 1
            del waiting[:start]
        if num_made == 0:
            raise self._too_short(len(waiting), num_body)

    def _from_text(self, data: bytes | mmap.mmap, name: str, kind: str) -> _Source:
        self._check_text_possible(name)
        facts = self._text_facts("spread evenly over the text") | {"text_bytes": len(data)}
        return _Source(name=name, kind=kind, rows=lambda: self._text_rows(data, name), facts=facts)

    def _text_rows(self, data: bytes | mmap.mmap, name: str) -> Iterator[_Row]:
        before, after = self._frame()
        num_body = self.context - len(before) - len(after)
        sequences = self._spots(data, num_body, name)
        if sequences is None:
            ids = self._tokens(_decode(data, 0, len(data), name))
            num_full = len(ids) // num_body
            if num_full == 0:
                raise self._too_short(len(ids), num_body)
            num_taken = min(num_full, self.num_sequences or num_full)
            starts = [index * num_full // num_taken * num_body for index in range(num_taken)]
            sequences = (ids[start : start + num_body] for start in starts)
        for sequence in sequences:
            yield self._row(sequence, before, after)

    def _spots(self, data: bytes | mmap.mmap, num_body: int, name: str) -> Iterator[list[int]] | None:
        """Take one sequence from each of ``num_sequences`` equal parts of the text; None if a part may be too short."""
        if self.num_sequences is None:
            return None
        middle = len(data) // 2
        sample = _decode(data, max(0, middle - 8192), middle + 8192, name)
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
                    ids = self._tokens(_decode(data, start, stop, name))
                    if len(ids) > num_body:  # more than needed: the last token may be a word cut in two
                        break
                else:
                    # An unusually dense stretch: begin at the part's start, and go as far as it takes.
                    ids = self._tokens(_decode(data, index * part, min(len(data), end + num_bytes), name))
                if len(ids) >= num_body:
                    yield ids[:num_body]

        return read()


def _split(batch: _Row) -> Iterator[_Row]:
    num_rows = next(iter(batch.values())).shape[0]
    for index in range(num_rows):
        yield {name: value[index : index + 1] for name, value in batch.items()}


def _as_tensor(name: str, value: object, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise SparsepassError(
            f"calibration {where}: {name} of type {type(value).__name__} is not a tensor and cannot be made one "
            f"({first_line(error)}); pad sequences to one length, with an attention_mask that says where"
        ) from error


def _decode(data: bytes | mmap.mmap, start: int, stop: int, name: str) -> str:
    """Return the text between two byte offsets, from the first word boundary (or character) after ``start``."""
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
            raise SparsepassError(
                f"calibration text {name} is not UTF-8 (byte {start + error.start}: {error.reason}); convert it, for "
                "example with `iconv -t UTF-8`"
            ) from error
        text = piece[: error.start].decode()
    return text.replace("\r\n", "\n")


def _jsonl_records(path: Path, seed: int) -> Iterator[Mapping[str, object]]:
    with path.open("rb") as file:
        offsets = []
        position = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append((number, position))
            position += len(line)
        for index in _spread_order(len(offsets), seed):
            number, position = offsets[index]
            file.seek(position)
            try:
                record = json.loads(file.readline())
            except ValueError as error:
                raise SparsepassError(f"calibration file {path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise SparsepassError(
                    f"calibration file {path}, line {number} holds a {type(record).__name__}; expected an object such "
                    "as "
                    '{"text": "..."}'
                )
            yield record


def _parquet_records(path: Path, seed: int) -> Iterator[Mapping[str, object]]:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets; has no type information
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise SparsepassError(f"calibration file {path} is not a readable parquet file: {first_line(error)}") from error
    with file:
        for group in _spread_order(file.num_row_groups, seed):
            table = file.read_row_group(group)
            for index in _spread_order(table.num_rows, seed):
                yield table.slice(index, 1).to_pylist()[0]
