"""report.json: what every command writes, and `report` and `verify` read."""

from pathlib import Path

from hypothesis.strategies import SearchStrategy
from tests.export.tiny import save_tiny_llama
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_json

from sparsepass.export.report import find_report, read_report, write_pages
from sparsepass.export.stages import Calibration, prepare, write_program

_FILE = "report.json"


def write(place: Path) -> None:
    """The report of a tiny Llama that was pruned."""
    save_tiny_llama(place / "model")
    prepared = prepare(place / "model", passes="nm_sparsify{criterion=magnitude}", calibration=Calibration())
    write_program(prepared, place / "program")
    (place / _FILE).write_bytes((place / "program" / _FILE).read_bytes())


def damaged(place: Path) -> SearchStrategy[Files]:
    """Its bytes or its values."""
    return damaged_json((place / _FILE).read_bytes()).map(lambda found: {_FILE: found})


def read(place: Path) -> object:
    """Read it, and render its pages."""
    document = read_report(place / _FILE)
    write_pages(place, document)
    return find_report(place)


KIND = Kind(name="report", sound=write, damaged=damaged, read=read)
