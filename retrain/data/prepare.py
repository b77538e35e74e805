"""From an opened source to its tokens: a table that is made once, or a stream that is read as it goes."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from sparsepass.graph.support import SparsepassError
from sparsepass.passes.data import text_pieces
from sparsepass.retrain.data.sequences import Shape
from sparsepass.retrain.data.sources import Source
from sparsepass.retrain.data.stream import Encode, Place, TokenStream, readable
from sparsepass.retrain.data.tokens import (
    IDS,
    LABELS,
    MASK,
    Columns,
    Encoder,
    Part,
    TokenTable,
    check_part,
    hash_columns,
    padded,
    part_of_rows,
    parts_of_arrow,
    without_padding,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text files are tokenized in batches of so many pieces.
_PIECES = 8
_ROWS = 256


@final
@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source's tokens.

    Args:
        source: Where they come from.
        shape: How they become sequences.
        names: The columns of a sequence.
        table: All of them; None if they are streamed.
        stream: The ``datasets.IterableDataset``; None if there is a table.
        encode: Turns the stream's rows into tokens.
        fingerprint: Tells whether a source is the same.
        facts: For the report.
    """

    source: Source
    shape: Shape
    names: tuple[str, ...]
    table: TokenTable | None
    stream: Any
    encode: Encode | None
    fingerprint: str
    facts: dict[str, object] = field(default_factory=dict)

    def open_stream(self, place: Place) -> TokenStream:
        """Read the stream from a place on."""
        assert self.encode is not None
        return TokenStream(self.stream, self.encode, place, self.source.name)

    @property
    def num_sequences(self) -> int:
        """Sequences of a table."""
        assert self.table is not None
        return len(self.table) // self.shape.num_body if self.shape.packing else len(self.table.lengths)


@final
@dataclass(frozen=True, kw_only=True)
class _Settings:
    tokenizer: "PreTrainedTokenizerBase | None"
    text_column: str
    context: int
    packing: bool
    vocab_size: int | None
    what: str


def prepare(
    source: Source,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    text_column: str,
    context: int,
    packing: bool,
    streaming: bool,
    vocab_size: int | None,
    what: str,
) -> Prepared:
    """Tokenize a source, or make ready to.

    Args:
        source: What was opened.
        tokenizer: Needed for text.
        text_column: The column that holds text, unless there is one of ``input_ids``.
        context: Tokens of a sequence.
        packing: Whether rows are joined and cut into full sequences.
        streaming: Whether text files are streamed.
        vocab_size: Token ids have to be below it, if given.
        what: For messages.

    Raises:
        SparsepassError: If it is empty, too short for a sequence, of the wrong columns or types, outside the vocabulary,
            or text without a tokenizer.
    """
    import datasets

    settings = _Settings(
        tokenizer=tokenizer,
        text_column=text_column,
        context=context,
        packing=packing,
        vocab_size=vocab_size,
        what=f"{what} {source.name}",
    )
    data = source.data
    if source.texts and streaming:
        # One shard for each file.
        data = datasets.IterableDataset.from_generator(
            text_pieces, gen_kwargs={"files": list(source.texts), "what": what}, features=_piece_features()
        )
    if isinstance(data, datasets.IterableDataset):
        return _stream(source, data, settings)
    return _table(source, settings)


def _piece_features() -> Any:
    import datasets

    return datasets.Features(
        {"text": datasets.Value("string"), "begins": datasets.Value("bool"), "ends": datasets.Value("bool")}
    )


# Tables


