"""What a copy of a program keeps, and what its sparse states say about its tensors."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from sparsepass.graph import Program
from sparsepass.graph.program import masked_weight
from sparsepass.graph.records import FusedPart, Origin, QuantizedState
from sparsepass.graph.rewrite import without_branches
from sparsepass.passes import apply_passes


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    found = apply_passes(net, "nm_sparsify{criterion=magnitude},slorb{k=16,init=mean}", example_inputs=torch.randn(2, 32))
    found.retraining = ({"steps": 3},)
    found.origin = Origin(signature=("input",), versions={"torch": "2"})
    found.limits = ("input[1] == 32",)
    return found


def test_a_copy_keeps_every_field(program: Program) -> None:
    program.aliases["other.weight"] = "0.weight"
    program.fused["2.weight"] = tuple(FusedPart(weight=f"{name}.weight", bias=f"{name}.bias", rows=4) for name in "ab")
    program.quantized["2.weight"] = QuantizedState(bits=4, group_size=0, axis=1, scales="2.scales")
    shared = program.train().sharing()
    names = [name for name in inspect.signature(Program.__init__).parameters if name != "self"]
    empty = [name for name in names if not getattr(program, name)]
    assert empty == []
    for name in names:
        assert getattr(shared, name) == getattr(program, name) or getattr(shared, name) is getattr(program, name), name
    assert shared.training
    assert all(shared.tensor(name) is tensor for name, tensor in program.tensors().items())


def test_a_change_stays_in_the_copy(program: Program) -> None:
    shared = program.sharing(sparse={}, history=())
    shared.aliases["a"] = "0.weight"
    assert (shared.sparse, shared.history, "a" in program.aliases) == ({}, (), False)
    assert program.sparse
    assert program.history


def test_masked_weight(program: Program) -> None:
    state = program.sparse["0.weight"]
    assert state.mask is not None
    mask: Any = program.tensor(state.mask)
    assert torch.equal(masked_weight(program, "0.weight"), torch.where(mask, program.tensor("0.weight"), 0.0))
    assert torch.equal(masked_weight(program, "0.bias"), program.tensor("0.bias"))


def test_branches_are_switched_off_and_on(program: Program) -> None:
    x = torch.randn(3, 32)
    with torch.no_grad():
        before = program(x)
        with without_branches(program, ()):
            assert torch.equal(program(x), before)
        with without_branches(program, {"0.weight"}):
            assert not torch.equal(program(x), before)
        assert torch.equal(program(x), before)
