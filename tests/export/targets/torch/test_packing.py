"""Packing: bit for bit what torch packs, bit for bit back, and whatever would be lost is refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.export.targets.torch.torch_cpu import emulated_kernels, two_four
from torch import Tensor

from sparsepass.export.targets.torch import kernels as torch_kernels
from sparsepass.export.targets.torch.kernels import check_packing, convert, dense_of, packed, semi_structured, unpacked
from sparsepass.graph import SparsepassError

VALUES = (0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e-30, -2e-38, 65280.0)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


@settings(max_examples=30)
@given(st.data())
def test_what_is_packed_comes_back_bit_for_bit(data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    chosen = torch.randint(len(VALUES), (rows, groups, 4), generator=generator)
    drop = torch.rand(rows, groups, 4, generator=generator).argsort(-1)[..., :2]
    weight = torch.tensor(VALUES)[chosen].scatter(-1, drop, 0.0).flatten(1).to(dtype)
    back = unpacked(*packed(weight), tuple(weight.shape))
    assert torch.equal(bits(back), bits(torch.where(weight == 0, torch.zeros_like(weight), weight)))
    check_packing("w", weight)


def test_packed_values_and_positions_are_those_of_the_definition() -> None:
    """Of every four: the two kept entries in order, and their two positions in four bits, lower one first."""
    weight = two_four(32, 64)
    weight = torch.where(weight == 0, weight, weight + weight.sign())  # nothing kept is near zero
    values, positions = packed(weight)
    # torch writes a row's positions, 16 bits for every 16 entries, interleaved over rows: undo that with its own map.
    offsets = torch.sparse._semi_structured_conversions._calculate_meta_reordering_scatter_offsets(
        32, 4, torch.int16, weight.device
    )
    rows = positions.flatten()[offsets].view(32, 4)
    for row in range(32):
        for group in range(16):
            entries = weight[row, 4 * group : 4 * group + 4]
            quad = int(rows[row, group // 4]) >> (4 * (group % 4))
            first, second = quad & 3, (quad >> 2) & 3
            assert first < second
            assert {i for i in range(4) if entries[i]} <= {first, second}
            kept = values[row, 2 * group : 2 * group + 2]
            assert torch.equal(kept, entries[[first, second]])


def test_the_kernels_tensor_holds_what_is_packed_here() -> None:
    weight = two_four(64, 128)
    with emulated_kernels():
        lowered = convert(weight, "cutlass")
        assert isinstance(lowered, torch.sparse.SparseSemiStructuredTensorCUTLASS)
        for ours, torchs in zip(packed(weight), (lowered.packed, lowered.meta), strict=True):
            assert torchs is not None
            assert torch.equal(ours, torchs)
        assert torch.equal(dense_of(lowered), weight + 0.0)
        assert semi_structured("w", weight, "cutlass").shape == weight.shape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([1.0, 1.0, 1.0, 0.0], r"q_proj is not 2:4 along its input features \(1 of 512 groups .* export the model again"),
        ([float("nan"), 0.0, 0.0, 0.0], "q_proj holds NaN or infinity"),
        ([0.0, float("-inf"), 0.0, 0.0], "q_proj holds NaN or infinity"),
    ],
)
def test_weights_that_a_kernel_would_change_are_refused(change: list[float], said: str) -> None:
    weight = two_four(32, 64)
    weight[3, 8:12] = torch.tensor(change)
    with pytest.raises(SparsepassError, match=said):
        check_packing("q_proj", weight)
    with emulated_kernels(), pytest.raises(SparsepassError, match=said):
        semi_structured("q_proj", weight, "cutlass")


def test_a_packer_that_loses_something_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = two_four(1056, 64)  # more rows than are packed at once
    name = "sparse_semi_structured_from_dense_cutlass"
    whole: Callable[[Tensor], tuple[Tensor, Tensor]] = getattr(torch_kernels, name)

    def lossy(dense: Tensor) -> tuple[Tensor, Tensor]:
        values, positions = whole(dense)
        if dense.shape[0] == 32:
            values[4, :] = 0
        return values, positions

    monkeypatch.setattr(torch_kernels, name, lossy)
    with pytest.raises(
        SparsepassError, match=r"of 2048 weights do not come back out of torch's packed form; .* a defect of torch"
    ):
        check_packing("w", weight)


def test_a_kernel_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = two_four(32, 64)
    monkeypatch.setattr(torch_kernels, "convert", lambda tensor, backend: tensor.roll(1, 0))
    with pytest.raises(SparsepassError, match="do not come back out of cutlass's tensor"):
        semi_structured("w", weight, "cutlass")