def _table(source: Source, settings: _Settings) -> Prepared:
    encoder = None
    if isinstance(source.data, np.ndarray):
        ids = source.data.reshape(len(source.data), -1) if source.data.size else np.empty((0, 1), np.int32)
        if source.data.ndim == 1:
            ids = ids.reshape(1, -1)
        parts: Iterator[Part] = iter([part_of_rows({IDS: list(ids)}, settings.what)])
    elif source.texts:
        encoder = _encoder(settings)
        if not settings.packing:
            raise SparsepassError(
                f"{settings.what} is made of text files, each one long text, and packing=False keeps every row apart; use "
                "packing=True, or a .jsonl file with one text a line"
            )
        parts = _text_parts(source.texts, encoder, settings)
    else:
        columns = source.data.column_names
        if not len(source.data):
            raise SparsepassError(f"{settings.what} is empty: it has no rows")
        if IDS in columns:
            tokenized = source.data.select_columns([name for name in (IDS, LABELS, MASK) if name in columns])
            if tokenized._indices is not None:
                tokenized = tokenized.flatten_indices()
        else:
            encoder = _encoder(settings)
            tokenized = _tokenized(source.data, encoder, settings, columns)
        parts = parts_of_arrow(tokenized.data.table, settings.what)
    table = TokenTable(_finished(parts, settings))
    shape = _shape(settings, encoder)
    prepared = Prepared(
        source=source,
        shape=shape,
        names=_names(table.names, settings),
        table=table,
        stream=None,
        encode=None,
        fingerprint=table.fingerprint(),
        facts=_facts(settings, encoder),
    )
    if prepared.num_sequences == 0:
        raise _too_short(len(table), settings, shape)
    prepared.facts.update(num_sequences_in_source=prepared.num_sequences, num_tokens_in_source=len(table))
    if not source.texts and not isinstance(source.data, np.ndarray):
        counts = {"num_read": len(table.lengths) + table.num_empty, "num_empty": table.num_empty}
        cut = {} if settings.packing else {"num_truncated": int((table.lengths > settings.context).sum())}
        prepared.facts["rows"] = counts | cut
    return prepared


def _finished(parts: Iterator[Part], settings: _Settings) -> Iterator[Part]:
    for part in parts:
        check_part(part, vocab_size=settings.vocab_size, what=settings.what)
        yield without_padding(part) if settings.packing else part


def _text_parts(files: Sequence[str], encoder: Encoder, settings: _Settings) -> Iterator[Part]:
    rows: list[Mapping[str, Any]] = []
    for row in text_pieces(files, settings.what):
        rows.append(row)
        if len(rows) == _PIECES:
            yield _text_part(rows, encoder, settings, "text", pieces=True)
            rows = []
    yield _text_part(rows, encoder, settings, "text", pieces=True)


