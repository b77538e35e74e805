"""A checkpoint of a training run."""

from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_json, damaged_safetensors

from sparsepass.retrain.run import Checkpoints


def write(place: Path) -> None:
    """One step, with a tensor and a state."""
    Checkpoints(place).save(
        1, {"w": torch.ones(2, 4)}, {"seen": 3, "loss": 0.5}, metric=1.5, local_tensors={"r": torch.ones(2)}
    )


def damaged(place: Path) -> SearchStrategy[Files]:
    """One of its files."""
    strategies: list[SearchStrategy[Files]] = []
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        make = damaged_safetensors if path.suffix == ".safetensors" else damaged_json
        name = str(path.relative_to(place))
        strategies.append(make(path.read_bytes()).map(lambda found, name=name: {name: found}))  # type: ignore[misc]
    return st.one_of(strategies)


def read(place: Path) -> object:
    """Restore the newest."""
    return Checkpoints(place).restore("newest", {"w": torch.zeros(2, 4)}, expected={"seen": 3})


KIND = Kind(name="run", sound=write, damaged=damaged, read=read)
