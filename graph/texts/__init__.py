"""Texts as people have them: files of text and of rows, and the first tokens of one."""

from sparsepass.graph.texts.files import (
    CHAT_COLUMN,
    TEXT_COLUMN,
    Rows,
    Text,
    check_text_file,
    find_text_column,
    first_ids,
    last_cut,
    row_text,
)
from sparsepass.graph.texts.rows import TEXT_SUFFIXES, RecordError, arrow_schema, path_kind, records, spread_order
from sparsepass.graph.texts.tokenizer import is_tokenizer_fault, panics_unseen, tokenizing, try_tokenizer

__all__ = [
    "CHAT_COLUMN",
    "TEXT_COLUMN",
    "TEXT_SUFFIXES",
    "RecordError",
    "Rows",
    "Text",
    "arrow_schema",
    "check_text_file",
    "find_text_column",
    "first_ids",
    "is_tokenizer_fault",
    "last_cut",
    "panics_unseen",
    "path_kind",
    "records",
    "row_text",
    "spread_order",
    "tokenizing",
    "try_tokenizer",
]
