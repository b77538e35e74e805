"""Texts as people have them: a file, or rows with a column of texts or of chats; and the first tokens of one.

Only as much of a text is read and tokenized as is asked for.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.graph.texts.rows import path_kind, records
from sparsepass.graph.texts.tokenizer import tokenizing, whole_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_COLUMN: Final = "text"
"""The column of texts, where none is named."""
CHAT_COLUMN: Final = "messages"
"""The column of chats, where there is no such column of texts."""
_FORMS: Final = "a .txt, .jsonl or .parquet file"
_PIECE: Final = 1 << 16
_MARGIN_TOKENS: Final = 64
"""Tokens beyond those wanted, so that where the text was cut does not change them."""


def find_text_column(columns: Collection[str], wanted: str | None, what: str) -> str:
    """The column of rows that holds their text: the one that is named, or ``text``, or the chats in ``messages``.

    Args:
        columns: Of the rows.
        wanted: What the user named; None if nothing.
        what: What the rows are, for messages.

    Raises:
        SparsepassError: If there is no such column.

    Example:
        >>> find_text_column(["id", "messages"], None, "calibration")
        'messages'
    """
    names = [wanted] if wanted is not None else [TEXT_COLUMN, CHAT_COLUMN]
    found = next((name for name in names if name in columns), None)
    if found is None:
        known = " or ".join(map(repr, names))
        raise SparsepassError(
            f"{what} has the columns {', '.join(map(str, columns)) or 'none'} and no text column {known}; "
            "name the one that holds the text with text_column"
        )
    return found


def row_text(value: object, tokenizer: "PreTrainedTokenizerBase | None", where: str) -> str:
    """The text of a row: the value itself; a chat (a list of messages) goes through the tokenizer's chat template.

    Args:
        value: Of the text column; None counts as an empty text.
        tokenizer: Knows the chat template.
        where: The row and its column, for messages.

    Raises:
        SparsepassError: If it is neither a text nor a chat, or the tokenizer has no chat template.

    Example:
        >>> row_text("words", None, "row 0"), row_text(None, None, "row 1")
        ('words', '')
    """
    if value is None or isinstance(value, str):
        return whole_text(value or "", where)
    if not (isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value)):
        raise SparsepassError(
            f"{where} holds {type(value).__name__}, not text (nor a chat, a list of messages); "
            "name the one that holds the text with text_column"
        )
    chat = [_message(each, where) for each in value]
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise SparsepassError(f"{where} holds a chat, and the tokenizer has no chat template; give the chats as text")
    try:
        return whole_text(str(tokenizer.apply_chat_template(chat, tokenize=False)), where)
    except SparsepassError:
        raise
    except Exception as error:  # of a template, a program that comes with the model
        raise SparsepassError(f"{where}: the chat template does not take this chat: {first_line(error)}") from error


_ROLES: Final = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls them."""


