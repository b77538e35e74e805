"""The choice of kernels: by recorded times alone, the same each time, and never one that was slower."""

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st
from tests.export.targets.torch.torch_cpu import TIMINGS, layer

from sparsepass.export.targets.torch.choice import MIN_GAIN, Timing, decide
from sparsepass.export.targets.torch.layer import choose
from sparsepass.export.targets.torch.record import read_timings

LLAMA_8B = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
SMOLLM2 = {"q_proj": (576, 576), "k_proj": (192, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}

MS = st.floats(1e-3, 1e3)
POINTS = st.builds(
    Timing,
    batch=st.sampled_from([1, 8]),
    sequence=st.sampled_from([1, 16, 128, 512, 4096]),
    dense_ms=MS,
    sparse_ms=st.dictionaries(st.sampled_from(["cutlass", "cusparselt"]), MS, max_size=2),
)


def timings(**gains: float) -> list[Timing]:
    """One point for each number of tokens: ``t512=1.5``."""
    return [Timing(batch=1, sequence=int(name[1:]), dense_ms=gain, sparse_ms={"cutlass": 1.0}) for name, gain in gains.items()]


@given(st.lists(POINTS, max_size=12), st.booleans())
def test_no_layer_gets_slower_than_it_was_measured_dense(points: list[Timing], sparse_only: bool) -> None:
    verdict = decide(points, sparse_only=sparse_only)
    if verdict.backend is None:
        assert verdict.min_tokens == 0
        assert verdict.reason.startswith(("dense kernel faster", "no time of a 2:4 kernel"))
    runs = [p for p in points if verdict.backend in p.sparse_ms and p.tokens >= verdict.min_tokens]
    assert all(p.dense_ms / p.sparse_ms[verdict.backend] >= MIN_GAIN for p in runs if verdict.backend)
    assert verdict.backend is None or runs
    if sparse_only:
        assert verdict.min_tokens == 0
    assert decide(reversed(points), sparse_only=sparse_only).min_tokens == verdict.min_tokens, "the order says nothing"


@given(st.lists(POINTS.filter(lambda p: "cutlass" in p.sparse_ms), min_size=1, max_size=8))
def test_a_gain_at_the_largest_size_is_never_given_away(points: list[Timing]) -> None:
    largest = max(point.tokens for point in points)
    gains = [p.dense_ms / p.sparse_ms["cutlass"] for p in points if p.tokens == largest]
    assert min(gains) < MIN_GAIN or decide(points).backend is not None


@pytest.mark.parametrize(
    ("gains", "sparse_only", "expected"),
    [
        ({"t1": 0.5, "t512": 1.5}, False, ("cutlass", 512)),
        ({"t1": 1.1, "t512": 1.5}, False, ("cutlass", 0)),
        ({"t1": 1.1, "t512": 0.9, "t4096": 1.5}, False, ("cutlass", 4096)),
        ({"t1": 1.1, "t512": 1.5, "t4096": 1.01}, False, (None, 0)),
        ({"t512": MIN_GAIN}, False, ("cutlass", 0)),
        ({"t1": 0.5, "t512": 1.5}, True, (None, 0)),
        ({"t1": 1.1, "t512": 1.5}, True, ("cutlass", 0)),
    ],
)
def test_a_kernel_runs_from_the_size_on_from_which_it_always_wins(
    gains: dict[str, float], sparse_only: bool, expected: tuple[str | None, int]
) -> None:
    verdict = decide(timings(**gains), sparse_only=sparse_only)
    assert (verdict.backend, verdict.min_tokens) == expected


def test_the_reason_gives_the_figures() -> None:
    assert decide(timings(t1=0.5, t512=1.5)).reason == (
        "cutlass: sparse is faster from 512 tokens at once on (1.50x there), and slower below (0.50x at 1)"
    )
    assert "at best 0.90x" in decide(timings(t1=0.5, t512=0.9)).reason
    assert "--sparse-only forbids" in decide(timings(t1=0.5, t512=1.5), sparse_only=True).reason
    assert "1.02x at least, also at all larger sizes" in decide(timings(t1=1.01)).reason


def test_one_number_of_tokens_measured_twice_counts_by_the_slower_time() -> None:
    points = [
        Timing(batch=b, sequence=s, dense_ms=1.0, sparse_ms={"cutlass": ms}) for b, s, ms in ((1, 4096, 0.5), (8, 512, 2.0))
    ]
    assert decide(points).backend is None


def test_the_backend_that_gains_most_is_taken() -> None:
    points = [
        Timing(batch=1, sequence=1, dense_ms=1.0, sparse_ms={"cutlass": 0.9, "cusparselt": 2.0}),
        Timing(batch=1, sequence=512, dense_ms=1.0, sparse_ms={"cutlass": 0.9, "cusparselt": 0.5}),
    ]
    assert (decide(points).backend, decide(points).min_tokens) == ("cusparselt", 512)
    assert decide(points, sparse_only=True).backend == "cutlass"


def test_recorded_times_decide_llama_8b_and_smollm2_layer_by_layer() -> None:
    measured = read_timings(TIMINGS)
    large, small = (
        {
            each.layer: (each.state, each.backend, each.min_tokens)
            for each in choose(tuple(layer(name, shape) for name, shape in shapes.items()), measured)
        }
        for shapes in (LLAMA_8B, SMOLLM2)
    )
    assert large == {
        "q_proj": ("lowered", "cusparselt", 2048),
        "k_proj": ("lowered", "cusparselt", 4096),
        "up_proj": ("lowered", "cusparselt", 512),
        "down_proj": ("lowered", "cusparselt", 512),
    }
    assert small["q_proj"] == small["k_proj"] == ("dense", None, 0)
    assert small["up_proj"] == small["down_proj"] == ("lowered", "cusparselt", 16384)


def test_what_was_not_timed_stays_dense_and_says_why() -> None:
    measured = read_timings(TIMINGS)
    layers = (layer("odd", (4096, 4160)), layer("biased", (4096, 4096), bias=True), layer("rule", (8, 8), eligible=False))
    odd, biased, rule = choose(layers, measured)
    assert (odd.state, odd.reason) == ("dense", "no time of 4096x4160 without a bias was recorded")
    assert (biased.state, biased.reason) == ("dense", "no time of 4096x4096 with a bias was recorded")
    assert rule == layers[2], "what no kernel takes is not decided by times"


def test_a_missing_backend_is_named_where_it_was_the_last_one() -> None:
    measured = read_timings(TIMINGS)
    dense_only = replace(measured.times[0], points=tuple(replace(p, sparse_ms={}) for p in measured.times[0].points))
    measured = replace(measured, backends={"cutlass": "", "cusparselt": "not there"}, times=(dense_only,))
    (found,) = choose((layer("q", (4096, 4096)),), measured)
    assert (found.state, found.reason) == ("dense", "no kernel of that GPU takes it (cusparselt: not there)")
