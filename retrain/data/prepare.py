"""From an opened source to its tokens: a table that is made once, or a stream that is read as it goes."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, final

import numpy as np

from sparsepass.graph.support import SparsepassError
from sparsepass.graph.texts import CHAT_COLUMN, TEXT_COLUMN
from sparsepass.passes.data import text_pieces
from sparsepass.retrain.data.sequences import Shape
from sparsepass.retrain.data.sources import DataConfig, Source
from sparsepass.retrain.data.stream import Encode, Place, TokenStream, readable
from sparsepass.retrain.data.tokens import (
    IDS,
    LABELS,
    MASK,
    Encoder,
    TokenRows,
    TokenTable,
    hash_columns,
    part_of_rows,
    parts_of_arrow,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text files are tokenized in batches of so many pieces.
_PIECES = 8
_ROWS = 256


@final
@dataclass(frozen=True, kw_only=True)
class PreparedTokens:
    """A source's tokens.

    Args:
        source: Where they come from.
        shape: How they become sequences.
        names: The columns of a sequence.
        fingerprint: Tells whether a source is the same.
        facts: For the report.
        table: All of them; None if they are streamed.
        stream: The ``datasets.IterableDataset``; None if there is a table.
        encode: Turns the stream's rows into tokens.
    """

    source: Source
    shape: Shape
    names: tuple[str, ...]
    fingerprint: str
    facts: dict[str, object]
    table: TokenTable | None = None
    stream: Any = None
    encode: Encode | None = None

    def open_stream(self, place: Place) -> TokenStream:
        """Read the stream from a place on."""
        assert self.encode is not None
        return TokenStream(self.stream, self.encode, place, self.source.name)

    @property
    def num_sequences(self) -> int:
        """Sequences of a table."""
        assert self.table is not None
        return len(self.table) // self.shape.num_body if self.shape.packing else len(self.table.lengths)


def prepare(
    source: Source, config: DataConfig, *, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int | None, what: str
) -> PreparedTokens:
    """Tokenize a source, or make ready to.

    Args:
        source: What was opened.
        config: How it is read.
        tokenizer: Needed for text.
        vocab_size: Token ids have to be below it, if given.
        what: For messages.

    Raises:
        SparsepassError: If it is empty, too short for a sequence, of the wrong columns or types, outside the vocabulary,
            or text without a tokenizer.
    """
    import datasets

    what = f"{what} {source.name}"
    if source.texts and not config.packing:
        raise SparsepassError(
            f"{what} is made of text files, each one long text, and packing=False keeps every row apart; use packing=True, or "
            "a .jsonl file with one text a line"
        )
    data, columns = source.data, ["text"] if source.texts else [IDS]
    if source.texts and config.streaming:
        features = {"text": datasets.Value("string"), "begins": datasets.Value("bool"), "ends": datasets.Value("bool")}
        # One shard for each file.
        data = datasets.IterableDataset.from_generator(
            text_pieces, gen_kwargs={"files": list(source.texts), "what": what}, features=datasets.Features(features)
        )
    if isinstance(data, datasets.IterableDataset):
        columns = list(next(readable(copy.copy(data), what), ()))
    elif isinstance(data, datasets.Dataset):
        columns = data.column_names if len(data) else []
    if not columns:
        raise SparsepassError(f"{what} is empty: it has no rows")
    job = _Preparation(source=source, config=config, tokenizer=tokenizer, columns=columns, vocab_size=vocab_size, what=what)
    return job.stream(data) if isinstance(data, datasets.IterableDataset) else job.table()


@dataclass(frozen=True, kw_only=True)
class _Preparation:
    """A source on its way to tokens."""

    source: Source
    config: DataConfig
    tokenizer: "PreTrainedTokenizerBase | None"
    columns: Sequence[str]
    vocab_size: int | None
    what: str

    @cached_property
    def encoder(self) -> Encoder | None:
        """What makes tokens of text; None where the source has tokens."""
        if IDS in self.columns:
            return None
        if self.tokenizer is None:
            raise SparsepassError(
                f"{self.what} is text, and there is no tokenizer to turn it into ids; pass tokenizer=..., or rows with {IDS}"
            )
        if not self.source.texts:
            _ = self.text_column  # complains of columns without one
        return Encoder(tokenizer=self.tokenizer, framed=not self.config.packing, what=self.what)

    @cached_property
    def text_column(self) -> str:
        """The column of texts or chats: the one that is named, or the chats in ``messages``."""
        names = [self.config.text_column, *([CHAT_COLUMN] if self.config.text_column == TEXT_COLUMN else [])]
        found = next((name for name in names if name in self.columns), None)
        if found is None:
            raise SparsepassError(
                f"{self.what} has the columns {', '.join(self.columns)}: neither {IDS} nor the text column "
                f"{' or '.join(map(repr, names))}; name it with text_column"
            )
        return found

    @cached_property
    def shape(self) -> Shape:
        """How the tokens become sequences."""
        context, packing, tokenizer = self.config.context, self.config.packing, self.tokenizer
        before = tuple(self.encoder.before) if self.encoder is not None and packing else ()
        if len(before) >= context:
            raise SparsepassError(
                f"context of {context} tokens leaves no room beside the tokenizer's {len(before)} special tokens; choose a "
                "larger context"
            )
        pad_id = None if tokenizer is None else tokenizer.pad_token_id
        if tokenizer is not None and pad_id is None:
            pad_id = tokenizer.eos_token_id
        return Shape(context=context, packing=packing, before=before, pad_id=int(pad_id or 0))

    def table(self) -> PreparedTokens:
        """Make all tokens."""
        packing = self.config.packing
        parts = (part.checked(vocab_size=self.vocab_size, what=self.what) for part in self._parts())
        table = TokenTable(part.without_padding() if packing else part for part in parts)
        facts = self._facts()
        prepared = PreparedTokens(
            source=self.source,
            shape=self.shape,
            names=table.names if packing else tuple(dict.fromkeys([*table.names, MASK])),
            fingerprint=table.fingerprint(),
            facts=facts,
            table=table,
        )
        if prepared.num_sequences == 0:
            raise self._too_short(len(table))
        facts |= {"num_sequences_in_source": prepared.num_sequences, "num_tokens_in_source": len(table)}
        if not self.source.texts and not isinstance(self.source.data, np.ndarray):
            counts = {"num_read": len(table.lengths) + table.num_empty, "num_empty": table.num_empty}
            cut = {} if packing else {"num_truncated": int((table.lengths > self.config.context).sum())}
            facts["rows"] = counts | cut
        return prepared

    def stream(self, data: Any) -> PreparedTokens:
        """Make ready to read the tokens; one sequence is read, to see whether the source is long enough."""
        config, facts = self.config, self._facts()
        # Counted as they are read, and again if they are read again.
        counts = {"num_read": 0, "num_empty": 0} | ({} if config.packing else {"num_truncated": 0})
        if not self.source.texts:
            facts["rows"] = counts

        def encode(rows: Sequence[Mapping[str, Any]]) -> TokenRows:
            part = self._part(rows).checked(vocab_size=self.vocab_size, what=self.what)
            counts["num_read"] += len(part.lengths)
            if not config.packing:
                counts["num_truncated"] += int((part.lengths > config.context).sum())
            counts["num_empty"] += int((part.lengths == 0).sum())
            return part.without_padding() if config.packing else part.padded(config.context, self.shape.pad_id)

        sequence = TokenStream(data, encode, Place(), self.what).read(self.shape.num_body)
        if len(sequence[IDS]) < self.shape.num_body:
            raise self._too_short(len(sequence[IDS]))
        return PreparedTokens(
            source=self.source,
            shape=self.shape,
            names=tuple(sequence),
            fingerprint=hash_columns(sequence),
            facts=facts,
            stream=data,
            encode=encode,
        )

    def _parts(self) -> Iterator[TokenRows]:
        data = self.source.data
        if self.source.texts:
            pieces = text_pieces(self.source.texts, self.what)
            while rows := list(islice(pieces, _PIECES)):
                yield self._part(rows)
        elif isinstance(data, np.ndarray):
            yield part_of_rows({IDS: [data] if data.ndim == 1 else list(data)}, self.what)
        elif self.encoder is not None:
            yield from parts_of_arrow(self._tokenized(data, self.encoder).data.table, self.what)
        else:
            rows_of_ids = data.select_columns([name for name in (IDS, LABELS, MASK) if name in self.columns])
            if rows_of_ids._indices is not None:
                rows_of_ids = rows_of_ids.flatten_indices()
            yield from parts_of_arrow(rows_of_ids.data.table, self.what)

    def _part(self, rows: Sequence[Mapping[str, Any]]) -> TokenRows:
        if self.encoder is None:
            names = [name for name in (IDS, LABELS, MASK) if name in self.columns]
            return part_of_rows({name: [row.get(name) for row in rows] for name in names}, self.what)
        if self.source.texts:
            return part_of_rows({IDS: self.encoder.encode_pieces(rows)}, self.what)
        return part_of_rows({IDS: self.encoder.encode([row.get(self.text_column) for row in rows])}, self.what)

    def _tokenized(self, data: Any, encoder: Encoder) -> Any:
        """Tokenize a data set's texts, once: the result lies in its cache, if it has one."""
        import datasets
        from datasets.fingerprint import Hasher

        column = self.text_column

        def encode(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
            return {IDS: encoder.encode(rows[column], first_row=indices[0])}

        # datasets would hash the tokenizer as it is pickled, which changes as it is used.
        facts = [data._fingerprint, encoder.fingerprint, column, self.config.packing, "sparsepass tokens 1"]
        if not isinstance(data.features[column], datasets.Value):
            facts.append(encoder.tokenizer.chat_template)
        return data.select_columns([column]).map(
            encode,
            with_indices=True,
            batched=True,
            batch_size=_ROWS,
            remove_columns=[column],
            features=datasets.Features({IDS: datasets.Sequence(datasets.Value("int32"))}),
            new_fingerprint=Hasher.hash(tuple(facts)),
            desc="Tokenizing",
        )

    def _facts(self) -> dict[str, object]:
        facts: dict[str, object] = {"context": self.config.context, "packing": self.config.packing}
        if self.encoder is not None:
            facts |= {
                "tokenizer": str(self.encoder.tokenizer.name_or_path),
                "document_end_token": self.encoder.tokenizer.eos_token,
                "sequence_start_tokens": self.encoder.before if self.config.packing else [],
            }
        return facts

    def _too_short(self, num_tokens: int) -> SparsepassError:
        if not self.config.packing:
            return SparsepassError(f"{self.what} is empty: none of its rows has a token")
        return SparsepassError(
            f"{self.what} is too short: it has {num_tokens} tokens, and one sequence of context {self.config.context} needs "
            f"{self.shape.num_body}; give more text or a smaller context"
        )
