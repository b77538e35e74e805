"""A mask pack: a safetensors file whose metadata holds JSON."""

import json
from pathlib import Path

import safetensors
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import load_file, save
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import damaged_safetensors, damaged_value
from torch import nn

from sparsepass import apply_passes
from sparsepass.passes.masks import MaskPack, compare_masks, describe, pack_program

_FILE = "pack.safetensors"


def write(place: Path) -> None:
    """The masks of two small layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    pack_program(apply_passes(model, ["nm_sparsify"], example_inputs=torch.randn(2, 16))).save(place / _FILE)


def damaged(place: Path) -> SearchStrategy[Files]:
    """The bytes, the header, or the JSON in its metadata."""
    tensors = load_file(place / _FILE)
    with safetensors.safe_open(place / _FILE, "pt") as file:
        known = json.loads(file.metadata()["sparsepass"])
    inside = damaged_value(known).map(lambda value: save(tensors, {"sparsepass": json.dumps(value)}))
    return st.one_of(inside, damaged_safetensors((place / _FILE).read_bytes())).map(lambda found: {_FILE: found})


def read(place: Path) -> object:
    """Load it, describe it, and unpack every mask."""
    pack = MaskPack.load(place / _FILE)
    for known in pack.masks.values():
        assert known.mask().shape == known.shape
    return describe(pack), compare_masks(pack, pack)


KIND = Kind(name="masks", sound=write, damaged=damaged, read=read)
