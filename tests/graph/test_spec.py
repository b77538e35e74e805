"""Each rule of the spec is broken once; a pass that breaks one is refused by name, and so is a file."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.families import captured

from sparsepass.graph import PassError, Program, ProgramFormatError
from sparsepass.graph.program import with_sparse
from sparsepass.graph.records import LearnedState
from sparsepass.graph.spec import violations
from sparsepass.passes import apply_passes, fold

WEIGHT = "model.layers.0.mlp.up_proj.weight"
MASK, BRANCH, PROJECTION = (WEIGHT.replace("weight", name) for name in ("mask", "slorb_weight", "slorb_projection"))


@functools.cache
def _sparse() -> Program:
    return apply_passes(captured("llama"), "nm_sparsify,slorb{k=4,projection=trainable}")


def sparse() -> Program:
    return copy.deepcopy(_sparse())


def found(program: Program) -> list[str]:
    return [f"{where}: {reason}" for where, reason in violations(program, program.graph_module.graph)]


def state_of(**changes: object) -> Callable[[Program], object]:
    return lambda program: with_sparse(program, WEIGHT, **changes)


def tensor_of(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], object]:
    def apply(program: Program) -> None:
        value = change(program.tensor(name).detach())
        program.delete_tensor(name)
        program.set_tensor(name, value)

    return apply


def branch_of(**changes: object) -> Callable[[Program], object]:
    def apply(program: Program) -> None:
        branch = program.sparse[WEIGHT].branch
        assert branch is not None
        with_sparse(program, WEIGHT, branch=dataclasses.replace(branch, **changes))  # type: ignore[arg-type]

    return apply


def unread(name: str, instead: str) -> Callable[[Program], object]:
    def apply(program: Program) -> None:
        for node in program.graph_module.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                node.target = instead

    return apply


OTHER = MASK.replace("layers.0", "layers.1")
BREAKS: dict[str, tuple[Callable[[Program], object], str]] = {
    "a tensor that the graph reads": (lambda p: p.delete_tensor("model.norm.weight"), "model.norm.weight: the graph reads"),
    "an alias of nothing": (lambda p: p.aliases.update(other="nowhere"), "other: it is another name of nowhere"),
    "a state of nothing": (lambda p: p.sparse.update(nowhere=p.sparse[WEIGHT]), "nowhere: it has a sparse state"),
    "an output too many": (
        lambda p: setattr(p, "output_structure", {"kind": "tuple", "items": ["tensor", "tensor"]}),
        "its output: the graph returns 1 tensors, and the output has 2",
    ),
    "an input without an example": (lambda p: p.example_inputs.pop("input_ids"), "input_ids: this input has no example"),
    "a pattern that is none": (state_of(pattern="4:2"), f"{WEIGHT}: its pattern is N:M, such as 2:4, got '4:2'"),
    "a mask that is not there": (state_of(mask="nowhere"), f"{WEIGHT}: its state names nowhere"),
    "a mask that is not applied": (unread(MASK, OTHER), f"{WEIGHT}: the graph does not apply its mask {MASK}"),
    "a mask of numbers": (tensor_of(MASK, torch.Tensor.float), "is bool, got torch.float32"),
    "a mask of another shape": (tensor_of(MASK, lambda mask: mask[:4]), "has the weight's shape"),
    "an axis that is none": (state_of(axis=2), f"{WEIGHT}: 2:4 does not run along axis 2"),
    "an axis that M does not divide": (state_of(pattern="2:7"), f"{WEIGHT}: 2:7 does not run along axis 1"),
    "a mask that keeps all": (tensor_of(MASK, torch.ones_like), "groups of the weight are not 2:4"),
    "logits that are not there": (
        state_of(learned=LearnedState(logits="nowhere", control=MASK)),
        f"{WEIGHT}: its state names nowhere",
    ),
    "logits that are not read": (
        state_of(learned=LearnedState(logits=MASK, control=MASK)),
        f"{WEIGHT}: the graph does not apply its mask {MASK}, {MASK}",
    ),
    "logits without a mask": (
        state_of(mask=None, learned=LearnedState(logits=MASK, control=MASK)),
        f"{WEIGHT}: its mask is being learned, and it has none",
    ),
    "a branch of another k": (branch_of(k=5), f"{WEIGHT}: a branch with k=5 does not fit"),
    "half a branch": (branch_of(projection="nowhere"), f"{WEIGHT}: its branch has no tensor nowhere"),
    "a branch that is not read": (
        unread(PROJECTION, PROJECTION.replace("layers.0", "layers.1")),
        f"{WEIGHT}: the graph does not read {PROJECTION} of its branch",
    ),
    "a branch of another shape": (tensor_of(BRANCH, lambda s: s[:, 1:]), f"{WEIGHT}: {BRANCH} of its branch has shape"),
}


@pytest.mark.parametrize("text", ["", "nm_sparsify", "nm_sparsify,slorb{k=4},fold", "nm_sparsify,learn_masks"])
def test_what_passes_make_keeps_every_rule(text: str) -> None:
    assert found(apply_passes(captured("llama"), text) if text else captured("llama")) == []
    assert found(sparse().to("meta")) == []


@pytest.mark.parametrize("what", BREAKS)
def test_each_rule_is_told_with_its_place(what: str) -> None:
    program = sparse()
    change, told = BREAKS[what]
    change(program)
    assert told in "\n".join(found(program))


def test_a_pass_that_breaks_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(program: Program, weight: str, **_: object) -> None:
        with_sparse(program, weight, mask=None)
        program.aliases["other"] = "nowhere"

    monkeypatch.setattr(fold, "fold_mask", half)
    monkeypatch.setattr(fold.Fold, "ensures", lambda *_: None)
    with pytest.raises(PassError, match=r"pass fold failed at other: it is another name of nowhere.*defect of the pass"):
        apply_passes(sparse(), "fold")


def test_a_file_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    program = sparse()
    program.write_tensor(MASK, torch.ones_like(program.tensor(MASK)))
    program.save(tmp_path / "program")
    told = rf"damaged at {WEIGHT}: \d+ groups of the weight are not 2:4; save the program again"
    with pytest.raises(ProgramFormatError, match=told):
        Program.load(tmp_path / "program")
