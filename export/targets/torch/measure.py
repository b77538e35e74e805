"""Timing layers on a GPU: dense against the 2:4 kernels of each backend, at several sizes.

A kernel's time depends on the shape of a weight and not on its values, so each shape is timed once, with a random weight.

Tensor shape legend: O out features, I in features, B batch, T tokens.
"""

import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from sparsepass.export.targets.torch.choice import Shapes, Timing
from sparsepass.export.targets.torch.kernels import BACKENDS, check_device, convert, refusal, short
from sparsepass.export.targets.torch.layer import SemiStructuredLinear
from sparsepass.export.targets.torch.record import LayerRecord, Measured, Times
from sparsepass.graph.support import first_line

Call = Callable[[], Any]
Timer = Callable[[Call], float]
"""Gives the time of one call, in milliseconds."""

_SHAPES: Final = ((1, 1), (8, 1), (1, 16), (1, 128), (1, 512), (1, 2048), (1, 4096), (8, 512), (8, 2048))
ROUNDS: Final = 3
_SECONDS: Final = 0.05


def default_shapes(limit: int | None) -> Shapes:
    """Batch and sequence that are measured if none are named, within a model's number of positions.

    Example:
        >>> default_shapes(128)
        ((1, 1), (8, 1), (1, 16), (1, 128))
    """
    return tuple(shape for shape in _SHAPES if limit is None or shape[1] <= limit)


def measure_layers(
    layers: Iterable[LayerRecord],
    shapes: Shapes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiled: bool = False,
    timer: Timer | None = None,
) -> Measured:
    """Time every shape among the layers that a 2:4 kernel takes.

    Args:
        layers: What `survey` found.
        shapes: Batch and sequence of each size.
        dtype: Type of the weights.
        device: The GPU.
        compiled: Whether the calls are compiled by torch.compile, as a compiled model's are. Without it, the time that
            torch takes on the processor for each call counts too, as it does for a model that is not compiled.
        timer: Takes the times; by default torch's own timer.

    Raises:
        SparsepassError: If the GPU has no 2:4 kernels.
    """
    here = check_device(device)
    backends = probe(dtype, device)
    wanted = dict.fromkeys((layer.shape, layer.bias) for layer in layers if layer.eligible)
    times = tuple(
        Times(
            shape=shape,
            bias=bias,
            points=measure_shape(
                shape,
                shapes,
                [name for name, why in backends.items() if not why and not refusal(shape, dtype, name)],
                dtype=dtype,
                device=device,
                bias=bias,
                compiled=compiled,
                timer=timer or time_ms,
            ),
        )
        for shape, bias in wanted
    )
    return Measured(device=here, dtype=short(dtype), compiled=compiled, backends=backends, times=times)


def probe(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Try each backend on a small product: backend -> why it cannot be used here, empty if it can.

    A library may be missing (cuSPARSELt), or have no kernels for the GPU: only a call tells.
    """
    found = {}
    for name in BACKENDS:
        if name == "cusparselt" and not torch.backends.cusparselt.is_available():
            found[name] = "cuSPARSELt is not there: this build of torch comes without it"
            continue
        weight_OI = torch.tensor([0, 1, 2, 0], dtype=dtype, device=device).repeat(64, 32)
        x_TI = torch.ones(8, weight_OI.shape[1], dtype=dtype, device=device)
        try:
            got = nn.functional.linear(x_TI, convert(weight_OI, name))
            is_right = torch.allclose(got, nn.functional.linear(x_TI, weight_OI), rtol=1e-2)  # waits for errors on the GPU
        except RuntimeError as error:
            found[name] = first_line(error)
        else:
            found[name] = "" if is_right else "it computes a wrong product"
    return found


@torch.no_grad()
def measure_shape(
    shape_OI: tuple[int, ...],
    shapes: Shapes,
    backends: Iterable[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool = False,
    compiled: bool = False,
    timer: Timer,
) -> tuple[Timing, ...]:
    """Time a layer of one shape, dense and with each backend.

    Args:
        shape_OI: Out and in features.
        shapes: Batch and sequence of each size.
        backends: Names from `BACKENDS`, of those that take the shape.
        dtype: Type of the weight.
        device: The GPU.
        bias: Whether a bias is added.
        compiled: See `measure_layers`.
        timer: Takes the times; the median of several rounds counts.
    """
    weight_OI = random_two_four(shape_OI, dtype, device)
    bias_O = torch.randn(shape_OI[0], dtype=dtype, device=device) if bias else None
    layers: dict[str, nn.Module] = {"": dense_layer(weight_OI, bias_O)}
    for name in backends:
        layers[name] = SemiStructuredLinear(convert(weight_OI, name), bias_O)
    found = []
    for batch, sequence in shapes:
        x_BTI = torch.randn(batch, sequence, shape_OI[1], dtype=dtype, device=device)
        ms = time_layers(layers, x_BTI, compiled=compiled, timer=timer)
        found.append(Timing(batch=batch, sequence=sequence, dense_ms=ms.pop(""), sparse_ms=ms))
    return tuple(found)


@torch.no_grad()
def time_layers(
    layers: Mapping[str, nn.Module], x_BTI: Tensor, *, compiled: bool, timer: Timer, rounds: int = ROUNDS
) -> dict[str, float]:
    """Time several layers on one input, in turn, so that a GPU that slows down slows all of them: name -> median, in ms.

    Args:
        layers: Name -> layer.
        x_BTI: Their input.
        compiled: Whether they are compiled first.
        timer: Takes the times.
        rounds: How often each is timed.
    """
    if compiled:
        torch.compiler.reset()  # or the recompilation limit would turn later sizes back into uncompiled ones
    runs = {name: torch.compile(layer, dynamic=False) if compiled else layer for name, layer in layers.items()}
    calls = {name: partial(run, x_BTI) for name, run in runs.items()}
    times: Mapping[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timer(call))
    return {name: statistics.median(each) for name, each in times.items()}


def random_two_four(shape_OI: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random weight that keeps the first and third of every four entries in its first half of rows, else the others.

    Shapes: [O, I].
    """
    weight_OI = torch.randn(shape_OI, dtype=dtype, device=device)
    columns = torch.arange(shape_OI[1], device=device) % 2
    rows = torch.arange(shape_OI[0], device=device) >= shape_OI[0] // 2
    return weight_OI * (columns == rows[:, None])


def dense_layer(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """The layer to compare with."""
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    layer.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)  # type: ignore[assignment]
    return layer


def time_ms(call: Call) -> float:
    """Time of one call in milliseconds, launches and waiting for the GPU included; the median over a twentieth of a second."""
    from torch.utils.benchmark import Timer as TorchTimer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's advice
        call()
    median: float = TorchTimer("call()", globals={"call": call}).blocked_autorange(min_run_time=_SECONDS).median
    return median * 1000
