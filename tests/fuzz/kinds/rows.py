"""Files of rows: .jsonl and .parquet."""

import json
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_bytes

from sparsepass.graph.texts.rows import records

_LINES, _TABLE = "rows.jsonl", "rows.parquet"


def write(place: Path) -> None:
    """Rows of texts, chats and tokens."""
    rows = [{"text": f"word {i}", "messages": [{"role": "user", "content": "é"}], "input_ids": [i, 2]} for i in range(40)]
    (place / _LINES).write_text("\n".join(map(json.dumps, rows)) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / _TABLE, row_group_size=16)


def damaged(place: Path) -> SearchStrategy[Files]:
    """The bytes of either."""
    lines: SearchStrategy[Files] = damaged_bytes((place / _LINES).read_bytes()).map(lambda found: {_LINES: found})
    table: SearchStrategy[Files] = damaged_bytes((place / _TABLE).read_bytes()).map(lambda found: {_TABLE: found})
    return st.one_of(lines, table)


def read(place: Path) -> object:
    """Read each in order, and spread over the file."""
    return [list(records(place / name, seed=seed)) for name in (_LINES, _TABLE) for seed in (None, 0)]


KIND = Kind(name="rows", sound=write, damaged=damaged, read=read)
