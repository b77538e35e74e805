"""Equivalence checks for a model of your own: copy this file into your tests and put your model in its place.

It needs no network and no GPU and takes a few seconds. What the checks mean: docs/equivalence.md.
"""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsepass import EquivalenceError, Program, apply_passes, assert_equivalent, capture, compare


class MyModel(nn.Module):
    """Stands for your model."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [B, 16] -> logits [B, 10]."""
        return {"logits": self.head(x + self.down(torch.relu(self.up(x))))}


@pytest.fixture
def model() -> MyModel:
    """Your model; a fixed seed makes failures repeatable."""
    torch.manual_seed(0)
    return MyModel().eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Inputs of another shape than those it is captured with: real ones are best, random ones will do."""
    return {"x": torch.randn(5, 16, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def sparse(model: MyModel) -> Program:
    """Your model, pruned to 2:4."""
    return apply_passes(model, ["nm_sparsify{criterion=magnitude}"], example_inputs=torch.randn(2, 16))


def test_capture_keeps_every_bit(model: MyModel, inputs: dict[str, Tensor]) -> None:
    """The program that passes rewrite computes what the model computes."""
    assert_equivalent(model, capture(model, torch.randn(2, 16)), inputs, exact=True)


def test_saving_keeps_every_bit(sparse: Program, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """What was saved is what was made."""
    sparse.save(tmp_path / "program")
    assert_equivalent(sparse, tmp_path / "program", inputs, exact=True)


def test_onnx_file_computes_the_same(model: MyModel, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """What is deployed computes what the model computes, up to the order of summation: 1e-5 in float32."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model, (torch.randn(2, 16),), tmp_path / "model.onnx", dynamic_shapes=({0: batch},), input_names=["x"],
            output_names=["logits"], dynamo=True, verbose=False,
        )  # fmt: skip
    found = assert_equivalent(model, tmp_path / "model.onnx", inputs, max_kl=1e-9)
    assert found.relative_error < 1e-5


def test_pruning_changes_no_more_than_we_accept(model: MyModel, sparse: Program, inputs: dict[str, Tensor]) -> None:
    """Pruning changes the function on purpose. Bound how far, so that a worse recipe or checkpoint is noticed."""
    found = compare(model, sparse, inputs)
    assert not found.failures(rtol=0.5, max_kl=0.1), str(found)
    assert found.first_divergence == "up"


def test_a_spoiled_weight_is_noticed(model: MyModel, inputs: dict[str, Tensor]) -> None:
    """A check that never fails is worth nothing: spoil one layer, and see that it is named."""
    spoiled = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.down.weight[3, 7] += 0.1
    with pytest.raises(EquivalenceError, match="first layer at which they part: down"):
        assert_equivalent(model, spoiled, inputs)
