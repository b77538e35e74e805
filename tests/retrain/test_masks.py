"""Masks that move: which weights they keep, what they count, and what stands behind them."""

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from tests.retrain.runs import sparse
from torch import Tensor

from sparsepass.graph import SparsepassError
from sparsepass.passes.maths.pattern import NMPattern, is_nm, nm_mask
from sparsepass.retrain import masks
from sparsepass.retrain.masks import MaskedSite, MovingMasks, magnitude_mask, pack, put_behind
from sparsepass.retrain.student import masked_sites

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 2), NMPattern(3, 20)]
# Layouts of weights -> a tiny model that has them. Each is masked by magnitude only.
LAYOUTS = {"linear": "llama", "conv1d_hf": "gpt2", "experts": "mixtral", "conv2d": "convnet"}


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, NMPattern]:
    """Weights of a few values, so that many tie; zeros and infinities among them."""
    pattern = draw(st.sampled_from(PATTERNS))
    shape = draw(st.sampled_from([(1,), (3,), (2, 3), (0,)]))
    num_groups = draw(st.integers(1, 3))
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.5, float("inf")])
    seed = draw(st.integers(0, 1000))
    index = torch.randint(len(values), (*shape, num_groups * pattern.m), generator=torch.Generator().manual_seed(seed))
    return values[index], pattern


@given(weights())
def test_the_largest_are_kept(case: tuple[Tensor, NMPattern]) -> None:
    weight, pattern = case
    assert torch.equal(magnitude_mask(weight, pattern), nm_mask(weight.abs(), pattern))


@given(weights(), st.one_of(st.sampled_from(["original", "zeros", "clipped"]), st.floats(0, 1)), st.integers(0, 100))
def test_kept_weights_are_untouched_whatever_stands_behind(
    case: tuple[Tensor, NMPattern], behind: str | float, seed: int
) -> None:
    weight, pattern = case
    weight = weight.nan_to_num(posinf=3.0)
    mask = nm_mask(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)), pattern)
    before = weight.clone()
    found = put_behind(weight, mask, behind, pattern)
    assert torch.equal(weight, before)
    assert torch.equal(found[mask], weight[mask])
    if behind == "original":
        assert torch.equal(found, weight)
    elif behind == "zeros":
        assert not found[~mask].any()
    elif behind == "clipped":
        kept, size = mask.unflatten(-1, (-1, pattern.m)), found.abs().unflatten(-1, (-1, pattern.m))
        smallest = size.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
        assert (size.masked_fill(kept, 0) <= 0.99 * smallest).all()
        assert (found * weight >= 0).all()  # signs stay
    else:
        assert torch.equal(found[~mask], weight[~mask] * float(behind))


@given(st.integers(0, 1000), st.sampled_from(PATTERNS))
def test_the_first_refresh_keeps_the_mask_of_a_criterion_if_clipped(seed: int, pattern: NMPattern) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2 * pattern.m, generator=generator)
    mask = nm_mask(torch.rand(weight.shape, generator=generator), pattern)
    assert torch.equal(magnitude_mask(put_behind(weight, mask, "clipped", pattern), pattern), mask)
    if seed == 0:
        assert not torch.equal(magnitude_mask(weight, pattern), mask)


def moving(layout: str) -> MovingMasks:
    """The masks of a tiny model."""
    program = sparse(LAYOUTS[layout], "nm_sparsify")
    sites = {
        name: MaskedSite(site=site, pattern=pattern, weight=program.tensor(name), mask=program.tensor(mask))
        for name, (site, pattern, mask) in masked_sites(program).items()
    }
    assert layout in {known.site.layout for known in sites.values()}
    return MovingMasks(sites)


def slow_mask(known: MaskedSite) -> Tensor:
    """The mask of each group by sorting, written into the stored layout weight by weight."""
    rows = known.site.to_matrix(known.weight.detach()).reshape(-1, known.pattern.m).tolist()
    kept = [sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[: known.pattern.n] for row in rows]
    flat = torch.tensor([[i in group for i in range(known.pattern.m)] for group in kept])
    return known.site.from_matrix(flat.reshape(known.site.to_matrix(known.weight).shape))


@pytest.mark.parametrize("piece", [64, 1 << 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refresh_counts_what_flips(layout: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_CPU_PIECE", piece)
    moved = moving(layout)
    first = {name: known.mask.clone() for name, known in moved.sites.items()}
    total = 0
    for size in (0.01, 0.03, 0.0):
        last = {name: known.mask.clone() for name, known in moved.sites.items()}
        with torch.no_grad():
            for known in moved.sites.values():
                known.weight.add_(torch.randn(known.weight.shape), alpha=size)
        flips = moved.refresh()
        moved.check()
        for name, known in moved.sites.items():
            assert torch.equal(known.mask, slow_mask(known)), name
            assert is_nm(known.mask, known.pattern, known.site.nm_axis)
            assert flips[name].since_last == sum(
                a != b for a, b in zip(last[name].flatten(), known.mask.flatten(), strict=True)
            )
            assert flips[name].since_first == int((known.mask != first[name]).sum())
            assert flips[name].num_entries == known.weight.numel()
            total += flips[name].since_last
        if not size:
            assert all(found.since_last == 0 for found in flips.values())
    assert total


def test_a_process_without_rows_of_its_own_counts_nothing() -> None:
    known = next(iter(moving("linear").sites.values()))
    empty = MaskedSite(site=known.site, pattern=known.pattern, weight=known.weight[:0], mask=known.mask[:0])
    moved = MovingMasks({"none": empty})
    found = moved.refresh()["none"]
    moved.check()
    assert (found.since_last, found.since_first, found.num_entries) == (0, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_mask_is_found(layout: str) -> None:
    moved = moving(layout)
    name, known = list(moved.sites.items())[-1]
    group = torch.zeros(known.site.to_matrix(known.mask).shape, dtype=torch.bool)
    group[..., -1, : known.pattern.n + 1] = True  # the first groups of the last rows
    known.mask.logical_or_(known.site.from_matrix(group))
    with pytest.raises(SparsepassError, match=rf"the mask of {name} breaks 2:4 in \d+ groups"):
        moved.check()


@given(st.lists(st.booleans(), max_size=40))
def test_packed_bits_are_the_bits(bits: list[bool]) -> None:
    packed = pack(torch.tensor(bits, dtype=torch.bool))
    assert [bool(packed[i // 8] >> i % 8 & 1) for i in range(len(bits))] == bits
    assert int(masks._count_bits(packed)) == sum(bits)


def test_masks_of_any_shape_are_packed() -> None:
    mask: Any = torch.rand(3, 5, 7) > 0.5
    assert torch.equal(pack(mask), pack(mask.flatten()))
    assert torch.equal(pack(mask.transpose(0, 2)), pack(mask.transpose(0, 2).flatten()))
    part = mask.flatten()[3:19]  # eight at a time, but not from the start of their memory
    assert torch.equal(pack(part), pack(part.clone()))
