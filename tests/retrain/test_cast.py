"""CAST's scales: what they multiply, and that nothing is left of them once they are folded in."""

import copy

import pytest
import torch
from tests.families import BY_NAME
from tests.retrain.runs import masks, sparse

from sparsepass.graph import Program, Site
from sparsepass.retrain.student import masked_sites
from sparsepass.retrain.trainee import attach_scales, fold_scales


def sites_of(program: Program) -> dict[str, Site]:
    return {name: site for name, (site, _, _) in masked_sites(program).items()}


def attached(name: str, recipe: str = "nm_sparsify") -> tuple[Program, dict[str, str]]:
    """A tiny program with scales that are not one."""
    program = sparse(name, recipe)
    scales = attach_scales(program, sites_of(program).values())
    with torch.no_grad():
        for scale in scales.values():
            program.tensor(scale).normal_(mean=1.0, std=0.3)
    return program, scales


def slowly_scaled(program: Program, scales: dict[str, str], name: str) -> Program:
    """The program without scales, each of its weights multiplied one by one."""
    plain = sparse(name, program.recipe)
    for weight, scale in scales.items():
        site = sites_of(plain)[weight]
        half, factors = site.in_features // 2, program.tensor(scale).tolist()
        assert len(factors) == site.out_features
        tensor = plain.tensor(weight).detach()
        for out in range(site.out_features):
            for feature in range(site.in_features):
                place = (out, feature) if site.nm_axis == 1 else (feature, out)
                tensor[place] = tensor[place] * factors[out][feature // half]
    return plain


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_weight_is_scaled_by_its_half_of_the_row(name: str) -> None:
    program, scales = attached(name)
    assert set(scales) == set(program.sparse)
    inputs = BY_NAME[name].inputs(2, 9)
    expected = slowly_scaled(program, scales, name)(**inputs).logits
    found = program(**inputs).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, sparse(name, "nm_sparsify")(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "nm_sparsify,slorb{k=8}"), ("gpt2", "nm_sparsify"), ("mixtral", "nm_sparsify")]
)
def test_folding_leaves_the_graph_as_it_was(name: str, recipe: str) -> None:
    before = sparse(name, recipe)
    program, scales = attached(name, recipe)
    inputs = BY_NAME[name].inputs(2, 9)
    expected = program(**inputs).logits
    weights = {weight: program.tensor(weight).detach().clone() for weight in scales}
    fold_scales(program, scales, sites_of(before))
    before.graph_module.graph.eliminate_dead_code()
    assert str(program.graph_module.graph) == str(before.graph_module.graph)
    assert program.tensors().keys() == before.tensors().keys()
    assert torch.equal(program(**inputs).logits, expected)
    assert all(not torch.equal(program.tensor(weight), old) for weight, old in weights.items())
    assert copy.deepcopy(program).tensors().keys() == before.tensors().keys()


def test_experts_have_no_scales() -> None:
    _, scales = attached("mixtral")
    layouts = {name: site.layout for name, site in sites_of(sparse("mixtral", "nm_sparsify")).items()}
    assert {layouts[name] for name in scales} == {"linear"}
    assert {layouts[name] for name in set(layouts) - set(scales)} == {"experts"}


def test_the_gradient_of_a_scale_is_that_of_its_half_of_the_row() -> None:
    program, scales = attached("llama")
    for parameter in program.parameters():
        parameter.requires_grad_(True)
    for mask in masks(program).values():
        mask.fill_(True)
    program(**BY_NAME["llama"].inputs(2, 9)).logits.square().mean().backward()
    for weight, scale in scales.items():
        tensor, factors = program.tensor(weight), program.tensor(scale)
        assert tensor.grad is not None
        assert factors.grad is not None
        expected = (tensor.grad * tensor).unflatten(1, (2, -1)).sum(2) / factors
        assert tensor.grad.any()
        assert torch.allclose(factors.grad, expected, atol=1e-6)
