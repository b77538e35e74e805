import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.graph.packed.weights import KINDS, force, packed_weight
from torch import Tensor, nn

from sparsepass import SparsepassError
from sparsepass.graph.native import PATHS, available_paths
from sparsepass.graph.packed import PackedLinear, Values, group_siblings, laid_out, siblings

NATIVE = [path for path in PATHS if path != "torch"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each common run of the kernel computed."""
    seen: list[int] = []
    run = laid_out.products

    def counted(weight: laid_out.LaidOut, x: Tensor, addresses: Any) -> list[Tensor]:
        seen.append(weight.form.rows)
        return run(weight, x, addresses)

    monkeypatch.setattr(siblings, "products", counted)
    return seen


def group_of(values: Values = "bf16", rows: Sequence[int] = (64, 32, 32), *, branch: bool = True) -> list[PackedLinear]:
    if len(available_paths(values)) == 1:
        pytest.skip("no library was compiled")
    return [
        PackedLinear.from_packed(
            packed_weight(number, 576, values, seed=i),
            bias=torch.randn(number) if i else None,
            slorb_weight=torch.randn(number, 36) if branch else None,
        )
        for i, number in enumerate(rows)
    ]


def x_of(tokens: int = 1) -> Tensor:
    return torch.randn(1, tokens, 576)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("rows", [(64, 32, 32), (33, 7)])
def test_results_are_those_of_each_alone(
    values: Values, path: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    force(path, values, monkeypatch)
    layers = group_of(values, rows)
    alone = copy.deepcopy(layers)
    is_grouped = group_siblings(layers)
    assert is_grouped or rows == (33, 7)
    for tokens in (1, 2, 16, 17, 65):
        for order in ([0, 1], [1, 0], [0, 0, 1, 1, 0]):
            x = x_of(tokens)
            calls.clear()
            for i in order:
                y = layers[i](x)
                assert torch.equal(y, alone[i](x))
                assert y.is_contiguous()
            assert bool(calls) == (is_grouped and tokens <= layers[0].laid_out().most_tokens)
            assert set(calls) <= {sum(rows)}
    for layer, single in zip(layers, alone, strict=True):
        for name, tensor in single.state_dict().items():
            assert torch.equal(tensor, layer.state_dict()[name])


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("rows", [(64, 32), (34, 32)])
def test_rows_in_panels_lie_together_by_32(path: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    force(path, "bf16", monkeypatch)
    layers = [PackedLinear.from_packed(packed_weight(number, 4104, "bf16", seed=i)) for i, number in enumerate(rows)]
    alone = copy.deepcopy(layers)
    assert group_siblings(layers) == (rows == (64, 32) or path == "generic")
    x = torch.randn(1, 4104)
    for layer, single in zip(layers, alone, strict=True):
        assert torch.equal(layer(x), single(x))
        assert torch.equal(layer.packed().kept, single.packed().kept)


def test_one_run_computes_all(calls: list[int]) -> None:
    layers = group_of()
    assert group_siblings(layers)
    x = x_of()
    for layer in layers:
        layer(x)
    assert calls == [128]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_changed_input_is_computed_anew(mode: type[torch.no_grad]) -> None:
    layers = group_of()
    alone = copy.deepcopy(layers)
    group_siblings(layers)
    with mode():
        x = x_of()
        layers[0](x)
        x.mul_(2)
        assert torch.equal(layers[1](x), alone[1](x))
        layers[0](x)
        same = x.clone()  # equal, and another tensor
        assert torch.equal(layers[1](same), alone[1](same))


def test_a_layer_with_new_weights_does_not_get_a_result_of_the_old_ones() -> None:
    layers, others = group_of(), group_of(rows=(32, 32, 32))
    group_siblings(layers)
    x = x_of()
    layers[0](x)
    layers[2].load_state_dict(others[1].state_dict())
    assert torch.equal(layers[2](x), others[1](x))
    assert torch.equal(layers[1](x), copy.deepcopy(layers[1])(x))


def test_nothing_is_kept_that_nobody_can_ask_for() -> None:
    layers = group_of()
    group_siblings(layers)
    x = x_of()
    layers[0](x)
    kept = layers[0].siblings._local.kept  # type: ignore[union-attr]
    assert [y is None for y in kept.results] == [True, False, False]
    there = weakref.ref(x)
    del x
    gc.collect()
    assert there() is None
    assert not kept.results


def test_layers_that_turn_out_to_read_other_inputs_run_alone(calls: list[int]) -> None:
    layers = group_of()
    group_siblings(layers)
    for _ in range(20):
        layers[0](x_of())
    assert len(calls) < 8


@pytest.mark.parametrize("values", KINDS)
def test_copies_moves_and_new_weights_keep_the_group(values: Values, calls: list[int]) -> None:
    layers = nn.ModuleList(group_of(values))
    x = x_of()
    wanted = [layer(x) for layer in layers]
    assert group_siblings(list(layers))  # type: ignore[arg-type]
    copied = copy.deepcopy(layers)
    assert copied[0].siblings is copied[1].siblings
    assert copied[0].siblings is not layers[0].siblings
    reloaded = copy.deepcopy(layers)
    reloaded.load_state_dict(layers.state_dict())
    for other in (copied, pickle.loads(pickle.dumps(layers)), reloaded, copy.deepcopy(layers).half().to("cpu")):
        calls.clear()
        for layer, y in zip(other, wanted, strict=True):
            assert torch.equal(layer(x), y)
        assert calls == [128]


def test_threads_do_not_take_results_of_each_other() -> None:
    layers = group_of()
    alone = copy.deepcopy(layers)
    group_siblings(layers)
    shared, failures = x_of(), []

    def run(seed: int) -> None:
        with torch.no_grad():
            own = torch.randn(1, 1, 576, generator=torch.Generator().manual_seed(seed))
            for i in range(50):
                x = (shared, own)[i % 2]
                for layer, single in zip(layers, alone, strict=True):
                    if not torch.equal(layer(x), single(x)):
                        failures.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_compilers_see_single_layers() -> None:
    layers = nn.ModuleList(group_of())
    group_siblings(list(layers))  # type: ignore[arg-type]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    x = x_of()
    for y, layer in zip(torch.compile(Both(), fullgraph=True, backend="aot_eager")(x), layers, strict=True):
        assert torch.equal(y, layer(x))


def test_what_is_no_group() -> None:
    assert not group_siblings([*group_of("bf16"), *group_of("int8")])
    assert not group_siblings([*group_of("bf16"), *group_of("bf16", branch=False)])
    with pytest.raises(SparsepassError, match="two layers or more"):
        group_siblings(group_of()[:1])
    with pytest.raises(SparsepassError, match=r"take \[8, 16\] features"):
        group_siblings([PackedLinear(8, 8), PackedLinear(16, 8)])
