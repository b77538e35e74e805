"""Products of packed 2:4 weights on an NVIDIA GPU, each by the way that was fastest when it was first needed.

1. Few tokens go through our own kernels (`gpu_kernels.py`), which read the stored form.
2. Many tokens may go through torch's 2:4 kernels. CUTLASS keeps values in the order of the stored form, so only the codes, a
   ninth of the bytes, are brought into its order, for each product anew.
3. Where neither wins, the weight is unpacked for the one product, and cuBLAS multiplies.

What is fastest is measured for each shape, kind and number of tokens (rounded up to a power of two), with a cold cache, and
kept for the process. While a CUDA graph is captured nothing can be measured, and what has not been measured goes by a rule: run
once before.

Tensor shape legend: O out features, I in features, K kept values of a row (I / 2), G groups of columns that share a scale,
P sums that a branch multiplies, T tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from sparsepass.graph.packed.gpu_ways import RUNS, GpuWeight, Way, ceil_div, check_stored, launchable, two_four_refusal
from sparsepass.graph.packed.layout import Values
from sparsepass.graph.support import SparsepassError, first_line

OWN_TOKENS: Final = 16
"""Up to here only our own kernels are tried: torch's start at tiles of 64 tokens, and unpacking reads and writes too much."""
DOT_TOKENS: Final = 256
"""Above, arithmetic takes the time, and our simple product loses to the libraries'."""
_ONE_BY_ONE: Final = 4
"""Above, the kernels for one token are not tried: each token costs them the same again."""
_TYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

Timer = Callable[[Callable[[], Any]], float]
"""Gives the time of one call, in milliseconds."""


@torch.no_grad()
def packed_linear_gpu(
    x: Tensor,
    kept: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    group_size: int = 0,
    values: Values = "bf16",
    branch: Tensor | None = None,
    k: int = 0,
    bias: Tensor | None = None,
    *,
    way: Way | None = None,
) -> Tensor:
    """``x W^T``, plus the SLoRB branch and the bias, from the stored form of W.

    Shapes: x ``[..., I]`` gives ``[..., O]``.

    Args:
        x: bfloat16, float16 or float32, with any strides.
        kept: The kept values, ``[O, I / 2]``; for int4 ``[O, I / 4]`` of bytes.
        codes: ``[O, I / 8]`` of bytes.
        scales: ``[O, G]`` of integers.
        group_size: Columns that share a scale, a multiple of 8; 0 for all of a row.
        values: What the kept values are.
        branch: ``[O, I / k]``.
        k: Consecutive columns of x that the branch sums.
        bias: ``[O]``.
        way: How to multiply; by default what is fastest.

    Returns:
        The product, of x's type.

    Raises:
        SparsepassError: If x or the weight does not fit, or nothing can run here.

    Exactness: one token at a time, products and sums are in float32, in an order that depends on the way. ``dot`` and ``dense``
    round a weight times its scale, and the sums of the branch, to x's type first (``dot`` not if a row has one scale).
    """
    weight = GpuWeight(values, kept, codes, scales, group_size, branch, k, bias)
    rows, columns = weight.shape
    if x.dtype not in _TYPES or not x.dim() or x.shape[-1] != columns:
        raise SparsepassError(
            f"this packed layer takes {columns} features of bfloat16, float16 or float32, and the input is "
            f"{list(x.shape)} of {x.dtype}"
        )
    check_stored(weight)
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        # Triton launches where torch is, not where the tensors are.
        with torch.cuda.device(x.device):
            return packed_linear_gpu(x, kept, codes, scales, group_size, values, branch, k, bias, way=way)
    flat_TI = x.reshape(-1, columns)
    if flat_TI.stride(1) != 1:
        flat_TI = flat_TI.contiguous()
    y_TO = x.new_empty(flat_TI.shape[0], rows)
    if y_TO.numel():
        way = way or chosen_way(flat_TI, weight)
        RUNS[way.name](way, flat_TI, weight, y_TO)
    return y_TO.view(*x.shape[:-1], rows)


