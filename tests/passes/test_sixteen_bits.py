"""Exact passes on weights of 16 bits: nothing is lost but what rounding the new weights once explains."""

import copy
import functools

import pytest
import torch
from tests.families import BY_NAME, tensors_of
from tests.graph.channels.trying import distance
from torch import Tensor

from sparsepass.graph import PassError, Program, capture
from sparsepass.passes import apply_passes

PASSES = ("fold_norms", "permute_channels{criterion=wanda}", "awq_scale{group_size=16}", "rotate{steps=2}")


@functools.cache
def in_both(name: str) -> tuple[Program, Program, dict[str, Tensor]]:
    """A tiny program in bfloat16 whose gains and biases differ, the same in float32, and its inputs. None is to be changed."""
    family = BY_NAME[name]
    model = family.model()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(torch.bfloat16)
    narrow = {key: of_type(value, torch.bfloat16) for key, value in family.inputs(2, 8).items()}
    wide = {key: of_type(value, torch.float32) for key, value in narrow.items()}
    return capture(copy.deepcopy(model), narrow), capture(model.float(), wide), family.inputs(3, 7)


def of_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


@torch.no_grad()
def outputs(program: Program, inputs: dict[str, Tensor]) -> list[Tensor]:
    return tensors_of(program(**inputs))


@pytest.mark.parametrize("text", PASSES)
@pytest.mark.parametrize("name", ["mistral", "gemma3", "opt", "gpt2", "vit"])
def test_nothing_is_lost_but_by_rounding(name: str, text: str) -> None:
    program, wide, inputs = in_both(name)
    calibration = BY_NAME[name].inputs(4, 8)
    narrow = {key: of_type(value, torch.bfloat16) for key, value in calibration.items()}
    after = apply_passes(program, text, calibration=narrow)
    exact = apply_passes(wide, text, calibration=calibration)  # held to 1e-5
    expected = outputs(wide, inputs)
    assert distance(expected, outputs(exact, inputs)) < 1e-5
    # The graph of the one with the weights of the other, and with weights that are rounded as badly as can be.
    rounded, worst = copy.deepcopy(exact), copy.deepcopy(exact)
    generator = torch.Generator().manual_seed(0)
    for tensor_name, tensor in after.tensors().items():
        if tensor.is_floating_point():
            rounded.write_tensor(tensor_name, tensor.detach().float())
            old = exact.tensor(tensor_name).detach()
            signs = torch.randint(0, 2, old.shape, generator=generator) * 2 - 1
            worst.write_tensor(tensor_name, old * (1 + signs * 2.0**-8))
    loss, explained = distance(expected, outputs(rounded, inputs)), distance(expected, outputs(worst, inputs))
    assert loss < (1e-5 if text.startswith("permute") else explained)
    validation = after.history[-1].validation
    assert validation is not None
    assert validation["relative_error"] < 10 * explained, "what the report says"


def test_a_defect_is_told_in_16_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may move the outputs, and other outputs are no rounding."""
    monkeypatch.setattr("sparsepass.passes.fold_norms.scaled", lambda tensor, place, factors: -tensor)
    with pytest.raises(PassError, match="it promises to be exact, and the outputs moved by"):
        apply_passes(in_both("mistral")[0], "fold_norms")
