"""A packed folder, whose bytes native code reads."""

from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.export.tiny import save_tiny_llama
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_json, damaged_safetensors

from sparsepass.export.stages import Calibration, export, prepare, write_program
from sparsepass.export.targets.packed import check_packed_folder
from sparsepass.graph.load import load_model

_FILES = ("config.json", "model.safetensors")


def write(place: Path) -> None:
    """A tiny Llama in int8."""
    save_tiny_llama(place / "dense")
    passes = "nm_sparsify{criterion=magnitude}"
    write_program(prepare(place / "dense", passes=passes, calibration=Calibration(), validate=False), place / "program")
    export(place / "program", "packed", place / "packed", verify=False)
    for name in _FILES:
        (place / name).write_bytes((place / "packed" / name).read_bytes())


def damaged(place: Path) -> SearchStrategy[Files]:
    """Its configuration or its weights."""
    config: SearchStrategy[Files] = damaged_json((place / _FILES[0]).read_bytes()).map(lambda found: {_FILES[0]: found})
    weights: SearchStrategy[Files] = damaged_safetensors((place / _FILES[1]).read_bytes()).map(lambda found: {_FILES[1]: found})
    return st.one_of(config, weights)


def read(place: Path) -> object:
    """Check its pattern, load it, and run it."""
    check_packed_folder(place, "2:4")
    with torch.no_grad():
        return load_model(place).model(torch.ones(1, 4, dtype=torch.long))


KIND = Kind(name="packed", sound=write, damaged=damaged, read=read)
