import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.graph.packed.weights import KINDS, packed_weight, sparse_weight
from torch import Tensor

from sparsepass import SparsepassError
from sparsepass.graph.packed import PackedWeight, check, pack, unpack


def slow_unpack(packed: PackedWeight) -> Tensor:
    """From the definition, one value after the other."""
    rows, columns = packed.shape
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for i in range(columns // 2):
            code = int(packed.codes[row, i // 4]) >> (2 * (i % 4)) & 3
            if packed.values == "int4":
                value = float((int(packed.kept[row, i // 2]) >> (4 * (i % 2)) & 15) - 8)
            else:
                value = float(packed.kept[row, i])
            column = i // 2 * 4 + code
            if packed.scales is not None:
                value *= float(packed.scales[row, column // (packed.group_size or columns)])
            weight[row, column] = value
    return weight


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 20),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_floats_come_back_bit_for_bit(rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    weight = sparse_weight(rows, 8 * groups, seed).to(dtype)
    weight.view(-1)[seed % weight.numel()] = 0.0
    packed = pack(weight, values="bf16" if dtype == torch.bfloat16 else "fp16")
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(slow_unpack(packed), weight.double())


@pytest.mark.parametrize(("values", "group_size"), [("int8", 0), ("int8", 32), ("int4", 0), ("int4", 16), ("int4", 128)])
@settings(max_examples=25)
@given(rows=st.integers(1, 4), groups=st.integers(1, 40), seed=st.integers(0, 1000), size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_integers_are_the_nearest_and_nothing_clips(
    values: str, group_size: int, rows: int, groups: int, seed: int, size: float
) -> None:
    weight = sparse_weight(rows, 8 * groups, seed) * size
    packed = pack(weight, values=values, group_size=group_size)  # type: ignore[arg-type]
    assert packed.scales is not None
    assert torch.equal(unpack(packed).double(), slow_unpack(packed).float().double())
    steps = packed.scales.float().repeat_interleave(group_size or weight.shape[1], 1)[:, : weight.shape[1]]
    assert ((unpack(packed) - weight).abs() <= steps * 0.5001).all()
    largest = 127 if values == "int8" else 7
    # The scale is less than one step of bfloat16 above the least that is possible.
    assert float(packed.scales.float().max()) <= float(weight.abs().max()) / largest * (1 + 2**-7)


def test_given_scales_are_kept_and_values_clip_at_them() -> None:
    weight = torch.tensor([[0, 3.0, 0, -90.0, 1, 0, 0, 2]])
    packed = pack(weight, values="int4", scales=torch.tensor([[2.0]]))
    assert unpack(packed).tolist() == [[0, 4, 0, -16, 0, 0, 0, 2]]  # 1.5 and 0.5 round to even


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse_weight(37, 64)
    whole = {values: pack(weight, values=values) for values in KINDS}
    monkeypatch.setattr("sparsepass.graph.packed.layout._CHUNK", 640)
    for values in KINDS:
        pieces = pack(weight, values=values)
        assert torch.equal(pieces.kept, whole[values].kept)
        assert torch.equal(pieces.codes, whole[values].codes)
        assert torch.equal(unpack(pieces), unpack(whole[values]))


def test_sizes_in_bytes() -> None:
    sizes = {values: packed_weight(64, 128, values).num_bytes / (64 * 128) for values in KINDS}
    assert sizes == {"bf16": 1.125, "fp16": 1.125, "int8": 0.625 + 2 / 128, "int4": 0.375 + 2 / 128}


def test_no_rows() -> None:
    assert unpack(pack(torch.zeros(0, 16), values="int8")).shape == (0, 16)


@pytest.mark.parametrize(
    ("weight", "options", "said"),
    [
        (torch.ones(2, 8), {}, "not 2:4: columns 0 to 3 of row 0"),
        (torch.zeros(2, 12), {}, "multiple of 8 columns, and this weight has 12"),
        (torch.zeros(2, 2, 8), {}, "two axes"),
        (torch.full((1, 8), torch.nan), {}, "not finite"),
        (torch.tensor([[1e30, 0, 0, 0, 0, 0, 0, 0]]), {"values": "fp16"}, "too large for fp16"),
        (torch.zeros(2, 8), {"values": "int2"}, "not 'int2'"),
        (torch.zeros(2, 8), {"group_size": 16}, "bf16 has no scales"),
        (torch.zeros(2, 8), {"values": "int8", "group_size": 24}, "16, 32, 64 or a multiple of 128"),
        (torch.zeros(2, 8), {"values": "int4", "group_size": 48}, "16, 32, 64 or a multiple of 128"),
        (torch.zeros(2, 8), {"values": "int8", "scales": torch.ones(2, 3)}, r"are \[2, 1\], and these are \[2, 3\]"),
        (torch.zeros(2, 8), {"values": "int8", "scales": torch.full((2, 1), torch.inf)}, "not finite"),
        (torch.zeros(2, 8), {"scales": torch.ones(2, 1)}, "not for bf16"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: Tensor, options: dict[str, object], said: str) -> None:
    with pytest.raises(SparsepassError, match=said):
        pack(weight, **options)  # type: ignore[arg-type]


def test_damage_is_found() -> None:
    good = packed_weight(4, 32, "int8", 16)
    assert good.scales is not None
    bad: dict[str, tuple[Tensor, str]] = {
        "codes": (good.codes.clone().fill_(0), "do not ascend"),
        "kept": (good.kept[:, 1:], r"has to be \[4, 16\]"),
        "scales": (good.scales * torch.nan, "not finite"),
    }
    for part, (tensor, said) in bad.items():
        damaged = {"kept": good.kept, "codes": good.codes, "scales": good.scales, part: tensor}
        with pytest.raises(SparsepassError, match=f"the lost layer.*{said}"):
            check(PackedWeight(values="int8", shape=(4, 32), group_size=16, **damaged), "the lost layer")
    with pytest.raises(SparsepassError, match="int8 has none"):
        check(PackedWeight(values="int8", shape=(4, 32), group_size=16, kept=good.kept, codes=good.codes))
