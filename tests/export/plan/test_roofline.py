"""The maths of `plan` against numbers worked out by hand, and the break-even against every count of tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from sparsepass import SparsepassError
from sparsepass.export.plan.devices import DEVICES, DTYPES, RUNTIMES, find_device, find_runtime, peak
from sparsepass.export.plan.roofline import (
    Machine,
    Matmul,
    active_experts,
    branch_time,
    branch_weights,
    dense_time,
    intensity,
    matmul_bytes,
    paying_ranges,
    sparse_time,
    weight_bits,
)

# 1e12 operations and 1e9 bytes a second: a layer of few tokens is bound by its bytes.
SLOW = Machine(dense_flops=1e12, sparse_flops=2e12, dense_bandwidth=1e9, sparse_bandwidth=1e9)


@pytest.mark.parametrize(
    ("dtype", "dense", "sparse"), [("bf16", 16, 9), ("fp16", 16, 9), ("fp8", 8, 5), ("int8", 8, 5), ("int4", 4.125, 3.125)]
)
def test_bits_of_a_weight(dtype: str, dense: float, sparse: float) -> None:
    assert weight_bits(dtype, sparse=False) == dense
    assert weight_bits(dtype, sparse=True) == sparse


def test_bits_are_what_storing_a_group_takes() -> None:
    """Two kept values and their two 2-bit positions, for each group of four."""
    for dtype, bits in (("bf16", 16), ("int8", 8), ("int4", 4)):
        assert weight_bits(dtype, sparse=True, scales=False) * 4 == 2 * bits + 2 * 2


def test_bytes_of_a_layer_by_hand() -> None:
    layer = Matmul(in_features=64, out_features=32)
    assert matmul_bytes(layer, 3.0, sparse=False) == 64 * 32 * 2 + 3 * 64 * 2 + 3 * 32 * 2
    assert matmul_bytes(layer, 3.0, sparse=True) == 64 * 32 * 9 / 8 + 3 * 64 * 2 + 3 * 32 * 2
    eight = Matmul(in_features=64, out_features=32, dtype="int8")  # it reads 8-bit activations and writes 16-bit ones
    assert matmul_bytes(eight, 3.0, sparse=False) == 64 * 32 + 3 * 64 + 3 * 32 * 2


def test_decoding_is_bound_by_bytes() -> None:
    """Large layers, one token: 16/9 in bf16, 1.6 with SLoRB k=16 or in int8, 1.32 in int4."""
    for dtype, k, bound in (("bf16", 0, 16 / 9), ("bf16", 16, 1.6), ("int8", 0, 1.6), ("int4", 0, 4.125 / 3.125)):
        layer = Matmul(in_features=65536, out_features=65536, dtype=dtype, branch_k=k)
        gain = dense_time(layer, 1.0, SLOW) / sparse_time(layer, 1.0, SLOW)
        assert gain == pytest.approx(bound, rel=2e-3)


def test_prefill_is_bound_by_operations() -> None:
    layer = Matmul(in_features=4096, out_features=4096)
    fast = Machine(dense_flops=1e12, sparse_flops=2e12, dense_bandwidth=1e15, sparse_bandwidth=1e15)
    assert dense_time(layer, 1e4, fast) == pytest.approx(2 * 4096 * 4096 * 1e4 / 1e12)
    assert dense_time(layer, 1e4, fast) / sparse_time(layer, 1e4, fast) == pytest.approx(2.0)


def test_time_by_hand() -> None:
    layer = Matmul(in_features=1000, out_features=1000)
    machine = Machine(
        dense_flops=1e12, sparse_flops=1e12, dense_bandwidth=1e9, sparse_bandwidth=0.5e9, gap_s=1e-3, dense_host_s=5e-3
    )
    assert dense_time(layer, 1.0, machine) == pytest.approx(5e-3 + 1e-3)  # the call: 2 ms of bytes hide behind it
    assert dense_time(layer, 10000.0, machine) == pytest.approx(2e6 / 1e9 + 4e7 / 1e9 + 1e-3)  # bytes: 42 ms
    assert sparse_time(layer, 1.0, machine) == pytest.approx((1e6 * 9 / 8 + 4000) / 0.5e9 + 1e-3)


def test_a_runtime_that_picks_the_faster_kernel_never_loses() -> None:
    layer = Matmul(in_features=512, out_features=512)
    slow = Machine(dense_flops=1e12, sparse_flops=1e11, dense_bandwidth=1e9, sparse_bandwidth=1e9, picks_faster=True)
    tokens = np.arange(1, 5000, dtype=np.float64)
    assert np.all(np.asarray(sparse_time(layer, tokens, slow)) <= dense_time(layer, tokens, slow))
    without = Machine(dense_flops=1e12, sparse_flops=1e11, dense_bandwidth=1e9, sparse_bandwidth=1e9)
    assert np.any(np.asarray(sparse_time(layer, tokens, without)) > dense_time(layer, tokens, without))


def test_slorb_by_hand() -> None:
    fixed = Matmul(in_features=64, out_features=48, branch_k=16)
    trained = Matmul(in_features=64, out_features=48, branch_k=16, branch_trained=True)
    assert branch_weights(fixed) == 48 * 4
    assert branch_weights(trained) == 48 * 4 + 64 * 4
    assert branch_weights(Matmul(in_features=64, out_features=48)) == 0
    assert branch_time(Matmul(in_features=64, out_features=48), 7.0, SLOW) == 0
    # Segment sum: reads 64, writes 4; the matmul by S: 48*4 weights, reads 4, writes 48. All of 2 bytes.
    assert branch_time(fixed, 1.0, SLOW) == pytest.approx(((64 + 4) * 2 + (48 * 4 + 4 + 48) * 2) / 1e9)
    assert branch_time(trained, 1.0, SLOW) == pytest.approx(((64 * 4 + 64 + 4) * 2 + (48 * 4 + 4 + 48) * 2) / 1e9)


def test_experts_against_a_simulation() -> None:
    layer = Matmul(in_features=8, out_features=8, num_experts=16, experts_per_token=4)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 8, 40):
        picked = torch.rand(4000, tokens, 16, generator=generator).topk(4, dim=-1).indices
        mean = sum(len(set(row.flatten().tolist())) for row in picked) / len(picked)
        assert active_experts(layer, float(tokens)) == pytest.approx(mean, rel=0.02)
    assert active_experts(Matmul(in_features=8, out_features=8), 5.0) == 1


def test_intensity_grows_with_tokens() -> None:
    layer = Matmul(in_features=4096, out_features=4096)
    assert intensity(layer, 1.0) == pytest.approx(2 * 4096**2 / (2 * 4096**2 + 4 * 4096))
    assert intensity(layer, 512.0) > intensity(layer, 64.0) > intensity(layer, 1.0)


@settings(max_examples=60)
@given(
    in_features=st.integers(1, 300).map(lambda n: 16 * n),
    out_features=st.integers(1, 300).map(lambda n: 16 * n),
    runtime=st.sampled_from(sorted(RUNTIMES)),
    gpu=st.sampled_from(sorted(DEVICES)),
    k=st.sampled_from([0, 16]),
    experts=st.sampled_from([(1, 1), (8, 2)]),
)
def test_break_even_is_on_the_right_side(
    in_features: int, out_features: int, runtime: str, gpu: str, k: int, experts: tuple[int, int]
) -> None:
    layer = Matmul(
        in_features=in_features,
        out_features=out_features,
        num_experts=experts[0],
        experts_per_token=experts[1],
        branch_k=k,
    )
    machine = RUNTIMES[runtime].machine(DEVICES[gpu], "bf16")
    found = paying_ranges(lambda n: dense_time(layer, n, machine), lambda n: sparse_time(layer, n, machine), max_tokens=3000)
    inside = {n for first, last in found for n in range(first, (last or 3000) + 1)}
    for tokens in range(1, 3001, 7):
        gain = float(dense_time(layer, float(tokens), machine)) / float(sparse_time(layer, float(tokens), machine))
        assert (gain > 1) == (tokens in inside) or math.isclose(gain, 1, rel_tol=1e-8)


def test_break_even_by_hand() -> None:
    assert paying_ranges(lambda n: n * 1.0, lambda n: n * 2.0, max_tokens=50) == ()
    assert paying_ranges(lambda n: n * 2.0, lambda n: n * 1.0, max_tokens=50) == ((1, None),)
    dip = paying_ranges(lambda n: n * 0.0 + 5, lambda n: np.abs(n - 20.0), max_tokens=50)
    assert dip == ((16, 24),)


def test_a_faster_gpu_is_faster() -> None:
    layer = Matmul(in_features=4096, out_features=11008)
    for tokens in (1.0, 64.0, 4096.0):
        times = {gpu: dense_time(layer, tokens, find_runtime("ideal").machine(find_device(gpu), "bf16")) for gpu in DEVICES}
        assert times["h100"] < times["a100"] < times["l4"]
        assert times["h200"] <= times["h100"]
        assert times["a100"] <= times["a100-40gb"]


def test_the_published_shape_that_loses() -> None:
    """4096 x 4096, 1 token, torch: 0.11x, by torch's own developers; large matmuls gain."""
    machine = find_runtime("torch").machine(find_device("a100"), "fp16")
    layer = Matmul(in_features=4096, out_features=4096, dtype="fp16")
    assert dense_time(layer, 1.0, machine) / sparse_time(layer, 1.0, machine) == pytest.approx(0.111, rel=0.2)
    assert 1.1 < dense_time(layer, 8192.0, machine) / sparse_time(layer, 8192.0, machine) < 1.3


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "4090", "geforce-rtx-4090"])
def test_a_device_by_any_spelling(name: str) -> None:
    assert find_device(name) is DEVICES["rtx4090"]


