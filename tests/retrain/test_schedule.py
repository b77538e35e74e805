"""Learning rate and decay over a run, against the formulas written out step by step."""

import math

import pytest
from hypothesis import given, strategies as st

from sparsepass.retrain.config import annealed_decay, learning_rate


def slow_rates(num_steps: int, peak: float, floor: float, warmup: int, final: int, shape: str) -> list[float]:
    """The rates of a run as a list: the rise, the descent, the line to zero."""
    rise = [peak * k / warmup for k in range(1, warmup + 1)]
    between = num_steps - warmup - final
    level = peak if shape == "constant" else floor
    if shape == "cosine":
        descent = [floor + (peak - floor) * math.cos(math.pi * k / between / 2) ** 2 for k in range(between)]
    else:
        descent = [peak + (level - peak) * k / between for k in range(between)]
    return rise + descent + [level * k / final for k in range(final, 0, -1)]


@given(
    st.integers(0, 10), st.integers(1, 30), st.integers(0, 10), st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(1e-6, 1.0), st.one_of(st.just(0.0), st.floats(1e-3, 1)),
)  # fmt: skip
def test_the_rate_of_each_step(warmup: int, between: int, final: int, shape: str, peak: float, share: float) -> None:
    num_steps, floor = warmup + between + final, peak * share
    rates = [
        learning_rate(step, num_steps=num_steps, peak=peak, floor=floor, warmup_steps=warmup, final_steps=final, shape=shape)
        for step in range(num_steps)
    ]
    assert rates == pytest.approx(slow_rates(num_steps, peak, floor, warmup, final, shape), rel=1e-9, abs=1e-15)
    assert max(rates) <= peak * (1 + 1e-12)
    assert min(rates) > 0 or (floor == 0 and shape != "constant")
    if final:  # one more step would have none
        assert rates[-1] == pytest.approx((peak if shape == "constant" else floor) / final)


def test_a_warmup_as_long_as_the_run() -> None:
    rates = [learning_rate(s, num_steps=4, peak=1.0, floor=0.1, warmup_steps=4, final_steps=0) for s in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


@given(st.integers(0, 100), st.integers(1, 50), st.floats(0, 1))
def test_the_decay_of_each_step(step: int, decay_steps: int, decay: float) -> None:
    found = annealed_decay(step, decay=decay, decay_steps=decay_steps)
    assert found == pytest.approx(sum([decay / decay_steps] * min(step, decay_steps)))
    assert annealed_decay(step, decay=decay, decay_steps=0) == decay
