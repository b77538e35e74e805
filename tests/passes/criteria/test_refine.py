"""Kept weights moved to their best values: the mathematics, and the option of nm_sparsify."""

import math

import pytest
import torch
from tests.families import BY_NAME, captured
from tests.layers import check_form, inputs, output_error, random, statistics_of

import sparsepass.passes.criteria.criterion as module
from sparsepass.graph import PassError
from sparsepass.graph.support.errors import SparsepassError
from sparsepass.passes import NMSparsify, apply_passes
from sparsepass.passes.criteria.refinement import refine, solve_on_support
from sparsepass.passes.criteria.table import CRITERIA, CriterionOptions, Pruned
from sparsepass.passes.maths.pattern import NMPattern
from sparsepass.passes.maths.statistics import InputStatistics

pytestmark = pytest.mark.numerics

P24 = NMPattern(2, 4)
DEFAULT = CriterionOptions()


def test_conjugate_gradients_solve_each_row_on_its_support() -> None:
    weight_OI, statistics = random(5, 24), statistics_of(inputs(100, 24))
    assert statistics.gram_II is not None
    gram_II = statistics.gram_II.double()
    gram_II = gram_II / torch.outer(gram_II.diagonal().sqrt(), gram_II.diagonal().sqrt())
    support_IO = (random(24, 5, seed=3) > 0) & (torch.arange(5) > 0)  # the first row keeps nothing
    start_IO, goal_IO = weight_OI.T * support_IO, gram_II @ weight_OI.T
    residual_IO = goal_IO - gram_II @ start_IO
    solved_IO = solve_on_support(start_IO, support_IO, residual_IO, gram_II, num_steps=40)
    for row in range(5):
        at = support_IO[:, row]
        expected = torch.linalg.solve(gram_II[at][:, at], goal_IO[at, row])
        torch.testing.assert_close(solved_IO[at, row], expected, rtol=1e-6, atol=1e-8)
    assert not bool(solved_IO[~support_IO].any())
    # every step makes the error smaller, in fp32 too
    errors = []
    for num_steps in (0, 1, 3, 10):
        few_IO = solve_on_support(start_IO.float(), support_IO, residual_IO.float(), gram_II.float(), num_steps=num_steps)
        missing_OI = weight_OI - few_IO.T.double()
        errors.append(float(((missing_OI @ gram_II) * missing_OI).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_many_steps_equal_the_least_squares_of_each_row(name: str) -> None:
    weight_OI, x_TI = random(6, 32, dtype=torch.float64), inputs(200, 32).double()
    x_TI[:, 5] = 0  # a dead feature gets no weight
    statistics = statistics_of(x_TI)
    pruned = CRITERIA[name].function(weight_OI, statistics, P24, DEFAULT)
    refined = refine(weight_OI, pruned, statistics, damping=0.01, num_steps=60)
    check_form(weight_OI, refined, P24)
    assert torch.equal(refined.mask_OI, pruned.mask_OI)
    assert statistics.gram_II is not None
    gram_II = statistics.gram_II.double()
    damped_II = gram_II + torch.eye(32) * (0.01 * float(gram_II.diagonal().sum()) / 31)
    for row, (w_I, mask_I) in enumerate(zip(weight_OI, refined.mask_OI, strict=True)):
        at = mask_I & (torch.arange(32) != 5)
        alive_I = w_I * (torch.arange(32) != 5)
        expected = torch.linalg.solve(damped_II[at][:, at], (damped_II @ alive_I)[at])
        torch.testing.assert_close(refined.weight_OI[row, at], expected, rtol=1e-5, atol=1e-7)
    assert not bool(refined.weight_OI[:, 5].any())
    before, after = (((w @ damped_II) * w).sum() for w in (weight_OI - pruned.weight_OI, weight_OI - refined.weight_OI))
    assert float(after) <= float(before) * (1 + 1e-9)


def test_ten_steps_leave_less_error_than_sparsegpt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, x_TI = random(24, 96).float(), inputs(400, 96).float()
    statistics = statistics_of(x_TI)
    pruned = CRITERIA["sparsegpt"].function(weight_OI, statistics, P24, DEFAULT)
    refined = refine(weight_OI, pruned, statistics, damping=0.01, num_steps=10)
    monkeypatch.setattr(module, "PIECE_WEIGHTS", 5 * 96)
    in_pieces = refine(weight_OI, pruned, statistics, damping=0.01, num_steps=10)
    torch.testing.assert_close(in_pieces.weight_OI, refined.weight_OI)
    best = refine(weight_OI.double(), pruned, statistics, damping=0.01, num_steps=400)
    before, after, least = (output_error(weight_OI, p.weight_OI, x_TI) for p in (pruned, refined, best))
    assert least <= after < before
    assert before - after > 0.8 * (before - least), (before, after, least)


def test_what_cannot_be_refined_is_refused() -> None:
    weight_OI, statistics = random(3, 8), statistics_of(inputs(40, 8))
    pruned = CRITERIA["magnitude"].function(weight_OI, None, P24, DEFAULT)
    with pytest.raises(SparsepassError, match="needs the inputs' Gram matrix"):
        refine(weight_OI, pruned, InputStatistics(num_tokens=1, sum_squares_I=torch.ones(8)), damping=0.01, num_steps=2)
    broken = InputStatistics(num_tokens=1, gram_II=torch.full((8, 8), math.nan))
    with pytest.raises(SparsepassError, match="NaN or Inf"):
        refine(weight_OI, pruned, broken, damping=0.01, num_steps=2)
    with pytest.raises(SparsepassError, match=r"one \[out, in\] matrix"):
        refine(random(2, 3, 8), pruned, statistics, damping=0.01, num_steps=2)
    copies = InputStatistics(num_tokens=1, gram_II=torch.ones(4, 4))
    large = torch.full((1, 4), 6e4, dtype=torch.float16)
    mask = torch.tensor([[True, False, False, False]])
    with pytest.raises(SparsepassError, match=r"do not fit torch\.float16"):
        refine(large, Pruned(weight_OI=large * mask, mask_OI=mask), copies, damping=0.01, num_steps=4)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_the_option_keeps_the_mask_of_the_first_layers_and_lowers_every_error(criterion: str) -> None:
    batches = BY_NAME["llama"].inputs(4, 24)
    plain, refined = (
        apply_passes(captured("llama"), [NMSparsify(criterion=criterion, refine=steps)], calibration=batches)
        for steps in (0, 6)
    )
    assert f"criterion={criterion}" in refined.recipe
    assert "refine=6" in refined.recipe
    first = [site.weight for site in plain.sites() if site.weight in plain.sparse][:3]  # q, k and v see the same inputs in both
    for weight in first:
        assert torch.equal(plain.tensor(str(plain.sparse[weight].mask)), refined.tensor(str(refined.sparse[weight].mask)))
        assert not torch.equal(plain.tensor(weight), refined.tensor(weight))
    facts = [{o.site: o.facts for o in program.history[0].outcomes} for program in (plain, refined)]
    if criterion == "sparsegpt":  # without refine, the others' error is measured without the Gram matrix, and is another one
        for weight in first:
            name = weight.removesuffix(".weight")
            assert float(facts[1][name]["relative_error"]) < float(facts[0][name]["relative_error"])
    errors = [program.history[0].validation["relative_error"] for program in (plain, refined)]  # type: ignore[index]
    assert errors[1] < errors[0]


def test_experts_are_refined_by_the_tokens_that_reached_them() -> None:
    batches = BY_NAME["mixtral"].inputs(4, 24)
    plain, refined = (
        apply_passes(captured("mixtral"), [NMSparsify(criterion="sparsegpt", refine=steps)], calibration=batches)
        for steps in (0, 6)
    )
    experts = [weight for weight in refined.sparse if refined.tensor(weight).dim() == 3]
    assert experts
    assert all(not torch.equal(plain.tensor(weight), refined.tensor(weight)) for weight in experts)


def test_the_option_goes_with_calibration_and_with_weights_that_may_change() -> None:
    with pytest.raises(SparsepassError, match="calibration"):
        apply_passes(captured("llama"), "nm_sparsify{refine=4}")
    with pytest.raises(SparsepassError, match="0 or more"):
        NMSparsify(refine=-1)
    with pytest.raises(SparsepassError, match="compensate=false"):
        NMSparsify(criterion="sparsegpt", compensate=False, refine=4)
    with pytest.raises(SparsepassError, match="masks"):
        NMSparsify(masks="pack.safetensors", refine=4)
    batches = BY_NAME["llama"].inputs(4, 16)
    with pytest.raises(PassError, match="original weights"):
        apply_passes(captured("llama"), "nm_sparsify{criterion=wanda,refine=4},learn_masks", calibration=batches)
    program = apply_passes(captured("llama"), "nm_sparsify{criterion=wanda,refine=4}", calibration=batches)
    with pytest.raises(PassError, match="original weights"):
        apply_passes(program, "slorb{k=4}", calibration=batches)