def _tokenized(data: Any, encoder: Encoder, settings: _Settings, columns: Sequence[str]) -> Any:
    """Tokenize a data set's texts, once: the result lies in its cache, if it has one."""
    import datasets
    from datasets.fingerprint import Hasher

    column = _text_column(columns, settings)

    def encode(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        found = encoder.encode(rows[column], first_row=indices[0])
        return {IDS: found if settings.packing else _framed(found, encoder)}

    # datasets would hash the tokenizer as it is pickled, which changes as it is used.
    facts = (data._fingerprint, encoder.fingerprint, column, settings.packing, "sparsepass tokens 1")
    return data.select_columns([column]).map(
        encode,
        with_indices=True,
        batched=True,
        batch_size=_ROWS,
        remove_columns=[column],
        features=datasets.Features({IDS: datasets.Sequence(datasets.Value("int32"))}),
        new_fingerprint=Hasher.hash(facts),
        desc="Tokenizing",
    )


# Streams


def _stream(source: Source, data: Any, settings: _Settings) -> Prepared:
    first = next(readable(copy.copy(data), settings.what), None)
    if first is None:
        raise SparsepassError(f"{settings.what} is empty: it has no rows")
    if source.texts and not settings.packing:
        raise SparsepassError(
            f"{settings.what} is made of text files, each one long text, and packing=False keeps every row apart; use "
            "packing=True, or a .jsonl file with one text a line"
        )
    encoder = None if IDS in first else _encoder(settings)
    column = "" if encoder is None else _text_column(list(first), settings) if not source.texts else "text"
    facts = _facts(settings, encoder)
    shape = _shape(settings, encoder)

    # Counted as they are read, and again if they are read again.
    counts = {"num_read": 0, "num_empty": 0} | ({} if settings.packing else {"num_truncated": 0})
    if not source.texts:
        facts["rows"] = counts

    def encode(rows: Sequence[Mapping[str, Any]]) -> Part:
        if encoder is None:
            names = [name for name in (IDS, LABELS, MASK) if name in first]
            part = part_of_rows({name: [row.get(name) for row in rows] for name in names}, settings.what)
        else:
            part = _text_part(rows, encoder, settings, column, pieces=bool(source.texts))
        check_part(part, vocab_size=settings.vocab_size, what=settings.what)
        counts["num_read"] += len(part.lengths)
        if not settings.packing:
            counts["num_truncated"] += int((part.lengths > settings.context).sum())
        counts["num_empty"] += int((part.lengths == 0).sum())
        return without_padding(part) if settings.packing else padded(part, settings.context, shape.pad_id)

    sequence = TokenStream(data, encode, Place(), settings.what).read(shape.num_body)
    if len(sequence[IDS]) < shape.num_body:
        raise _too_short(len(sequence[IDS]), settings, shape)
    return Prepared(
        source=source,
        shape=shape,
        names=_names(tuple(sequence), settings),
        table=None,
        stream=data,
        encode=encode,
        fingerprint=hash_columns(sequence),
        facts=facts,
    )


# What both need


def _encoder(settings: _Settings) -> Encoder:
    if settings.tokenizer is None:
        raise SparsepassError(
            f"{settings.what} is text, and there is no tokenizer to turn it into ids; pass tokenizer=..., or rows with {IDS}"
        )
    return Encoder(tokenizer=settings.tokenizer, what=settings.what)


def _text_column(columns: Sequence[str], settings: _Settings) -> str:
    if settings.text_column not in columns:
        raise SparsepassError(
            f"{settings.what} has the columns {', '.join(columns) or '(none)'}: neither {IDS} nor the text column "
            f"{settings.text_column!r}; name it with text_column"
        )
    return settings.text_column


def _text_part(rows: Sequence[Mapping[str, Any]], encoder: Encoder, settings: _Settings, column: str, *, pieces: bool) -> Part:
    found = encoder.encode_pieces(rows) if pieces else encoder.encode([row.get(column) for row in rows])
    return part_of_rows({IDS: found if settings.packing else _framed(found, encoder)}, settings.what)


def _framed(found: list[Any], encoder: Encoder) -> list[Any]:
    before = np.asarray(encoder.before, dtype=np.int32)
    return [np.concatenate([before, ids]) if len(ids) else ids for ids in found]


def _shape(settings: _Settings, encoder: Encoder | None) -> Shape:
    before = () if encoder is None or not settings.packing else tuple(encoder.before)
    if len(before) >= settings.context:
        raise SparsepassError(
            f"context of {settings.context} tokens leaves no room beside the tokenizer's {len(before)} special tokens; "
            "choose a larger context"
        )
    tokenizer = settings.tokenizer
    pad_id = 0 if tokenizer is None else tokenizer.pad_token_id
    if tokenizer is not None and pad_id is None:
        pad_id = tokenizer.eos_token_id
    return Shape(context=settings.context, packing=settings.packing, before=before, pad_id=int(pad_id or 0))


def _names(columns: tuple[str, ...], settings: _Settings) -> tuple[str, ...]:
    return columns if settings.packing else tuple(dict.fromkeys([*columns, MASK]))


def _facts(settings: _Settings, encoder: Encoder | None) -> dict[str, object]:
    facts: dict[str, object] = {"context": settings.context, "packing": settings.packing}
    if encoder is not None:
        facts |= {
            "tokenizer": str(encoder.tokenizer.name_or_path),
            "document_end_token": encoder.tokenizer.eos_token,
            "sequence_start_tokens": encoder.before if settings.packing else [],
        }
    return facts


def _too_short(num_tokens: int, settings: _Settings, shape: Shape) -> SparsepassError:
    if not settings.packing:
        return SparsepassError(f"{settings.what} is empty: none of its rows has a token")
    return SparsepassError(
        f"{settings.what} is too short: it has {num_tokens} tokens, and one sequence of context {settings.context} needs "
        f"{shape.num_body}; give more text or a smaller context"
    )


def sequences_of(columns: Columns, shape: Shape) -> list[Columns]:
    """Cut flat columns into framed sequences; what is left over is dropped."""
    size = shape.num_body
    return [
        shape.framed({name: values[at * size : (at + 1) * size] for name, values in columns.items()})
        for at in range(len(columns[IDS]) // size)
    ]
