"""A GGUF file."""

from pathlib import Path

from hypothesis.strategies import SearchStrategy
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_bytes
from tests.graph.load.test_load import write_gguf

from sparsepass.graph.load import load_model

_FILE = "m.gguf"


def write(place: Path) -> None:
    """A Llama of one layer."""
    write_gguf(place / _FILE)


def damaged(place: Path) -> SearchStrategy[Files]:
    """Its bytes."""
    return damaged_bytes((place / _FILE).read_bytes()).map(lambda found: {_FILE: found})


def read(place: Path) -> object:
    """Load it."""
    return load_model(place / _FILE)


KIND = Kind(name="gguf", sound=write, damaged=damaged, read=read)
