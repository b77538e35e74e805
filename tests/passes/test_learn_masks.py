"""The pass `learn_masks`: how logits start, what the program computes, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from tests.families import BY_NAME, captured, tensors_of
from torch import Tensor

from sparsepass.graph import PassError, Program, SparsepassError
from sparsepass.graph.rewrite import attach_mask
from sparsepass.graph.soft_masks import hard_mask, num_candidates
from sparsepass.passes import apply_passes
from sparsepass.passes.masks.pack import pack_program
from sparsepass.passes.maths.pattern import NMPattern, add_prior, first_logits, nm_mask

CPU = torch.device("cpu")
DOWN = "model.layers.0.mlp.down_proj.weight"
BATCHES = BY_NAME["llama"].inputs(4, 16)


def masks(program: Program) -> dict[str, Tensor]:
    return {name: program.tensor(str(state.mask)) for name, state in program.sparse.items()}


def logits(program: Program) -> dict[str, Tensor]:
    return {
        name: program.tensor(state.learned.logits).detach()
        for name, state in program.sparse.items()
        if state.learned is not None
    }


def outputs(program: Program, name: str = "llama") -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_of(program(**BY_NAME[name].inputs(3, 7))))


@given(
    st.integers(0, 1000), st.sampled_from([NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(2, 3)]), st.floats(0, 9)
)
def test_the_prior_is_the_formula(seed: int, pattern: NMPattern, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    pi = torch.randn(3, num_candidates(pattern.n, pattern.m), 2, generator=generator, dtype=torch.float64)
    mask = nm_mask(torch.rand(3, 2 * pattern.m, generator=generator), pattern)
    found = add_prior(pi, mask, pattern, alpha)
    mean = sum(pi.flatten().tolist()) / pi.numel()
    std = (sum((x - mean) ** 2 for x in pi.flatten().tolist()) / (pi.numel() - 1)) ** 0.5
    for row in range(3):
        for group in range(2):
            kept = mask[row, pattern.m * group : pattern.m * (group + 1)].tolist()
            for number in range(pi.shape[1]):
                one = torch.zeros(pi.shape[1], 1)
                one[number] = 1
                candidate = hard_mask(one, pattern.n, pattern.m).tolist()
                both = sum(a and b for a, b in zip(kept, candidate, strict=True))
                expected = float(pi[row, number, group]) + std * (both - pattern.n**2 / pattern.m) * alpha
                assert float(found[row, number, group]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    # N^2 / M is the mean over the candidates: what a group has in all stays.
    assert torch.allclose(found.sum(1), pi.sum(1))


def test_a_strong_prior_is_the_mask_and_none_is_not() -> None:
    pattern = NMPattern(2, 4)
    mask = nm_mask(torch.rand(64, 32), pattern)
    start = first_logits((64,), 8, pattern, std=0.01, seed=3, device=CPU)
    assert float(start.std()) == pytest.approx(0.01, rel=0.05)
    assert torch.equal(start, first_logits((64,), 8, pattern, std=0.01, seed=3, device=CPU))
    assert not torch.equal(start, first_logits((64,), 8, pattern, std=0.01, seed=4, device=CPU))
    assert torch.equal(hard_mask(add_prior(start, mask, pattern, 30.0), 2, 4), mask)
    assert torch.equal(add_prior(start, mask, pattern, 0.0), start)
    moved = float((hard_mask(add_prior(start, mask, pattern, 3.0), 2, 4) != mask).double().mean())
    assert 0.005 < moved < 0.1  # at the paper's strength the noise moves some groups


def test_a_prior_of_another_pattern_is_refused() -> None:
    with pytest.raises(SparsepassError, match="a prior for learned 2:4 masks keeps exactly 2 of every 4 weights"):
        add_prior(torch.zeros(1, 6, 1), torch.tensor([[True, False, False, False]]), NMPattern(2, 4), 3.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "convnet"])
def test_the_program_computes_with_the_hard_masks(name: str) -> None:
    pruned = apply_passes(captured(name), "nm_sparsify")
    program = apply_passes(pruned, "learn_masks{alpha=1.0}")
    sites = {site.weight: site for site in program.sites()}
    plain = copy.deepcopy(captured(name))
    moved = 0
    for weight, pi in logits(program).items():
        site = sites[weight]
        mask = hard_mask(pi, 2, 4).movedim(-1, site.nm_axis)
        assert torch.equal(mask, masks(program)[weight])
        assert torch.equal(program.tensor(weight), captured(name).tensor(weight))
        moved += int((mask != masks(pruned)[weight]).sum())
        attach_mask(plain, site, mask.contiguous(), "2:4")
    assert moved > 0
    plain.graph_module.recompile()
    assert all(torch.equal(a, b) for a, b in zip(outputs(program, name), outputs(plain, name), strict=True))
    shares = [o.facts["moved_from_prior"] for o in program.history[-1].outcomes if o.action == "rewritten"]
    assert sum(float(share) for share in shares) > 0


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:4", "1:2", "2:16"])
def test_any_pattern(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    pruned = apply_passes(captured("llama"), f"nm_sparsify{{pattern={pattern}}}")
    program = apply_passes(pruned, "learn_masks{alpha=50}")
    assert logits(program)[DOWN].shape == (32, num_candidates(n, m), 64 // m)
    assert all(torch.equal(mask, masks(pruned)[name]) for name, mask in masks(program).items())


def test_too_many_candidates_are_refused() -> None:
    with pytest.raises(PassError, match=r"no layer can be rewritten .*8:16 has 12870 candidate masks.*at most 128"):
        apply_passes(captured("llama"), "nm_sparsify{pattern=8:16},learn_masks")


def test_the_mask_of_a_criterion_over_the_original_weights() -> None:
    dense = captured("llama")
    text = "nm_sparsify{criterion=sparsegpt,compensate=false},learn_masks{alpha=50}"
    program = apply_passes(dense, text, calibration=BATCHES)
    chosen = apply_passes(dense, "nm_sparsify{criterion=sparsegpt,compensate=false}", calibration=BATCHES)
    for name, mask in masks(program).items():
        assert torch.equal(mask, masks(chosen)[name])
        assert torch.equal(program.tensor(name), dense.tensor(name))
        assert torch.equal(chosen.tensor(name), dense.tensor(name))
    # It is SparseGPT's choice: in the first layers, which see the same inputs, its very mask.
    compensated = apply_passes(dense, "nm_sparsify{criterion=sparsegpt}", calibration=BATCHES)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(masks(chosen)[first], masks(compensated)[first])
    assert not torch.equal(compensated.tensor(first), dense.tensor(first))
    magnitude = apply_passes(dense, "nm_sparsify{criterion=magnitude}")
    assert not torch.equal(masks(chosen)[first], masks(magnitude)[first])


def test_the_prior_may_be_a_mask_pack(tmp_path: Path) -> None:
    compensated = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=BATCHES)
    pack_program(compensated).save(tmp_path / "masks.safetensors")
    text = f'nm_sparsify{{masks="{tmp_path / "masks.safetensors"}",any_model=true}},learn_masks{{alpha=50}}'
    program = apply_passes(captured("llama"), text)
    assert all(torch.equal(mask, masks(compensated)[name]) for name, mask in masks(program).items())
    assert all(torch.equal(program.tensor(name), captured("llama").tensor(name)) for name in program.sparse)


def test_packs_fold_and_models_take_the_hard_masks() -> None:
    program = apply_passes(captured("llama"), "nm_sparsify,learn_masks{alpha=2}")
    pack = pack_program(program)
    assert all(torch.equal(pack.masks[name].mask(), mask) for name, mask in masks(program).items())
    folded = apply_passes(program, "fold")
    assert not any("mask" in name for name in folded.tensors())
    assert all(state.learned is None for state in folded.sparse.values())
    # Without masks and logits the pack's model is the dense one.
    pack.check_model(captured("llama"))
    model = program.to_model()
    with torch.no_grad():
        assert torch.allclose(model(**BY_NAME["llama"].inputs(3, 7)).logits, outputs(program)[0], atol=1e-5)


def test_each_layer_starts_the_same_whatever_is_learned_besides() -> None:
    everything = apply_passes(captured("llama"), "nm_sparsify,learn_masks")
    some = apply_passes(captured("llama"), 'nm_sparsify,learn_masks{targets="*.mlp.*"}')
    assert set(logits(some)) == {name for name in logits(everything) if ".mlp." in name}
    assert all(torch.equal(pi, logits(everything)[name]) for name, pi in logits(some).items())
    rest = apply_passes(some, 'learn_masks{targets="*.self_attn.*"}')
    assert all(torch.equal(pi, logits(rest)[name]) for name, pi in logits(everything).items())
    other = apply_passes(captured("llama"), "nm_sparsify,learn_masks{seed=1}")
    assert not torch.equal(logits(other)[DOWN], logits(everything)[DOWN])


@pytest.mark.parametrize(
    ("passes", "calibration", "told"),
    [
        ("learn_masks", None, "put nm_sparsify before it"),
        ("nm_sparsify,fold,learn_masks", None, "put learn_masks before fold"),
        ("nm_sparsify,learn_masks,learn_masks", None, "learned already"),
        ("nm_sparsify,slorb{k=4},learn_masks", None, "learn the masks first"),
        ("nm_sparsify,learn_masks", BATCHES, r"write nm_sparsify\{criterion=sparsegpt,compensate=false\}"),
        (
            "nm_sparsify{criterion=magnitude},reconstruct{steps=1},learn_masks",
            BATCHES,
            "reconstruct changes them; leave it out",
        ),
        ("nm_sparsify,learn_masks{alpha=-1.0}", None, "alpha expects a number of at least 0"),
        ("nm_sparsify,learn_masks{init_std=0.0}", None, "init_std expects a number above 0"),
        (
            "nm_sparsify{targets=model.layers.0.mlp.*},learn_masks{targets=model.layers.1.*}",
            None,
            "no layer can be rewritten .*not among the targets",
        ),
    ],
)
def test_what_cannot_be_is_said(passes: str, calibration: Any, told: str) -> None:
    with pytest.raises(SparsepassError, match=told):
        apply_passes(captured("llama"), passes, calibration=calibration)


def test_what_earlier_runs_did_counts() -> None:
    pruned = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=BATCHES)
    with pytest.raises(PassError, match=r"compensate=false"):
        apply_passes(pruned, "learn_masks")
    chosen = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt,compensate=false}", calibration=BATCHES)
    assert apply_passes(chosen, "learn_masks").history[-1].num_rewritten == 14
    with_branches = apply_passes(captured("llama"), "nm_sparsify,slorb{k=4}")
    with pytest.raises(PassError, match=r"no layer can be rewritten .*SLoRB branch"):
        apply_passes(with_branches, "learn_masks")
