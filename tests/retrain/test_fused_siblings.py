"""Retraining a program whose siblings are fused: it is the retraining of the layers apart, but for rounding."""

from pathlib import Path

import torch
from tests.retrain.runs import LEARN_MASKS, learn, masks, run, validation_loss

from sparsepass.graph import Program, split_siblings
from sparsepass.passes import apply_passes

RECIPE = "nm_sparsify,slorb{k=8},fuse_siblings"


def test_a_run_is_that_of_the_layers_apart(tmp_path: Path) -> None:
    fused, plain = run(recipe=RECIPE, folder=tmp_path / "fused", double=True), run(folder=tmp_path / "plain", double=True)
    assert len(fused.fused) == 4
    assert fused.sparse[next(iter(fused.fused))].changed_by == "retrain"
    apart = split_siblings(fused)
    assert masks(apart).keys() == masks(plain).keys()
    assert all(torch.equal(mask, masks(plain)[name]) for name, mask in masks(apart).items())
    for name, tensor in plain.tensors().items():
        assert torch.allclose(apart.tensor(name), tensor, rtol=1e-6, atol=1e-9), name
    later = apply_passes(plain, "fuse_siblings")  # of a trained program
    assert later.sparse.keys() == fused.sparse.keys()
    assert all(state.changed_by == "retrain" for state in split_siblings(later).sparse.values())
    assert torch.allclose(later.tensor(next(iter(fused.fused))), fused.tensor(next(iter(fused.fused))), rtol=1e-6, atol=1e-9)
    fused.save(tmp_path / "program")
    assert validation_loss(Program.load(tmp_path / "program")) == validation_loss(fused)
    model = fused.to_model()
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(weight) != 0, masks(apart)[weight])


def test_learned_masks_of_fused_layers() -> None:
    program = learn(recipe=f"nm_sparsify,fuse_siblings,{LEARN_MASKS.partition(',')[2]}")
    assert len(program.fused) == 4
    assert all(state.learned is None for state in program.sparse.values())
    assert split_siblings(program).report().num_sparse == 14
