"""Mask packs: bits, round trips, the right model and no other, domains on one set of weights."""

import copy
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st
from tests.families import BY_NAME, captured

from sparsepass.graph import Program, SparsepassError
from sparsepass.passes import NMSparsify, apply_passes
from sparsepass.passes.masks.differences import compare_masks
from sparsepass.passes.masks.pack import MaskPack, PackedMask, num_words, pack_mask, pack_program, unpack_mask
from sparsepass.passes.maths.pattern import NMPattern


def random_mask(rows: int, groups: int, n: int, m: int, seed: int = 0) -> torch.Tensor:
    """Exactly n of m true, group by group."""
    score = torch.rand(rows, groups, m, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(rows, groups, m, dtype=torch.bool).scatter_(2, score.topk(n).indices, True).reshape(rows, groups * m)


@given(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (2, 16), (8, 16)]),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_every_mask_comes_back(pattern: tuple[int, int], rows: int, groups: int, seed: int) -> None:
    known = NMPattern(*pattern)
    mask = random_mask(rows, groups, *pattern, seed=seed)
    words = pack_mask(mask, known)
    assert words.dtype == torch.int64
    assert words.shape == (num_words(mask.shape, known),)
    assert torch.equal(unpack_mask(words, known, mask.shape), mask)


def test_all_candidates_of_one_word_come_back() -> None:
    """The largest number a word can hold: every digit the last candidate."""
    for n, m in ((2, 4), (4, 8), (8, 16)):
        per_word = int(63 / math.log2(math.comb(m, n)))
        mask = torch.tensor([[entry >= m - n for entry in range(m)] * per_word])
        words = pack_mask(mask, NMPattern(n, m))
        assert words.tolist() == [math.comb(m, n) ** per_word - 1]
        assert torch.equal(unpack_mask(words, NMPattern(n, m), mask.shape), mask)


def test_2_4_takes_two_thirds_of_a_bit_a_weight() -> None:
    mask = random_mask(576, 384, 2, 4)
    assert 64 * pack_mask(mask, NMPattern(2, 4)).numel() / mask.numel() == pytest.approx(2 / 3)


def test_what_a_pack_cannot_hold_is_refused() -> None:
    with pytest.raises(SparsepassError, match="holds exactly 2 of 4, and a group keeps another number"):
        pack_mask(torch.tensor([[True, False, False, False]]), NMPattern(2, 4))
    with pytest.raises(SparsepassError, match="up to 16 entries a group, not 16:32"):
        pack_mask(torch.ones(1, 32, dtype=torch.bool), NMPattern(16, 32))
    with pytest.raises(SparsepassError, match="has no masks; apply nm_sparsify first"):
        pack_program(captured("llama"))
    with pytest.raises(SparsepassError, match="is folded into its weight"):
        pack_program(apply_passes(captured("llama"), ["nm_sparsify", "fold"]))


def packed(program: Program, path: Path) -> Path:
    pack_program(program).save(path)
    return path


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "convnet"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_a_pack_gives_the_program_it_came_from(name: str, pattern: str, tmp_path: Path) -> None:
    """Every layout: nn.Linear, Conv1D, experts, convolutions."""
    program = apply_passes(captured(name), NMSparsify(criterion="magnitude", pattern=pattern))
    path = packed(program, tmp_path / "masks.safetensors")
    again = apply_passes(captured(name), f'nm_sparsify{{masks="{path}"}}')
    assert again.sparse == program.sparse
    assert all(torch.equal(again.tensor(key), tensor) for key, tensor in program.tensors().items())
    inputs = BY_NAME[name].inputs(2, 6)
    expected, found = program(**inputs), again(**inputs)
    if not isinstance(expected, torch.Tensor):
        expected, found = expected.logits, found.logits
    assert torch.equal(expected, found)
    # In a file of its own the recipe reads the same, and the report names what has no mask.
    assert str(path) in again.recipe
    assert again.report().num_sparse == program.report().num_sparse