@pytest.mark.parametrize(
    ("name", "architecture"), [("T4", "Turing"), ("Tesla V100", "Volta"), ("2080 Ti", "Turing"), ("P100", "Pascal")]
)
def test_an_older_device_is_refused_by_name(name: str, architecture: str) -> None:
    with pytest.raises(SparsepassError, match=rf"{name} is of the {architecture} architecture.*Ampere or newer"):
        find_device(name)


def test_an_unknown_device_gets_the_nearest_name() -> None:
    with pytest.raises(SparsepassError, match="did you mean 'l40s'"):
        find_device("L40SX")
    with pytest.raises(SparsepassError, match="Known: a100"):
        find_device("banana")


def test_every_device_is_plausible() -> None:
    for device in DEVICES.values():
        assert float(device.compute_capability) >= 8.0
        assert device.source
        assert device.int8_tops > device.half_tflops > 10
        assert (device.fp8_tflops is None) == (device.architecture == "Ampere")
        assert device.bandwidth_gb_s > device.memory_gb


def test_types_that_a_device_lacks() -> None:
    with pytest.raises(SparsepassError, match="has no fp8 tensor cores; take dtype=int8"):
        peak(find_device("a100"), "fp8")
    assert [peak(find_device("h100"), dtype) for dtype in DTYPES] == [989.4, 989.4, 1978.9, 1978.9, 989.4]


def test_runtimes() -> None:
    with pytest.raises(SparsepassError, match="did you mean 'tensorrt-llm'"):
        find_runtime("tensorrt")
    with pytest.raises(SparsepassError, match="runtime 'vllm' is not known"):
        find_runtime("vllm")
    ideal = find_runtime("ideal").machine(find_device("a100"), "bf16")
    assert (ideal.dense_flops, ideal.sparse_flops, ideal.dense_bandwidth) == (312e12, 624e12, 2039e9)
    assert find_runtime("ideal").refusal(4, 2, "bf16") is None


def test_shape_rules_are_torchs_own() -> None:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    rules = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
    for name in ("torch", "tensorrt-llm"):
        runtime = find_runtime(name)
        assert runtime.align is not None
        for dtype in DTYPES[:4]:
            assert runtime.align[dtype] == rules[kinds[dtype]].sparse_min_rows == rules[kinds[dtype]].sparse_min_cols
        assert runtime.refusal(4096, 4096, "bf16") is None
        assert "in_features 40 is not a multiple of 16" in str(runtime.refusal(40, 4096, "bf16"))
        assert "out_features 10 is not a multiple of 32" in str(runtime.refusal(4096, 10, "int8"))
