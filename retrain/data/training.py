"""Training data: whatever a user brings, as sequences in one global order, resumable in place, with a validation split.

Rules:
1. Text is tokenized, each document followed by the tokenizer's EOS (by nothing, if it has none), joined, and cut into full
   sequences of ``context`` tokens. Nothing is dropped but the last partial sequence. A text file is one document. Where
   the tokenizer itself puts tokens before a text (BOS), every sequence begins with them, as in calibration and evaluation.
2. Sequences have one order, whatever the number of processes: each process takes the same number and makes its own rows.
3. A table is visited in an order drawn anew for each epoch, so that any part of an epoch is spread over all of the data. A
   stream is put into order block by block (``shuffle_buffer`` sequences). Where the data ends, the next epoch begins.
4. What is held out for validation is taken out before any shuffling: from a table sequences spread evenly over it, from a
   stream its first ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np

from sparsepass.graph.support import SparsepassError
from sparsepass.retrain.data.prepare import PreparedTokens, prepare
from sparsepass.retrain.data.sequences import Batch, Reading, Sequences, TableSequences, batch_of, cut, spread, table_sequence
from sparsepass.retrain.data.sources import FORMS, DataConfig, open_source
from sparsepass.retrain.data.stream import Place, StreamBlock, StreamedSequences, TokenStream
from sparsepass.retrain.data.tokens import IDS, Columns, hash_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAINING, _BESIDE, _VALIDATION = "training data", "data beside it", "validation data"


@final
@dataclass(frozen=True)
class TrainingData:
    """Training sequences and validation sequences; made by :func:`open_data`.

    Args:
        train: The training sequences, at a position of their own.
        train_facts: For the report.
        validation: The validation sequences, always the same; None if there are none.
        validation_facts: For the report.
    """

    train: Sequences
    train_facts: Mapping[str, object]
    validation: Batch | None = None
    validation_facts: Mapping[str, object] | None = None

    @property
    def unpadded(self) -> int | None:
        """The length of every sequence, training and validation, where none has padding; else None."""
        padded = not self.train.shape.packing or (self.validation is not None and self.validation.attention_mask is not None)
        return None if padded else self.train.shape.context

    @property
    def notes(self) -> list[str]:
        """What the user should know before the training: rows that have no text."""
        found = []
        for what, facts in ((_TRAINING, self.train_facts), (_BESIDE, self.train_facts.get("mixed_in"))):
            rows = facts.get("rows") if isinstance(facts, Mapping) else None
            if isinstance(rows, Mapping) and rows["num_empty"]:
                found.append(
                    f"{what}: {rows['num_empty']} of {rows['num_read']} rows read hold no text or tokens, and are left out"
                )
        return found

    def describe(self) -> dict[str, object]:
        """Return what was used, for the report.

        Returns:
            JSON-ready facts of ``train`` and ``validation`` (None without any): source and kind, how it was made into
            sequences, how many there are (None for a stream not yet read to its end), how many sequences and tokens have
            been taken, and how many epochs that is. Where it has rows, ``rows`` tells how many were read, left out as empty
            and, if they are kept apart, cut to the context.
        """
        train = self.train
        length = train.num_sequences
        return {
            "train": {
                **self.train_facts,
                "num_sequences": length,
                "num_sequences_taken": train.position,
                "num_tokens_taken": train.num_tokens,
                "epochs": None if length is None else train.position / length,
            },
            "validation": self.validation_facts,
        }


def open_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    source: object = None,
    validation: object = None,
    vocab_size: int | None = None,
    max_context: int | None = None,
) -> TrainingData:
    """Open training data and what it is validated on.

    Args:
        config: What to read, and how.
        tokenizer: Needed for text.
        source: A Python object instead of ``config.source``: a ``datasets.Dataset`` or ``IterableDataset``, a list of texts,
            a list of rows such as ``{"input_ids": [...], "labels": [...]}``, or a tensor of token ids, [tokens] or
            [sequences, tokens]; or a path, or a tuple of paths.
        validation: The same, instead of ``config.validation``.
        vocab_size: Token ids have to be below it, if given.
        max_context: The model's positions, if it has a limit.

    Returns:
        The data, at its beginning.

    Raises:
        SparsepassError: If a source is missing, empty, too short, of unknown form or columns, holds ids outside the
            vocabulary, is text without a tokenizer, is given as training and validation data both, or if the context is
            larger than the model's positions.

    Exactness: the same arguments give the same sequences, bitwise.

    Example:
        >>> import torch
        >>> config = DataConfig(context=4, validation=2, shuffle=False)
        >>> data = open_data(config, source=torch.arange(40).reshape(10, 4))
        >>> data.validation.places, data.train.take(3).places
        ([2, 7], [0, 1, 3])
        >>> data.train.take(2, rows=slice(1, 2)).input_ids.tolist()
        [[20, 21, 22, 23]]
    """
    if max_context is not None and config.context > max_context:
        raise SparsepassError(
            f"data: context is {config.context} tokens, and the model has positions for {max_context}; choose a context of at "
            f"most {max_context}"
        )
    wanted = config.source if source is None else source
    if wanted is None:
        raise SparsepassError(f"data: no source is given; expected {FORMS}")
    held_out = config.validation if validation is None else validation
    prepared = partial(prepare, config=config, tokenizer=tokenizer, vocab_size=vocab_size)
    train_source = open_source(wanted, config, _TRAINING)
    beside_source = None if config.beside is None else open_source(config.beside, config, _BESIDE)
    number, apart_source = None, None
    if isinstance(held_out, (int, float)):
        number = held_out
    elif held_out is not None:
        apart_source = open_source(held_out, config, _VALIDATION)
    for opened_one in (beside_source, train_source):
        if apart_source is not None and opened_one is not None and (both := opened_one.keys & apart_source.keys):
            raise _overlap(", ".join(sorted(both)))
    data = prepared(train_source, what=_TRAINING)
    beside = None if beside_source is None else prepared(beside_source, what=_BESIDE)
    if beside is not None:
        _check_beside(data, beside)
    found = _of_table(data, config, number, beside) if data.stream is None else _of_stream(data, config, number)
    if apart_source is None:
        return found
    apart = prepared(apart_source, what=_VALIDATION)
    for other in (data, beside):
        if other is not None and other.fingerprint == apart.fingerprint:
            raise _overlap(f"{other.source.name} and {apart_source.name}, which hold the same tokens")
    return _with_validation(found, apart, *_apart(apart, config), "a source of its own")


def _check_beside(data: PreparedTokens, beside: PreparedTokens) -> None:
    for one in (data, beside):
        if one.stream is not None:
            raise SparsepassError(f"data: {one.source.name} is streamed, and a source is mixed in (beside) with tables only")
    if data.names != beside.names:
        raise SparsepassError(
            f"data: {data.source.name} has the columns {', '.join(data.names)} and {beside.source.name}, which is mixed in, "
            f"{', '.join(beside.names)}; they have to be the same"
        )
    if data.fingerprint == beside.fingerprint:
        raise SparsepassError(
            f"data: {beside.source.name}, which is mixed in (beside), is the training source itself; leave it out"
        )


def _overlap(which: str) -> SparsepassError:
    return SparsepassError(
        f"data: the same source is given for training and for validation ({which}); give another for validation, or a fraction "
        "or a number of sequences, which are then held out"
    )


def _reading(
    data: PreparedTokens, config: DataConfig, num_held_out: int, mixture: Mapping[str, object] | None = None
) -> Reading:
    settings = {
        "data": data.fingerprint,
        "streamed": data.stream is not None,
        "context": config.context,
        "packing": config.packing,
        "sequences held out": num_held_out,
        "max_tokens": config.max_tokens,
        "shuffle": config.shuffle,
        "shuffle_buffer": config.shuffle_buffer if data.stream is not None else None,
        "seed": config.seed,
        **(mixture or {}),
    }
    seed = config.seed if config.shuffle else None
    return Reading(shape=data.shape, names=data.names, settings=settings, seed=seed, what=_TRAINING)


def _limit(config: DataConfig) -> int | None:
    if config.max_tokens is None:
        return None
    if config.max_tokens < config.context:
        raise SparsepassError(
            f"data: max_tokens is {config.max_tokens}, less than one sequence of {config.context} tokens; choose more, or a "
            "smaller context"
        )
    return config.max_tokens // config.context


def _of_table(
    data: PreparedTokens, config: DataConfig, held_out: int | float | None, beside: PreparedTokens | None
) -> TrainingData:
    assert data.table is not None
    total = data.num_sequences
    number = 0
    if isinstance(held_out, int):
        number = held_out
    elif held_out is not None:
        number = min(max(1, round(held_out * total)), config.validation_limit or total)
    if number >= total:
        raise SparsepassError(
            f"data: {number} sequences are to be held out for validation, and {data.source.name} has {total} of "
            f"{config.context} tokens; give more text, a smaller context, or validation=None"
        )
    held = spread(number, total) if number else np.empty(0, np.int64)
    places = np.setdiff1d(np.arange(total), held, assume_unique=True)
    table, limit = data.table, _limit(config)
    facts, mixture = _facts(data, config), None
    if beside is not None:
        assert beside.table is not None
        own, theirs = _mixture(len(places), beside.num_sequences, config.beside_share, limit)
        table = table.followed_by(beside.table, data.shape.num_body)
        first = -(-len(data.table) // data.shape.num_body)
        places = np.concatenate([places[spread(own, len(places))], first + spread(theirs, beside.num_sequences)])
        mixture = {"mixed in": beside.fingerprint, "its share": config.beside_share}
        facts["mixed_in"] = {"source": beside.source.name, "kind": beside.source.kind, "num_sequences": theirs, **beside.facts}
    elif limit is not None and limit < len(places):
        places = places[spread(limit, len(places))]
    train = TableSequences(table, places, _reading(data, config, number, mixture))
    found = TrainingData(train, facts)
    if not number:
        return found
    return _with_validation(found, data, _rows_of_table(data, held), held.tolist(), "held out, spread evenly")


def _mixture(own: int, theirs: int, share: float, limit: int | None) -> tuple[int, int]:
    """How many sequences of each of two sources make the largest mixture in which the second one has its share.

    >>> _mixture(1000, 100, 0.5, None), _mixture(1000, 100, 0.25, 200)
    ((100, 100), (150, 50))
    """
    whole = min(own / (1 - share), theirs / share, limit or float("inf"))
    found = max(1, round(whole * (1 - share))), max(1, round(whole * share))
    return min(found[0], own), min(found[1], theirs)


def _of_stream(data: PreparedTokens, config: DataConfig, held_out: int | float | None) -> TrainingData:
    if isinstance(held_out, float):
        raise SparsepassError(
            f"data: {data.source.name} is streamed, so that nobody knows how much {held_out} of it is; give validation as a "
            "number of sequences, such as 256 (its first ones are then held out), or as a source of its own"
        )
    assert data.encode is not None
    number = held_out or 0
    stream = data.open_stream(Place())
    held = _read_sequences(stream, number, data)
    start = stream.place
    first = stream.read(data.shape.num_body)
    if len(held) < number or len(first[IDS]) < data.shape.num_body:
        raise SparsepassError(
            f"data: {number} sequences are to be held out for validation, and {data.source.name} has no more than {len(held)} "
            f"of {config.context} tokens; give more text, a smaller context, or validation=None"
        )
    train = StreamedSequences(
        data.stream,
        data.encode,
        start=StreamBlock(epoch=0, first=number, place=start, check=hash_columns(first)),
        block=config.shuffle_buffer,
        limit=_limit(config),
        reading=_reading(data, config, number),
    )
    found = TrainingData(train, _facts(data, config))
    if not number:
        return found
    return _with_validation(found, data, held, list(range(number)), "held out, the first of the stream")


def _apart(data: PreparedTokens, config: DataConfig) -> tuple[list[Columns], list[int]]:
    """Return the sequences of a validation source, and their places."""
    limit = config.validation_limit
    if data.table is not None:
        total = data.num_sequences
        places = spread(min(limit or total, total), total)
        return _rows_of_table(data, places), places.tolist()
    if limit is None:
        raise SparsepassError(
            f"data: the validation source {data.source.name} is streamed and may have no end; set validation_limit"
        )
    sequences = _read_sequences(data.open_stream(Place()), limit, data)
    return sequences, list(range(len(sequences)))


def _read_sequences(stream: TokenStream, count: int, data: PreparedTokens) -> list[Columns]:
    size = data.shape.num_body
    return [data.shape.framed(body) for body in cut(stream.read(count * size), size)]


def _rows_of_table(data: PreparedTokens, places: Any) -> list[Columns]:
    assert data.table is not None
    return [table_sequence(data.table, data.shape, int(place)) for place in places]


def _facts(data: PreparedTokens, config: DataConfig) -> dict[str, object]:
    how = "in the order of the data"
    if config.shuffle:
        how = f"shuffled among {config.shuffle_buffer}" if data.stream is not None else "shuffled anew in each epoch"
    return {"source": data.source.name, "kind": data.source.kind, "order": how, "seed": config.seed, **data.facts}


def _with_validation(
    found: TrainingData, data: PreparedTokens, sequences: Sequence[Columns], places: list[int], how: str
) -> TrainingData:
    batch = batch_of(sequences, data.names, data.shape.context, list(range(len(places))), places)
    real = batch.attention_mask
    facts = {
        "source": data.source.name,
        "kind": data.source.kind,
        "chosen": how,
        "num_sequences": len(batch),
        "num_tokens": batch.input_ids.numel() if real is None else int(real.sum()),
    }
    return replace(found, validation=batch, validation_facts=facts)
