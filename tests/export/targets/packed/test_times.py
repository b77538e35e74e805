import torch

from sparsepass.export.targets.packed.times import OneTokenTimes, ShapeTime, one_token_times
from sparsepass.graph.packed import pack
from sparsepass.passes.maths import NMPattern, keep_largest_of_groups


def test_each_shape_is_timed_packed_and_dense() -> None:
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((64, 32), (16, 64))]
    packed = [pack(weight * keep_largest_of_groups(weight.abs(), NMPattern(2, 4))) for weight in weights]
    times = one_token_times(packed, torch.bfloat16)
    assert [each.shape for each in times.shapes] == [(64, 32), (16, 64)]
    assert all(each.packed_ms > 0 and each.dense_ms > 0 for each in times.shapes)
    assert times.path in times.note
    assert times.num_threads == torch.get_num_threads()


def test_what_is_slower_here_is_told() -> None:
    slow, fast = (ShapeTime(shape=shape, packed_ms=ms, dense_ms=1.0) for shape, ms in (((8, 16), 1.06), ((16, 8), 0.5)))
    times = OneTokenTimes(processor="P", path="generic", num_threads=2, shapes=(slow, fast))
    assert "slower than dense by more than 5% are 8x16;" in times.note
    assert "0.50 to 1.06" in times.note
    assert "slower" not in OneTokenTimes(processor="P", path="avx2", num_threads=2, shapes=(fast,)).note
