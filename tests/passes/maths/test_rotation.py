"""Learning rotations: against the definition, and what it does to entropies."""

import math

import pytest
import torch
from torch import Tensor

from sparsepass.passes.maths import TurnedLayer, entropies, learn_rotations, rotation_from, salience_entropy


def layer(seed: int, *, reads: bool = True, makes: bool = True, divides: bool = True, number: int = 0) -> TurnedLayer:
    """A layer of 6 outputs, of which 3 and 3 are turned alike, and 4 inputs that differ in what they cost."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 4, generator=generator) * torch.tensor([3.0, 1, 1, 0.2]) @ torch.randn(4, 4, generator=generator)
    gram = x.T @ x / 64
    metric = torch.linalg.inv(gram) if divides else gram
    return TurnedLayer(
        weight_OI=torch.randn(6, 4, generator=generator),
        metric_II=metric if reads else metric.diagonal().clone(),
        divides=divides,
        reads={number: torch.arange(4)[:, None]} if reads else {},
        makes={10 + number: torch.tensor([[0, 3], [1, 4], [2, 5]])} if makes else {},
    )


def slow_entropy(its: TurnedLayer, inputs: Tensor, outputs: Tensor) -> float:
    """From the definition, number by number."""
    whole = torch.block_diag(outputs, outputs).double()
    inputs = inputs.double() if its.reads else torch.eye(4).double()
    weight = (whole if its.makes else torch.eye(6).double()) @ its.weight_OI.double() @ inputs.T
    metric = its.metric_II.double() if its.metric_II.dim() == 2 else torch.diag(its.metric_II.double())
    cost = (inputs @ metric @ inputs.T).diagonal()
    salience = weight**2 / cost if its.divides else weight**2 * cost

    def mean(rows: Tensor) -> float:
        total = 0.0
        for row in rows.tolist():
            total -= sum(each / sum(row) * math.log(each / sum(row)) for each in row)
        return total / len(rows)

    return (mean(salience) if its.reads else 0.0) + (mean(salience.T) if its.makes else 0.0)


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize(("reads", "makes"), [(True, True), (True, False), (False, True)])
def test_the_entropy_is_that_of_the_definition(reads: bool, makes: bool, divides: bool) -> None:
    its = layer(3, reads=reads, makes=makes, divides=divides)
    inputs, outputs = rotation_from(torch.randn(4, 4)), rotation_from(torch.randn(3, 3))
    found = float(salience_entropy(its, {0: inputs, 10: outputs}))
    assert found == pytest.approx(slow_entropy(its, inputs, outputs), rel=1e-4)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("keeps_mean", [True, False])
def test_a_free_matrix_stands_for_an_orthogonal_one(size: int, keeps_mean: bool) -> None:
    free = torch.randn(size - keeps_mean, size - keeps_mean, dtype=torch.float64)
    found = rotation_from(free, keeps_mean=keeps_mean)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if keeps_mean:
        torch.testing.assert_close(found.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)
    identity = rotation_from(torch.eye(size - keeps_mean, dtype=torch.float64), keeps_mean=keeps_mean)
    torch.testing.assert_close(identity, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keeps_mean", [True, False])
def test_learning_lowers_the_entropy_and_repeats(keeps_mean: bool) -> None:
    layers = [layer(seed) for seed in range(4)]
    sizes = {0: (4, keeps_mean), 10: (3, False)}
    start = {0: torch.eye(4), 10: torch.eye(3)}
    steps: list[None] = []

    def learned(seed: int) -> dict[int, Tensor]:
        return learn_rotations(
            sizes, layers, steps=30, lr=0.05, layers_per_step=2, seed=seed, advance=lambda: steps.append(None)
        )  # fmt: skip

    found, again, other = learned(0), learned(0), learned(1)
    assert len(steps) == 90
    assert sum(entropies(layers, found)) < sum(entropies(layers, start))
    assert all(torch.equal(found[number], again[number]) for number in sizes)
    assert not torch.equal(found[0], other[0])
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_what_does_not_lower_the_entropy_is_not_taken() -> None:
    """Rows with a single weight cannot be concentrated further."""
    its = TurnedLayer(
        weight_OI=torch.eye(4), metric_II=torch.eye(4), divides=True, reads={0: torch.arange(4)[:, None]}, makes={}
    )  # fmt: skip
    found = learn_rotations({0: (4, False)}, [its], steps=5, lr=0.3, layers_per_step=1, seed=0)
    assert torch.equal(found[0], torch.eye(4, dtype=torch.float64))