def _message(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates expect it: of ``role`` and ``content``, which may be in parts, or of ``from`` and ``value``.

    Raises:
        SparsepassError: If it is of something else, or in parts that are no text.
    """
    keys = ("from", "value") if {"from", "value"} <= given.keys() else ("role", "content")
    if not set(keys) <= given.keys():
        raise SparsepassError(
            f"{where} holds a message of {', '.join(map(str, given)) or 'nothing'}; expected role and content (or from, value)"
        )
    role, content = (given[key] for key in keys)
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise SparsepassError(f"{where} holds a message with a part that is no text; leave rows with images and sound out")
        content = "".join(map(str, parts))
    others = {key: value for key, value in given.items() if key not in keys}
    return others | {"role": _ROLES.get(role, role) if keys[0] == "from" else role, "content": content}


def check_text_file(path: Path, what: str, *, column: str | None = None) -> None:
    """Raise unless a file is one of text, or of rows with a text column.

    Raises:
        SparsepassError: If it is missing, empty, of another kind, or lacks the column.
    """
    if path_kind(path, str(path), what=what, forms=_FORMS) == "folder":
        raise SparsepassError(f"{what} {path} is a folder; expected {_FORMS}")
    if path.suffix in (".jsonl", ".parquet"):
        first = next(records(path, what=what), None)
        if first is None:
            raise SparsepassError(f"{what} file {path} has no rows")
        find_text_column(first, column, f"{what} file {path}")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows with a column of texts or chats that lie in no file of ours, such as a data set of the hub.

    Attributes:
        name: What messages call them.
        rows: The rows; can be gone through again.
    """

    name: str
    rows: Iterable[Mapping[str, Any]]


Text = str | Path | Rows | tuple[str | Path | Rows, ...]
"""A text itself, a file, rows; or several of them, of each of which as many tokens are taken as of the others."""


def first_ids(
    text: Text,
    tokenizer: "PreTrainedTokenizerBase",
    num_tokens: int | None,
    *,
    what: str,
    column: str | None = None,
) -> list[int]:
    """The first tokens of a text, without special tokens; no more of it is read than they need.

    Args:
        text: See `Text`. Texts of rows are joined with a blank line between them.
        tokenizer: Makes the tokens.
        num_tokens: At most so many; None for all.
        what: What the text is, for messages.
        column: The column of texts, if the file has rows.

    Raises:
        SparsepassError: If the file cannot be read, or holds no text.
    """
    if isinstance(text, tuple):
        return [
            token
            for index, one in enumerate(text)
            for token in first_ids(one, tokenizer, _share(num_tokens, index, len(text)), what=what, column=column)
        ]
    held, size, is_whole = "", 8 * (num_tokens or 0) + 4096, False
    chunks = iter([text]) if isinstance(text, str) else _chunks(text, tokenizer, what, column)
    while True:
        parts = [held]
        total = len(held)
        while num_tokens is None or total <= size:
            if (chunk := next(chunks, None)) is None:
                is_whole = True
                break
            parts.append(chunk)
            total += len(chunk)
        held = "".join(parts)
        begin = held if num_tokens is None or (is_whole and len(held) <= size) else held[: last_cut(held[:size]) or size]
        # verbose=False: a text longer than the model's context is meant here.
        with tokenizing(tokenizer, begin):
            ids = list(tokenizer(begin, add_special_tokens=False, verbose=False)["input_ids"])
        if len(begin) == len(held) and is_whole:
            if not held.strip():
                raise SparsepassError(f"{what} is empty; give some text of at least two tokens")
            return ids[:num_tokens]
        if num_tokens is not None and len(ids) >= num_tokens + _MARGIN_TOKENS:
            return ids[:num_tokens]
        size *= 2


def _row_texts(rows: Iterable[Mapping[str, Any]], where: str, tokenizer: Any, column: str | None) -> Iterator[str]:
    name = None
    for index, row in enumerate(rows):
        name = name or find_text_column(row, column, where)
        yield row_text(row.get(name), tokenizer, f"{where}, row {index}: column {name!r}") + "\n\n"


def last_cut(text: str) -> int | None:
    r"""Where a text can be cut so that its tokens stay the same: behind the last line break between two words.

    The tokenizers of GPT-2, Llama and their kin never make a token across such a place.

    Example:
        >>> last_cut("one\ntwo"), last_cut("one two")
        (4, None)
    """
    at = len(text) - 1
    while (at := text.rfind("\n", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    return None


def _share(number: int | None, index: int, count: int) -> int | None:
    """Of a number that is shared out evenly, what falls to one of several."""
    return None if number is None else (index + 1) * number // count - index * number // count


def _chunks(text: Path | Rows, tokenizer: Any, what: str, column: str | None) -> Iterator[str]:
    if isinstance(text, Rows):
        yield from _row_texts(text.rows, f"{what} {text.name}", tokenizer, column)
        return
    path = text
    check_text_file(path, what, column=column)
    if path.suffix in (".jsonl", ".parquet"):
        yield from _row_texts(records(path, what=what), f"{what} file {path}", tokenizer, column)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(_PIECE):
                yield piece
    except UnicodeDecodeError as error:
        raise SparsepassError(
            f"{what} file {path} is not UTF-8 ({error.reason}); convert it, for example with `iconv -t UTF-8`"
        ) from error
    except OSError as error:
        raise SparsepassError(f"{what} file {path} cannot be read: {error}") from error
