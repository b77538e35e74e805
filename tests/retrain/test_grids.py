"""Training behind the rounding: scales follow the weights, zeros stay, and what makes no sense is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import captured
from tests.retrain.runs import (
    assert_same,
    assert_whole,
    data,
    dense,
    measures,
    run,
    settings,
    sparse,
    stopping_at,
    train,
    validation_loss,
)
from torch import Tensor

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.integers import integers_of
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rewrite import finish, fold_grid
from sparsepass.graph.rounding import fit_scales
from sparsepass.passes import apply_passes
from sparsepass.passes.maths import NMPattern, num_violations
from sparsepass.retrain.learner import NonFiniteLossError
from sparsepass.retrain.loop import TrainingStoppedError
from sparsepass.retrain.restart import program_of_checkpoint

DOWN = "model.layers.0.mlp.down_proj.weight"
RECIPE = "nm_sparsify,slorb{k=8},quantize{group_size=16}"


def quantized(recipe: str = RECIPE, name: str = "llama", **changes: Any) -> Program:
    return run(name, recipe=recipe, quantize=True, **changes)


def kept_of(program: Program, weight: str) -> Tensor:
    """A weight behind its mask, in front of its rounding."""
    sparse_state = program.sparse.get(weight)
    tensor = program.tensor(weight).detach()
    return tensor if sparse_state is None or sparse_state.mask is None else tensor * program.tensor(sparse_state.mask)


def rows_of(program: Program, weight: str, tensor: Tensor) -> Tensor:
    site = next((site for site in program.sites() if site.weight == weight), None)
    return tensor if site is None else site.to_matrix(tensor)  # a SLoRB branch is no site, and is a matrix


def fitted(program: Program, weight: str) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of what the mask keeps."""
    return fit_scales(rows_of(program, weight, kept_of(program, weight)), program.quantized[weight].grid)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", RECIPE),
        ("llama", "nm_sparsify{ignore=q_proj},quantize{ignore=k_proj,bits=8,group_size=0},fuse_siblings"),
        ("gpt2", "nm_sparsify,quantize{symmetric=false,group_size=16}"),
        ("mixtral", "nm_sparsify,quantize{group_size=16}"),
        ("llama", "nm_sparsify,quantize{format=fp8}"),
        ("llama", "nm_sparsify,slorb{k=8},quantize{slorb=quantize}"),
    ],
)
def test_scales_follow_the_weights_and_zeros_stay(name: str, recipe: str) -> None:
    start = sparse(name, recipe)
    program = quantized(recipe, name, behind="original", max_steps=3, mask_interval=1, validate_every=3)
    assert program.quantized == start.quantized, "the layers and grids that were chosen"
    for weight, state in program.quantized.items():
        scales, zeros = fitted(program, weight)
        assert torch.equal(program.tensor(state.scales), scales), weight
        assert not torch.equal(scales, start.tensor(state.scales)), weight
        if state.zero_points is not None:
            assert zeros is not None
            assert torch.equal(program.tensor(state.zero_points), zeros.to(torch.uint8))
    moved = 0
    for weight, sparse_state in program.sparse.items():
        assert sparse_state.mask is not None
        mask = program.tensor(sparse_state.mask)
        moved += int((mask != start.tensor(sparse_state.mask)).sum())
        assert not num_violations(masked_weight(program, weight), NMPattern(2, 4), sparse_state.axis)
        if (found := integers_of(program, weight)) is not None:
            dropped_OI = ~rows_of(program, weight, mask)
            assert not bool(found.weight_OI[dropped_OI].any())
            assert program.tensor(weight).dtype == torch.float32
            assert not torch.equal(program.tensor(weight), masked_weight(program, weight)), "the weight is no rounded one"
    assert moved
    assert program.retraining[-1]["settings"]["quantize"] is True


def test_validation_is_that_of_the_rounded_model(tmp_path: Path) -> None:
    program = quantized()
    assert measures(program)[-1] == pytest.approx(validation_loss(program), rel=1e-6)
    floating = copy.deepcopy(program)
    for weight in program.quantized:
        fold_grid(floating, weight)
    finish(floating)
    assert validation_loss(floating) == pytest.approx(validation_loss(program), rel=1e-6)
    program.save(tmp_path / "program")
    assert validation_loss(Program.load(tmp_path / "program")) == validation_loss(program)


