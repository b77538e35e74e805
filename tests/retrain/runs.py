"""Small runs of retraining, for the tests: tiny programs, a table of random tokens, settings, and what came out of a run."""

import copy
import functools
import hashlib
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tests.families import BY_NAME, captured
from torch import Tensor, nn

from sparsepass.graph import Program, capture
from sparsepass.graph.perplexity import perplexity
from sparsepass.passes import apply_passes
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import DataConfig, TrainingData, open_data
from sparsepass.retrain.loop import retrain
from sparsepass.retrain.run.metrics import METRICS, read_metrics

CONTEXT = 16
RECIPE = "nm_sparsify,slorb{k=8}"
SMALL: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 8,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup": 2,
    "final_linear": 0.25,
    "weight_decay": 0.1,
    "decay": 1e-2,
    "decay_warmup": 4,
    "mask_interval": 3,
    "dtype": "float32",
    "validate_every": 4,
}

LEARN_MASKS = "nm_sparsify,learn_masks{alpha=1.0}"
# The logits move far within a few steps, and the norm counts.
MASKLLM: dict[str, Any] = {
    "method": "maskllm",
    "lr": 5e-3,
    "mask_scale": (100.0, 200.0),
    "mask_temperature": (2.0, 0.5),
    "mask_norm": 1e-3,
    "decay": 0.0,
}

_export = torch.export.export
_exported: dict[Any, Any] = {}


def _export_once(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(module, torch.fx.GraphModule):
        return _export(module, *args, **kwargs)
    named = (*module.named_parameters(), *module.named_buffers())
    key = (module.code, tuple((name, tensor.shape, tensor.dtype) for name, tensor in named))
    if key not in _exported:
        _exported[key] = _export(module, *args, **kwargs)
    return _exported[key]


@contextmanager
def exports_once() -> Iterator[None]:
    """Export a graph once in a process: that is most of the time of a tiny run, and the weights are put in afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "export", _export_once)
        yield


@functools.cache
def _double(name: str) -> Program:
    return capture(BY_NAME[name].model().double(), BY_NAME[name].inputs(2, 8))


def dense(name: str = "llama", *, double: bool = False) -> Program:
    """A tiny dense program, of the test's own; in float64 if asked for."""
    return copy.deepcopy(_double(name)) if double else captured(name)


@functools.cache
def _sparse(name: str, recipe: str, double: bool) -> Program:
    return apply_passes(dense(name, double=double), recipe, validate=False)


def sparse(name: str = "llama", recipe: str = RECIPE, *, double: bool = False) -> Program:
    """A tiny sparse program, of the test's own; in float64 if asked for."""
    return copy.deepcopy(_sparse(name, recipe, double))


def data(validation: int | None = 8, num_sequences: int = 64) -> TrainingData:
    """Random tokens, the same ones each time."""
    ids = torch.randint(3, 96, (num_sequences, CONTEXT), generator=torch.Generator().manual_seed(1))
    return open_data(DataConfig(context=CONTEXT, validation=validation), source=ids)


def settings(**changes: Any) -> RetrainConfig:
    """The settings of a small run: its masks move from the first refresh on, where they move."""
    behind = {} if changes.get("method") == "maskllm" else {"behind": "clipped"}
    return RetrainConfig(**SMALL | behind | changes)


def train(program: Program, teacher: Any, config: RetrainConfig, **options: Any) -> Program:
    """Retrain quietly on `data`."""
    options.setdefault("data", data())
    options.setdefault("progress", False)
    with exports_once():
        return retrain(program, teacher, config=config, **options)


def run(
    name: str = "llama", folder: Path | None = None, recipe: str = RECIPE, *, double: bool = False, **changes: Any
) -> Program:
    """A small run of a tiny program against its dense model."""
    program, teacher = sparse(name, recipe, double=double), dense(name, double=double)
    return train(program, teacher, settings(**changes), run_folder=folder)


def whole(name: str = "llama", **changes: Any) -> Program:
    """A run that nothing stopped, to compare with, and not to be changed: run once in a process."""
    return _whole(name, tuple(sorted(changes.items())))


@functools.cache
def _whole(name: str, changes: tuple[tuple[str, Any], ...]) -> Program:
    with TemporaryDirectory() as folder:
        return run(name, Path(folder), **dict(changes))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Tells tensors apart by their bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def masks(program: Program) -> dict[str, Tensor]:
    """The masks of a program by weight name."""
    return {name: program.tensor(state.mask) for name, state in program.sparse.items() if state.mask is not None}


def measures(program: Program) -> list[float]:
    """The validation losses of the last run."""
    return [found["nll"] for found in program.retraining[-1]["validations"]]


def steps(folder: Path) -> list[dict[str, Any]]:
    """What each step of a run measured."""
    return [line for line in read_metrics(folder / METRICS) if "loss" in line]


def validation_loss(program: Program, held_out: int = 8, dtype: str | None = None) -> float:
    """What `sparsepass.graph.perplexity.perplexity` says about the validation rows of `data`."""
    validation = data(held_out).validation
    assert validation is not None
    return perplexity(program, validation.input_ids.flatten(), context=CONTEXT, dtype=dtype).nll_mean


def stopping_at(step: int, number: int = signal.SIGTERM) -> TrainingData:
    """Data that sends a signal while a step is being computed."""
    found = data()
    take, taken = found.train.take, iter(range(1, 100))

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if next(taken) == step:
            signal.raise_signal(number)
        return take(*args, **kwargs)

    found.train.take = signalled  # type: ignore[method-assign]
    return found


def assert_same(first: Program, second: Program) -> None:
    assert digest(first.tensors()) == digest(second.tensors())
    for key in ("validations", "flips_since_first", "flips_since_first_by_layer", "step_of_weights", "num_tokens"):
        assert first.retraining[0][key] == second.retraining[0][key], key


def assert_whole(folder: Path, num_steps: int = 8) -> None:
    """Each step and each validation stands once in the file of metrics."""
    lines = read_metrics(folder / METRICS)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, num_steps + 1))
    validated = [line["step"] for line in lines if "validation" in line]
    assert validated == sorted(set(validated)) == [0, *range(4, num_steps + 1, 4)]


def learn(folder: Path | None = None, recipe: str = LEARN_MASKS, name: str = "llama", **changes: Any) -> Program:
    return run(name, folder, recipe, **MASKLLM | changes)
