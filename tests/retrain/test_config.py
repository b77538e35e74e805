"""Settings: what is refused, how recipes give them, and how long a run is."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, strategies as st

from sparsepass.graph import SparsepassError
from sparsepass.retrain.config import RetrainConfig, steps_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "needs a length: give max_steps or max_tokens"),
        ({"max_steps": 0}, "max_steps expects a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size expects a whole number of at least 1, got 2.0"),
        ({"micro_batch_size": True}, "micro_batch_size expects a whole number of at least 1, got True"),
        ({"mask_interval": 0}, "mask_interval expects"),
        ({"keep_checkpoints": -1}, "keep_checkpoints expects a whole number of at least 0, got -1"),
        ({"lr": -1.0}, "lr expects a number of at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr expects a number of at least 0, got nan"),
        ({"decay": float("inf")}, "decay expects a number of at least 0, got inf"),
        ({"kd_weight": 1.5}, "kd_weight expects a fraction from 0 to 1, got 1.5"),
        ({"freeze_masks_after": -0.1}, "freeze_masks_after expects a fraction"),
        ({"lr": 1e-5}, "min_lr 2e-05 is above lr 1e-05"),
        ({"temperature": 0.0}, "temperature expects a number above 0, got 0.0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm expects a number above 0 or null, got 0.0"),
        ({"behind": 2.0}, "behind expects original, zeros, clipped or a factor from 0 to 1, got 2.0"),
        ({"behind": "noise"}, "behind expects original, zeros, clipped or a factor from 0 to 1, got 'noise'"),
        ({"method": "srste"}, "method expects one of ast, cast, fixed, maskllm, got 'srste'"),
        ({"optimizer": "adam"}, "optimizer expects one of adamw, sgd, got 'adam'"),
        ({"lr_shape": "step"}, "lr_shape expects one of cosine, linear, constant, got 'step'"),
        ({"dtype": "float16"}, "dtype expects one of auto, bfloat16, float32, got 'float16'"),
        ({"parallel": "dp"}, "parallel expects one of auto, ddp, fsdp, got 'dp'"),
        ({"betas": (0.9, 1.0)}, r"betas expects two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"mask_scale": (100.0, 0.0)}, r"mask_scale expects two numbers above 0, .* got \(100.0, 0.0\)"),
        ({"mask_temperature": (1.0,)}, r"mask_temperature expects two numbers above 0, .* got \(1.0,\)"),
        ({"mask_norm": -1.0}, "mask_norm expects a number of at least 0, got -1.0"),
        ({"method": "maskllm", "behind": "zeros"}, "maskllm chooses among all weights as they are, .* leave out behind"),
        ({"method": "maskllm", "freeze_masks_after": 0.5}, "leave out behind and freeze_masks_after"),
        ({"method": "maskllm", "quantize": True}, "quantize: true is for the methods ast and fixed: maskllm learns masks"),
        ({"method": "cast", "quantize": True}, "cast computes with dense weights .* then apply the pass quantize"),
        ({"method": "cast", "optimizer": "sgd"}, "cast has an optimizer of its own"),
        ({"trackers": ("tensorbord",)}, "accelerate knows no 'tensorbord'; did you mean 'tensorboard'"),
        ({"momentum": 1.0}, "momentum expects a number from 0 to below 1, got 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        RetrainConfig(**{"max_steps": 10} | changes)


def test_settings_of_a_recipe() -> None:
    found = RetrainConfig.from_mapping(
        {"max_steps": 30, "lr": "1e-3", "betas": [0.9, 0.99], "behind": "zeros", "frozen": ["*embed*"], "clip_grad_norm": None}
    )
    assert found == RetrainConfig(
        max_steps=30, lr=1e-3, betas=(0.9, 0.99), behind="zeros", frozen=("*embed*",), clip_grad_norm=None
    )
    assert RetrainConfig.from_mapping({"max_steps": 1, "behind": 0.5}).behind == 0.5
    assert RetrainConfig.from_mapping(dataclasses.asdict(found)) == found


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(SparsepassError, match=r"tensorboard is not installed; install it: .*, or leave it out"):
        RetrainConfig(max_steps=1, trackers=("tensorboard",))


def test_defaults_that_depend_on_the_method() -> None:
    names = ("lr", "min_lr", "weight_decay", "behind")
    of_masks = RetrainConfig(max_steps=1, method="maskllm")
    assert [getattr(of_masks, name) for name in names] == [5e-4, 5e-5, 0.1, "original"]
    assert [getattr(RetrainConfig(max_steps=1), name) for name in names] == [2e-4, 2e-5, 0.0, "zeros"]
    assert RetrainConfig(max_steps=1, method="maskllm", lr=0.1).lr == 0.1
    assert dataclasses.replace(of_masks, max_steps=2).lr == 5e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_step": 3}, "recipe.yaml: there is no setting 'max_step'; did you mean 'max_steps'?"),
        ({"max_steps": 3, "colour": "red"}, r"recipe.yaml: there is no setting 'colour' \(there are \['method'"),
        ({"max_steps": "many"}, "recipe.yaml: max_steps: .*, got 'many'"),
        ({"max_steps": 3, "method": "srste"}, "recipe.yaml: method: .*'ast', 'cast', 'fixed' or 'maskllm', got 'srste'"),
        ({}, "a training run needs a length"),
    ],
)
def test_errors_of_a_recipe_name_the_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsepassError, match=message):
        RetrainConfig.from_mapping(given, where="recipe.yaml")


def test_the_length_of_a_run() -> None:
    assert RetrainConfig(max_steps=7).num_steps(512) == 7
    assert RetrainConfig(max_tokens=1000, batch_size=3).num_steps(100) == 3
    assert RetrainConfig(max_tokens=1000, max_steps=2, batch_size=3).num_steps(100) == 2
    with pytest.raises(SparsepassError, match="max_tokens 299 is less than one step of 3 sequences of 100 tokens"):
        RetrainConfig(max_tokens=299, batch_size=3).num_steps(100)


@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_lengths_are_steps_or_fractions(num_steps: int, length: int, fraction: float) -> None:
    assert steps_of(length, num_steps) == length
    assert steps_of(fraction, num_steps) == round(fraction * num_steps) <= num_steps


@pytest.mark.parametrize(
    ("asked", "fast", "expected"),
    [
        ("auto", torch.bfloat16, "bfloat16"),
        ("auto", None, "float32"),
        # GPUs before Ampere are fast in float16, which training would need loss scaling for.
        ("auto", torch.float16, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float32", torch.bfloat16, "float32"),
    ],
)
def test_auto_is_bfloat16_only_where_the_device_is_fast_in_it(
    monkeypatch: pytest.MonkeyPatch, asked: Literal["auto", "bfloat16", "float32"], fast: torch.dtype | None, expected: str
) -> None:
    monkeypatch.setattr("sparsepass.retrain.config.fast_low_precision", lambda device: fast)
    assert RetrainConfig(max_steps=1, dtype=asked).resolve("cpu").dtype == expected