@pytest.mark.parametrize(
    "recipe",
    [
        "nm_sparsify,quantize{clip=weights}",
        "nm_sparsify,quantize{method=joint,symmetric=false}",
        "nm_sparsify,quantize{format=fp8,clip=weights}",
    ],
)
def test_a_run_starts_from_the_scales_of_the_program_and_keeps_what_they_hold(recipe: str) -> None:
    start = apply_passes(captured("llama"), recipe, calibration=data().train.take(8).input_ids, validate=False)
    unmoved = train(copy.deepcopy(start), dense(), settings(quantize=True, max_steps=2, lr=0.0, min_lr=0.0, mask_interval=9))
    assert measures(unmoved)[0] == pytest.approx(validation_loss(start), rel=1e-6)
    clipped = 0
    for weight, state in start.quantized.items():
        assert torch.equal(unmoved.tensor(state.scales), start.tensor(state.scales)), weight
        clipped += int((start.tensor(state.scales) != fitted(start, weight)[0]).sum())
    assert clipped, "scales that are not those of the largest weight"
    trained = train(copy.deepcopy(start), dense(), settings(quantize=True, max_steps=2, mask_interval=9, behind="original"))
    state = start.quantized[DOWN]
    before, after = fitted(start, DOWN)[0].float(), fitted(trained, DOWN)[0].float()
    share = start.tensor(state.scales).float() / before
    # Both are rounded up to bfloat16, by at most 1/128.
    torch.testing.assert_close(trained.tensor(state.scales).float(), after * share, rtol=2 / 128, atol=0.0)
    assert not torch.equal(trained.tensor(state.scales), start.tensor(state.scales))


def test_what_is_not_trained_keeps_its_scales() -> None:
    recipe = "nm_sparsify,quantize{group_size=16,clip=weights}"
    program, start = quantized(recipe, frozen=("*down_proj*",), max_steps=2), sparse(recipe=recipe)
    for weight, state in program.quantized.items():
        assert torch.equal(program.tensor(state.scales), start.tensor(state.scales)) == ("down_proj" in weight), weight


def test_a_fixed_mask_is_trained_behind_the_rounding() -> None:
    program, start = quantized(method="fixed"), sparse(recipe=RECIPE)
    for state in program.sparse.values():
        assert state.mask is not None
        assert torch.equal(program.tensor(state.mask), start.tensor(state.mask))
    assert torch.equal(program.tensor(program.quantized[DOWN].scales), fitted(program, DOWN)[0])


def test_it_heals_both_at_once() -> None:
    """Against training as if there were no rounding, and rounding afterwards."""
    how: dict[str, Any] = {"kd_weight": 1.0, "temperature": 1.0, "max_steps": 60, "lr": 3e-3, "min_lr": 3e-4, "decay": 1e-3}
    how |= {"weight_decay": 0.0, "validate_every": 60}
    behind = run(recipe="nm_sparsify,quantize{group_size=0}", quantize=True, **how)
    first, last = (found["kl"] for found in behind.retraining[-1]["validations"])
    assert last < 0.8 * first
    afterwards = apply_passes(run(recipe="nm_sparsify", **how), "quantize{group_size=0}", validate=False)
    # A run of one step with a rate of 0: its validation measures the program as it is.
    measured = train(afterwards, dense(), settings(**how | {"max_steps": 1, "lr": 0.0, "min_lr": 0.0, "quantize": True}))
    assert last < measured.retraining[-1]["validations"][0]["kl"]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipe = "nm_sparsify,quantize{group_size=16,symmetric=false,clip=weights}"
    config = settings(quantize=True, checkpoint_every=2)
    with pytest.raises(TrainingStoppedError):
        train(sparse(recipe=recipe), dense(), config, run_folder=tmp_path / "stopped", data=stopping_at(5))
    resumed = train(sparse(recipe=recipe), dense(), config, run_folder=tmp_path / "stopped")
    assert_same(resumed, train(sparse(recipe=recipe), dense(), config, run_folder=tmp_path / "whole"))
    assert_whole(tmp_path / "stopped")
    for name in ("stopped", "whole"):
        restarted, _ = program_of_checkpoint(sparse(recipe=recipe), tmp_path / name / "checkpoints" / "step-00000008")
        state = restarted.quantized[DOWN]
        assert state.zero_points is not None
        assert not torch.equal(restarted.tensor(state.scales), sparse(recipe=recipe).tensor(state.scales))
        assert validation_loss(restarted) == pytest.approx(measures(resumed)[-1], rel=1e-6)


def test_activations_that_are_computed_again_change_nothing() -> None:
    assert_same(quantized(activation_checkpointing=True, max_steps=2), quantized(max_steps=2))


def test_a_step_that_leaves_weights_without_scales_is_told() -> None:
    with pytest.raises(NonFiniteLossError, match=r"after step 1, .* is not finite, so it has no scale.* Lower lr"):
        quantized(lr=float("1e39"), warmup=0)


@pytest.mark.parametrize(
    ("recipe", "changes", "told"),
    [
        (RECIPE, {}, "the program is quantized, .*: set train.quantize: true .*, or retrain the program as it was before"),
        (
            "nm_sparsify",
            {"quantize": True},
            r"this program is not quantized: apply the pass quantize first \(after nm_sparsify\)",
        ),
        ("quantize", {"quantize": True}, "there is nothing to retrain: it has no sparse layers; apply nm_sparsify"),
        ("nm_sparsify,quantize,fold", {"quantize": True}, "its masks have been folded into the weights"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SparsepassError, match=told):
        run(recipe=recipe, **changes)
