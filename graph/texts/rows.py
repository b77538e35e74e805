"""Files of text and of rows: which one it is, by its suffix, and the rows of .jsonl and .parquet files.

Rows are read as they are asked for, in order or spread evenly over the file.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeAlias

import torch

from sparsepass.graph.support import SparsepassError, first_line, opened, parse_json

_LONGEST_LINE: Final = 1 << 28
_BATCH_ROWS: Final = 1 << 12
TEXT_SUFFIXES = ("", ".txt", ".text", ".md", ".rst")

Kind = Literal["folder", "jsonl", "parquet", "text"]


def path_kind(path: Path, name: str, *, what: str, forms: str) -> Kind:
    """Return what lies at a path, by its suffix.

    Args:
        path: Where it is.
        name: The path as the user wrote it, for messages.
        what: What it is to be, for messages.
        forms: The forms that are understood, for messages.

    Raises:
        SparsepassError: If nothing is there, the file is empty, or its suffix is not known.

    Example:
        >>> path_kind(Path("."), ".", what="calibration", forms="a text file")
        'folder'
    """
    if not path.exists():
        raise SparsepassError(f"{what} file {name} does not exist; expected {forms}")
    if path.is_dir():
        return "folder"
    if not path.is_file():
        raise SparsepassError(f"{what} {name} is no regular file, and nothing else is read; expected {forms}")
    if path.stat().st_size == 0:
        raise SparsepassError(f"{what} file {name} is empty")
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".parquet":
        return "parquet"
    if path.suffix in TEXT_SUFFIXES:
        return "text"
    raise SparsepassError(
        f"{what} file {name} has the suffix {path.suffix!r}, which is not understood; expected .txt, .jsonl or .parquet"
    )


Record: TypeAlias = dict[str, Any]


class RecordError(SparsepassError):
    """A file of rows, or a row of it, that cannot be read; the message names the file and the line."""


def records(
    path: str | Path,
    *,
    what: str = "",
    seed: int | None = None,
    columns: Sequence[str] | None = None,
    absent: Sequence[str] = (),
) -> Iterator[Record]:
    r"""Read the rows of a file.

    Args:
        path: A .parquet file, or one with a JSON object a line. Empty lines are passed over.
        what: What the file is to be, for messages: "calibration".
        seed: None reads the rows in order. A number reads each of them once, in an order that it chooses, so that any number
            of first rows lies evenly over the file (over its first row groups, for parquet).
        columns: Only these; a row that lacks one has None there. None reads all there are.
        absent: Columns that earlier rows do not have, so that a later row must not have them either.

    Raises:
        RecordError: If the file is damaged, a line is not a JSON object, or a row has a column that is ``absent``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "rows.jsonl"
        ...     _ = path.write_text('{"text": "a", "id": 1}\n\n{"text": "b"}\n')
        ...     list(records(path, columns=["text"]))
        [{'text': 'a'}, {'text': 'b'}]
    """
    place = Path(path)
    where = f"{what} file {path}".lstrip()
    if place.suffix == ".parquet":
        yield from _parquet(place, where, seed, columns)
        return
    for number, record in _jsonl(place, where, seed):
        if late := [name for name in absent if name in record]:
            raise RecordError(
                f"{where}, line {number} has the column {late[0]}, which rows before it lack; give it to all rows"
            )
        yield record if columns is None else {name: record.get(name) for name in columns}


def arrow_schema(path: str | Path, columns: Sequence[str]) -> Any:
    """Return the types that a .parquet file gives some of its columns; None for .jsonl, whose rows tell."""
    if Path(path).suffix != ".parquet":
        return None
    import pyarrow.parquet  # type: ignore[import-untyped]  # comes with datasets; has no type information

    with _parquet_read(f"file {path}"):
        schema = pyarrow.parquet.read_schema(path)
    return pyarrow.schema([schema.field(name) for name in columns])


def spread_order(count: int, seed: int) -> Iterator[int]:
    """Visit 0..count-1 each once, so that any number of first visits lies evenly over the whole.

    Example:
        >>> sorted(spread_order(5, 0))
        [0, 1, 2, 3, 4]
    """
    if count < 1:
        return
    step = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, count) != 1:
        step += 1
    start = int(torch.randint(count, (1,), generator=torch.Generator().manual_seed(seed)))
    for index in range(count):
        yield (start + index * step) % count


def _jsonl(path: Path, where: str, seed: int | None) -> Iterator[tuple[int, Record]]:
    with opened(path, error=RecordError) as file:
        for number, line in _lines(file, where) if seed is None else _spread_lines(file, seed, where):
            if line.strip():
                yield number, _record(line, f"{where}, line {number}")


def _lines(file: IO[bytes], where: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise RecordError(f"{where}, line {number} has more than {_LONGEST_LINE >> 20} MiB; expected a JSON object a line")
        yield number, line


def _spread_lines(file: IO[bytes], seed: int, where: str) -> Iterator[tuple[int, bytes]]:
    places = []
    position = 0
    for number, line in _lines(file, where):
        if line.strip():
            places.append((number, position))
        position += len(line)
    for index in spread_order(len(places), seed):
        number, position = places[index]
        file.seek(position)
        yield number, file.readline()


def _record(line: bytes, where: str) -> Record:
    record = parse_json(line, where, error=RecordError, advice="mend that line, or leave it out")
    if not isinstance(record, dict):
        raise RecordError(f'{where} holds a {type(record).__name__}; expected an object such as {{"text": "..."}}')
    return record


@contextmanager
def _parquet_read(where: str) -> Iterator[None]:
    """Turn what pyarrow raises about a file into our error; ValueError is that of texts that are no UTF-8."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RecordError(f"{where} is not a readable parquet file: {first_line(error)}") from error


def _parquet(path: Path, where: str, seed: int | None, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow.parquet

    with opened(path, error=RecordError):
        pass
    with _parquet_read(where):
        file = pyarrow.parquet.ParquetFile(path)
    with file:
        names = None if columns is None else list(columns)
        if seed is None:
            batches = file.iter_batches(columns=names, batch_size=_BATCH_ROWS)
            while True:
                with _parquet_read(where):
                    batch = next(batches, None)
                    rows = [] if batch is None else batch.to_pylist()
                if batch is None:
                    return
                yield from rows
        for group in spread_order(file.num_row_groups, seed):
            with _parquet_read(where):
                table = file.read_row_group(group, columns=names)
            for index in spread_order(table.num_rows, seed):
                with _parquet_read(where):
                    row = table.slice(index, 1).to_pylist()[0]
                yield row
