"""Passes that prepare a model, and training: prepared programs train, and trained ones can be prepared."""

import pytest
import torch
from tests.families import BY_NAME, tensors_of
from tests.retrain.runs import dense, masks, measures, settings, train, whole
from torch import nn

from sparsepass.graph import Program
from sparsepass.passes import apply_passes

CALIBRATION = BY_NAME["llama"].inputs(4, 8)


def with_gains() -> Program:
    """A tiny dense program whose norms have gains that differ from channel to channel."""
    program = dense()
    for name, tensor in program.tensors().items():
        if tensor.dim() == 1 and isinstance(tensor, nn.Parameter):
            program.write_tensor(name, tensor.detach() + 0.3 * torch.randn_like(tensor))
    return program


@pytest.mark.parametrize("text", ["fold_norms", "awq_scale{group_size=16}", "rotate{steps=2}", "rotate{steps=2,form=blocks}"])
def test_a_prepared_program_trains(text: str) -> None:
    torch.manual_seed(0)
    teacher = with_gains()
    program = apply_passes(teacher, f"{text},nm_sparsify{{criterion=wanda}}", calibration=CALIBRATION)
    before = {name: tensor.detach().clone() for name, tensor in program.tensors().items()}
    trained = train(program, teacher, settings(max_steps=4))
    losses = measures(trained)
    assert losses[-1] < losses[0]
    assert len(masks(trained)) == 14
    for name, mask in masks(trained).items():
        assert bool((mask.reshape(-1, 4).sum(1) == 2).all()), name
        assert not torch.equal(trained.tensor(name), before[name]), name


@pytest.mark.parametrize("text", ["fold_norms", "awq_scale{group_size=16}"])
def test_a_trained_program_can_be_prepared(text: str) -> None:
    trained = whole(recipe="nm_sparsify")
    after = apply_passes(trained, text, calibration=CALIBRATION)
    assert after.history[-1].num_rewritten
    inputs = BY_NAME["llama"].inputs(3, 7)
    with torch.no_grad():
        for expected, found in zip(tensors_of(trained(**inputs)), tensors_of(after(**inputs)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(mask, masks(after)[name]) for name, mask in masks(trained).items())
    assert {state.changed_by for state in after.sparse.values()} == {"retrain"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_is_his_own(mode: type[torch.no_grad]) -> None:
    """What learns needs gradients, and what is made is trained later, wherever the caller stands."""
    recipe = "rotate{steps=2},nm_sparsify{criterion=wanda},slorb{k=16},reconstruct{steps=2}"
    model, teacher = BY_NAME["llama"].model(), dense()
    with mode():
        program = apply_passes(model, recipe, calibration=CALIBRATION)
        trained = train(program, teacher, settings(max_steps=2))
        assert not torch.is_grad_enabled()
    assert not any(tensor.is_inference() for tensor in trained.tensors().values())
    assert all(record.num_rewritten for record in program.history)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(trained.tensor(name), program.tensor(name))
