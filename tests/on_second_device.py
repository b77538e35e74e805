"""What is computed on a second device, as functions for a process of its own; see `tests.second_device`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from tests.families import BY_NAME, captured
from tests.second_device import DEVICE, OnSecond, SecondDevice

from sparsepass.export.stages import auto_ignore
from sparsepass.graph import Program
from sparsepass.graph.perplexity import perplexity
from sparsepass.graph.placement import placed
from sparsepass.passes import apply_passes

_CALIBRATION = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(2))
_PASSES = (
    "nm_sparsify{criterion=wanda},slorb{k=8}",
    "nm_sparsify{criterion=sparsegpt},slorb{k=8,projection=trainable},fold",
    "nm_sparsify{criterion=sparsegpt},reconstruct{steps=2}",
    "nm_sparsify{criterion=wanda,compensate=false},learn_masks",
)


def passes() -> None:
    """The same passes give the same, and all weights are where they were."""
    for text in _PASSES:
        _compare("llama", text)
    _compare("mixtral", "nm_sparsify{criterion=ria}")
    for name, text in (("opt", "fold_norms"), ("llama", "rotate{steps=2}"), ("llama", "permute_channels")):
        _compare(name, text, program=_uneven)
    with SecondDevice():
        first = captured("llama")
        held = dict(first.tensors())
        apply_passes(first, _PASSES[1], calibration=_CALIBRATION, compute="float32", inplace=True, device=DEVICE)
        now = first.tensors()
        assert all(now[name] is tensor for name, tensor in held.items()), "in place, the tensors are the ones that were there"


def _compare(name: str, text: str, program: Callable[[str], Program] = captured) -> None:
    options: dict[str, Any] = {"calibration": _CALIBRATION, "compute": "float32"}
    here = apply_passes(program(name), text, **options)
    with SecondDevice():
        there = apply_passes(program(name), text, **options, device=DEVICE)
    _same(here, there, f"{name}, {text}")


def _uneven(name: str) -> Program:
    """A tiny program whose gains and biases differ from channel to channel."""
    program, generator = captured(name), torch.Generator().manual_seed(4)
    for which, tensor in program.tensors().items():
        if tensor.dim() == 1 and isinstance(tensor, torch.nn.Parameter):
            program.write_tensor(which, tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator))
    return program


def _same(here: Program, there: Program, what: str) -> None:
    expected, found = here.tensors(), there.tensors()
    assert expected.keys() == found.keys(), what
    for name, tensor in found.items():
        assert not isinstance(tensor, OnSecond), f"{what}: {name} did not come back"
        assert tensor.requires_grad == expected[name].requires_grad, f"{what}: {name}"
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m: f"{what}: {name}: {m}")  # noqa: B023
    measured = [[record.validation for record in program.history] for program in (here, there)]
    for one, other in zip(*measured, strict=True):
        assert (one is None) == (other is None), what
        assert one is None or abs(one["relative_error"] - other["relative_error"]) < 1e-3, what


def perplexities() -> None:
    """A model that fits moves there and back; one that does not is streamed. Both give the same, and nothing changes."""
    ids = torch.randint(3, 96, (200,), generator=torch.Generator().manual_seed(3))
    for model in (captured("llama"), BY_NAME["gpt2"].model()):
        expected = perplexity(model, ids, context=32).value
        before = {name: (tensor, tensor.clone()) for name, tensor in model.named_parameters()}
        for free in (1, 1 << 40):
            asked: list[Any] = []
            with SecondDevice(), _free(free):
                found = perplexity(model, ids, context=32, device=DEVICE).value
                with placed(model, DEVICE):
                    asked += [name for name, tensor in model.named_parameters() if isinstance(tensor.data, OnSecond)]
            assert abs(found - expected) < 1e-3 * expected
            assert bool(asked) == (free > 1), "what does not fit does not move as a whole"
            for name, tensor in model.named_parameters():
                held, value = before[name]
                assert tensor is held, name
                assert torch.equal(tensor, value), name


def sensitivities() -> None:
    """Layers are ranked alike."""
    model = BY_NAME["llama"].model()
    options: dict[str, Any] = {"calibration": _CALIBRATION, "compute": "float32", "criterion": "magnitude"}
    here = auto_ignore(model, **options)
    with SecondDevice(), _free(1 << 40):
        there = auto_ignore(model, **options, device=DEVICE)
    for one, other in zip(here.rows, there.rows, strict=True):
        assert one.name == other.name
        assert abs(one.loss - other.loss) < 1e-2 * one.loss


@contextmanager
def _free(number: int) -> Iterator[None]:
    """A device that has so many bytes free."""
    with mock.patch("sparsepass.graph.placement.free_bytes", return_value=number):
        yield


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