def test_slorb_and_fold_follow_a_pack(tmp_path: Path) -> None:
    path = packed(apply_passes(captured("llama"), "nm_sparsify"), tmp_path / "m.safetensors")
    program = apply_passes(captured("llama"), f'nm_sparsify{{masks="{path}"}},slorb{{k=8}},fold')
    assert all(state.branch is not None and state.mask is None for state in program.sparse.values())
    with pytest.raises(SparsepassError, match="folded"):
        pack_program(program)
    # A branch is no part of a pack, and does not keep it from being made.
    branched = apply_passes(captured("llama"), "nm_sparsify,slorb{k=8,projection=trainable}")
    assert pack_program(branched).dense_digest == MaskPack.load(path).dense_digest


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = packed(apply_passes(captured("llama"), "nm_sparsify"), tmp_path / "m.safetensors")
    text = f'nm_sparsify{{masks="{path}"}}'

    other = captured("llama")
    name = next(iter(MaskPack.load(path).masks))
    with torch.no_grad():
        other.tensor(name).mul_(1.5)
    with pytest.raises(SparsepassError, match=rf"other values of 1 of its \d+ weights \(the first is {name}\).*any_model=true"):
        apply_passes(other, text)
    masked = apply_passes(other, f'nm_sparsify{{masks="{path}",any_model=true}}')
    assert pack_program(masked).masks[name].digest != MaskPack.load(path).masks[name].digest
    assert torch.equal(pack_program(masked).masks[name].words, MaskPack.load(path).masks[name].words)

    # A parameter without a mask counts too: the logits would differ.
    other = captured("llama")
    norm = next(key for key, _ in other.graph_module.named_parameters() if "norm" in key)
    with torch.no_grad():
        other.tensor(norm).add_(1)
    with pytest.raises(SparsepassError, match="other values of parameters beside the masked weights"):
        apply_passes(other, text)

    with pytest.raises(SparsepassError, match="masks for 14 weights that this model does not have, such as"):
        apply_passes(captured("gpt2"), text.replace("}", ",any_model=true}"))
    with pytest.raises(SparsepassError, match="other values"):
        apply_passes(BY_NAME["llama"].model().to(torch.bfloat16), text)


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
def test_the_same_values_in_another_type_are_the_same_model(made_in: torch.dtype, tmp_path: Path) -> None:
    """Training in float32 widens a bfloat16 model; its masks are for that model, too."""
    narrow = BY_NAME["llama"].model().to(torch.bfloat16)
    path = packed(apply_passes(copy.deepcopy(narrow).to(made_in), "nm_sparsify"), tmp_path / "m.safetensors")
    used_in = torch.bfloat16 if made_in == torch.float32 else torch.float32
    program = apply_passes(copy.deepcopy(narrow).to(used_in), f'nm_sparsify{{masks="{path}"}}')
    assert all(torch.equal(known.words, program_mask.words) for known, program_mask in _pairs(MaskPack.load(path), program))
    other = copy.deepcopy(narrow).to(used_in)
    with torch.no_grad():
        other.get_parameter("model.norm.weight")[0] += 0.5
    with pytest.raises(SparsepassError, match="other values of parameters beside"):
        apply_passes(other, f'nm_sparsify{{masks="{path}"}}')


def _pairs(pack: MaskPack, program: Program) -> list[tuple[PackedMask, PackedMask]]:
    found = pack_program(program).masks
    assert found.keys() == pack.masks.keys()
    return [(pack.masks[name], found[name]) for name in found]


def test_compensated_weights_are_not_in_a_pack(tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    program = apply_passes(captured("llama"), "nm_sparsify{criterion=sparsegpt}", calibration=ids)
    path = packed(program, tmp_path / "m.safetensors")
    with pytest.raises(SparsepassError, match=r"its passes \(nm_sparsify\{.*sparsegpt.*\) changed, which a pack does not hold"):
        apply_passes(captured("llama"), f'nm_sparsify{{masks="{path}"}}')


def test_domains_on_one_set_of_weights(tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    general = pack_program(apply_passes(captured("llama"), "nm_sparsify{criterion=magnitude}"), about="general")
    domain = pack_program(apply_passes(captured("llama"), "nm_sparsify{criterion=wanda}", calibration=ids), about="code")
    found = compare_masks(general, domain)
    for difference in found:
        a, b = (pack.masks[difference.weight].mask() for pack in (general, domain))
        assert difference.num_flipped == int((a != b).sum())
        assert difference.overlap == pytest.approx(float((a & b).sum() / a.sum()))
    assert any(difference.num_flipped for difference in found)
    assert all(difference.overlap == 1 for difference in compare_masks(general, general))
    one = pack_program(
        apply_passes(captured("llama"), NMSparsify(targets=(next(iter(general.masks)).removesuffix(".weight"),)))
    )
    with pytest.raises(SparsepassError, match="masks of different weights"):
        compare_masks(general, one)
    quarter = pack_program(apply_passes(captured("llama"), "nm_sparsify{pattern=1:4}"))
    with pytest.raises(SparsepassError, match=r"is 2:4 of shape .* in one pack and 1:4"):
        compare_masks(general, quarter)


def test_files_that_are_no_packs(tmp_path: Path) -> None:
    with pytest.raises(SparsepassError, match="there is no mask pack"):
        apply_passes(captured("llama"), f'nm_sparsify{{masks="{tmp_path}/nowhere"}}')
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(SparsepassError, match="is no mask pack"):
        MaskPack.load(tmp_path / "other")
    path = packed(apply_passes(captured("llama"), "nm_sparsify"), tmp_path / "m.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SparsepassError, match="cannot be read as a safetensors file"):
        MaskPack.load(path)
    path.write_bytes(whole.replace(b'version\\": 1', b'version\\": 9'))
    with pytest.raises(SparsepassError, match="version 9 of the format"):
        MaskPack.load(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SparsepassError, match="cannot be written"):
        pack_program(apply_passes(captured("llama"), "nm_sparsify")).save(tmp_path / "m.safetensors" / "deeper")
    assert sorted(tmp_path.iterdir()) == before


def test_masks_and_criterion_exclude_each_other() -> None:
    with pytest.raises(SparsepassError, match="masks come from a or from the criterion wanda"):
        NMSparsify(masks="a", criterion="wanda")
    with pytest.raises(SparsepassError, match="any_model speaks of a mask pack"):
        NMSparsify(any_model=True)
