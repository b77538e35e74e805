"""Timing of layers: what is called, how often, and what is told of back ends that cannot be used."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.export.targets.torch.torch_cpu import CPU, GPU, emulated_kernels, layer
from torch import nn

from sparsepass.export.targets.torch import measure as torch_measure
from sparsepass.export.targets.torch.kernels import check_packing
from sparsepass.export.targets.torch.measure import (
    default_shapes,
    measure_layers,
    measure_shape,
    probe,
    random_two_four,
    time_ms,
)

BF16 = torch.bfloat16


@pytest.fixture
def _kernels() -> Iterator[None]:
    with emulated_kernels():
        yield


@pytest.mark.usefixtures("_kernels")
def test_each_shape_is_timed_once_dense_and_sparse_in_turn() -> None:
    shapes: list[tuple[int, ...]] = []
    clock = itertools.count(1)

    def timer(call: Callable[[], Any]) -> float:
        shapes.append(tuple(call().shape))
        return float(next(clock))

    layers = (
        layer("q", (32, 64)),
        layer("k", (32, 64)),
        layer("biased", (32, 64), bias=True),
        layer("out", (8, 8), eligible=False),
        layer("cusparselt_only", (16, 16)),
    )
    measured = measure_layers(layers, ((1, 1), (2, 8)), BF16, CPU, timer=timer)
    assert [(each.shape, each.bias) for each in measured.times] == [((32, 64), False), ((32, 64), True), ((16, 16), False)]
    assert shapes[:6] == [(1, 1, 32)] * 6
    assert shapes[6:12] == [(2, 8, 32)] * 6
    assert len(shapes) == 2 * 12 + 2 * 3, "cuSPARSELt is not there, so that its shape is timed dense only"
    first = measured.times[0].points[0]
    assert (first.dense_ms, dict(first.sparse_ms)) == (3.0, {"cutlass": 4.0}), "medians of 1, 3, 5 and of 2, 4, 6"
    assert measured.times[2].points[0].sparse_ms == {}
    assert (measured.device, measured.dtype, measured.compiled) == (GPU, "bfloat16", False)
    assert measured.backends["cutlass"] == ""
    assert "without it" in measured.backends["cusparselt"]


@pytest.mark.usefixtures("_kernels")
def test_compiled_layers_are_compiled_and_never_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    whole = torch.compile

    def compile_(module: nn.Module, **options: Any) -> Any:
        compiled.append(type(module).__name__)
        return whole(module, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    sizes = tuple((1, n) for n in range(1, 11))  # more than the number of times that torch compiles one function again
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        points = measure_shape(
            (32, 64), sizes, ["cutlass"], dtype=BF16, device=CPU, compiled=True, timer=lambda call: float(call().numel())
        )
    assert compiled == ["Linear", "SemiStructuredLinear"] * len(sizes)
    assert [point.dense_ms for point in points] == [32.0 * n for n in range(1, 11)]


def test_back_ends_that_cannot_be_used_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not supported" in probe(BF16, CPU)["cutlass"], "torch packs for GPUs only"
    with emulated_kernels():
        assert probe(BF16, CPU)["cutlass"] == ""
        monkeypatch.setattr(torch_measure, "convert", lambda weight, name: weight + 1)
        assert probe(BF16, CPU)["cutlass"] == "it computes a wrong product"


def test_sizes_stay_within_the_models_positions() -> None:
    assert max(sequence for _, sequence in default_shapes(None)) == 4096
    assert all(sequence <= 512 for _, sequence in default_shapes(512))
    assert any(batch * sequence >= 4096 for batch, sequence in default_shapes(512))
    assert default_shapes(1) == ((1, 1), (8, 1))


def test_the_weights_that_are_timed_are_two_four() -> None:
    weight = random_two_four((32, 64), BF16, CPU)
    check_packing("random", weight)
    assert (weight != 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_the_timer_gives_milliseconds() -> None:
    assert 0 < time_ms(lambda: None) < 1