_CHOSEN: dict[tuple[Any, ...], Way] = {}


def chosen_way(x_TI: Tensor, weight: GpuWeight) -> Way:
    """The way that was fastest for such a product; measured if there was none before.

    Raises:
        SparsepassError: If none works.
    """
    launchable(x_TI)
    tokens = 1 << (x_TI.shape[0] - 1).bit_length()
    parts = (weight.group_size, weight.k, weight.scales is None, weight.bias is None)
    key = (x_TI.device, x_TI.dtype, tokens, weight.values, weight.shape, *parts)
    found = _CHOSEN.get(key)
    if found is None:
        if x_TI.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return likely_way(x_TI, weight)
        found = _CHOSEN[key] = fastest(x_TI, weight)
    return found


def ways(x_TI: Tensor, weight: GpuWeight) -> tuple[Way, ...]:
    """What is worth trying for a product: a handful, since each is compiled."""
    tokens, columns = x_TI.shape[0], weight.shape[1]
    found: list[Way] = []
    if tokens <= _ONE_BY_ONE or (x_TI.dtype == torch.float32 and tokens <= OWN_TOKENS):
        sizes = [Way(name="select", rows=4), Way(name="select", rows=8), Way(name="select", rows=8, unroll=2)]
        sizes += [Way(name="select", rows=16), Way(name="select", rows=16, units=128, per_thread=4, warps=8)]
        sizes += [Way(name="select", rows=8, stages=4), Way(name="gather")]
        found += [replace(size, splits=n) for size in sizes for n in (1, 2, 4) if n * size.units * 8 <= columns]
        found = found or [Way(name="select", rows=4)]
    if 1 < tokens <= DOT_TOKENS and x_TI.dtype != torch.float32:
        block = min(64, max(16, 1 << (tokens - 1).bit_length()))
        sizes = [Way(name="dot", rows=size, units=16, tokens=block) for size in (32, 64)]
        found += [replace(size, splits=n) for size in sizes for n in (1, 2, 8) if n * 128 <= columns]
    if tokens > OWN_TOKENS:
        found += [Way(name="dense")]
        found += [Way(name="torch")] if not two_four_refusal(weight, x_TI.dtype) else []
    return tuple(found)


def likely_way(x_TI: Tensor, weight: GpuWeight) -> Way:
    """What is taken where nothing was measured: splits until some 500 programs are there, enough for any GPU."""
    tokens, (rows, columns) = x_TI.shape[0], weight.shape
    if x_TI.dtype == torch.float32 or tokens == 1:
        way = Way(name="select") if tokens <= OWN_TOKENS else Way(name="dense")
    else:
        way = Way(name="dot", rows=32, units=16) if tokens <= OWN_TOKENS else Way(name="dense")
    splits = 1
    while ceil_div(rows, way.rows) * splits < 500 and 2 * splits * way.units * 8 <= columns and splits < 8:
        splits *= 2
    return replace(way, splits=splits)


def fastest(x_TI: Tensor, weight: GpuWeight, *, timer: Timer | None = None) -> Way:
    """Time each way and give the fastest.

    Args:
        x_TI: An input.
        weight: The weight.
        timer: Takes the times; by default Triton's, which empties the cache before each call, as a model's other layers do.

    Raises:
        SparsepassError: If none works.
    """
    times: dict[Way, float] = {}
    reasons: list[str] = []
    # A way may need more than this GPU has, or a library that is missing.
    failures: tuple[type[Exception], ...] = (RuntimeError, *_triton_errors())
    for way in ways(x_TI, weight):
        y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
        try:
            times[way] = (timer or _time_ms)(functools.partial(RUNS[way.name], way, x_TI, weight, y_TO))
        except failures as error:
            reasons.append(f"{way.name}: {first_line(error)}")
    if not times:
        raise SparsepassError(f"no kernel multiplies a packed weight of {weight.shape} here: {'; '.join(reasons)}")
    return min(times, key=lambda way: times[way])


def _time_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def _triton_errors() -> tuple[type[Exception], ...]:
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return ()
    return (OutOfResources,)
