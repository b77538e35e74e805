"""A recipe."""

from pathlib import Path

from hypothesis.strategies import SearchStrategy
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_bytes

from sparsepass.export.stages import example_text, read_recipe

_FILE = "recipe.yaml"


def write(place: Path) -> None:
    """The commented example."""
    (place / _FILE).write_text(example_text())


def damaged(place: Path) -> SearchStrategy[Files]:
    """Its bytes."""
    return damaged_bytes((place / _FILE).read_bytes()).map(lambda found: {_FILE: found})


def read(place: Path) -> object:
    """Read and check it."""
    return read_recipe(place / _FILE)


KIND = Kind(name="recipe", sound=write, damaged=damaged, read=read)
