"""A saved program: program.json and program.safetensors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.fuzz.kind import Files, Kind
from tests.fuzz.mutations import HOSTILE, damaged_json, damaged_safetensors
from torch import nn

from sparsepass import NMSparsify, Program, SLoRB, apply_passes
from sparsepass.graph.saved import PROGRAM_FILE, TENSORS_FILE
from sparsepass.graph.saved.operators import FUNCTIONS, OPERATORS
from sparsepass.graph.support import CHECKSUMS_FILE
from sparsepass.passes import LearnMasks, Quantize


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        x = torch.cat([x[:, :1], self.down(torch.relu(self.up(x)))[:, 1:]], 1)
        found: torch.Tensor = self.head(x).softmax(-1)
        return {"scores": found, "first": found.reshape(ids.shape[0], -1)[:, :4]}


def write(place: Path) -> None:
    """A small program with masks, branches, logits, a grid, a tie, and sizes that vary."""
    torch.manual_seed(0)
    ids = torch.randint(0, 16, (2, 5))
    passes = [NMSparsify(criterion="magnitude"), LearnMasks(targets=("up",)), SLoRB(k=4, init="mean", targets=("down",))]
    program = apply_passes(_Net().eval(), passes, example_inputs={"ids": ids})
    program = apply_passes(program, Quantize(symmetric=False, targets=("down",)))
    program.save(place, force=True)


def damaged(place: Path) -> SearchStrategy[Files]:
    """Either file of a program is damaged, or both."""
    text, tensors = (place / PROGRAM_FILE).read_bytes(), (place / TENSORS_FILE).read_bytes()
    others = damaged_json(text, [*HOSTILE, *_words(json.loads(text)), *_arguments()])
    files: SearchStrategy[Files] = others.map(lambda found: {PROGRAM_FILE: found})
    rest: SearchStrategy[Files] = damaged_safetensors(tensors).map(lambda found: {TENSORS_FILE: found})
    return st.one_of(files, files, files, rest).map(lambda found: {**found, CHECKSUMS_FILE: None})


def _words(document: Any) -> Sequence[Any]:
    """Operators, and the names that the program itself has: more of what is changed is then still read."""
    nodes = document["graph"]["nodes"]
    names = [node["name"] for node in nodes]
    return [*sorted(OPERATORS), *FUNCTIONS, *names, *document["parameters"], *({"node": name} for name in names)]


def _arguments() -> Sequence[Any]:
    sizes = [[2**40], [10**6, 10**6], [-1], [0], [2, 2, 2], [4096, 4096]]
    return [
        *sizes,
        {"device": "cpu"},
        {"device": "cuda"},
        {"dtype": "int64"},
        {"tuple": []},
        {"slice": [None, None, -1]},
        10**9,
    ]


def read(place: Path) -> object:
    """Load a program, run it, and ask it everything."""
    program = Program.load(place)
    with torch.no_grad():
        program(**program.example_inputs)
        program(**{name: torch.cat([t, t]) for name, t in program.example_inputs.items()})
    return str(program.report()), program.sites(), program.recipe


KIND = Kind(name="program", sound=write, damaged=damaged, read=read)
