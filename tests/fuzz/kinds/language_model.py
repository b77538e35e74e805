"""A saved program of a language model of transformers, with its class and configuration."""

import shutil
from pathlib import Path

from tests.fuzz.kind import Kind
from tests.fuzz.kinds import program

from sparsepass import Program
from sparsepass.graph.saved import PROGRAM_FILE, TENSORS_FILE

_FIXTURE = Path(__file__).parents[2] / "compatibility" / "fixtures" / "programs" / "learned"


def write(place: Path) -> None:
    """The program that the tests of compatibility keep."""
    for name in (PROGRAM_FILE, TENSORS_FILE):
        shutil.copyfile(_FIXTURE / name, place / name)


def read(place: Path) -> object:
    """Load a program, run it, and build the model's own class from it."""
    program.read(place)
    return Program.load(place).to_model()


KIND = Kind(name="language_model", sound=write, damaged=program.damaged, read=read)
