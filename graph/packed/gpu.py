"""Products of packed 2:4 weights on an NVIDIA GPU, each by the way that was fastest when it was first needed.

1. Few tokens go through our own kernels (`gpu_kernels.py`), which read the stored form.
2. Many tokens may go through torch's 2:4 kernels. CUTLASS keeps values in the order of the stored form, so only the codes, a ninth
   of the bytes, are brought into its order, for each product anew.
3. Where neither wins, the weight is unpacked for the one product, and cuBLAS multiplies.

What is fastest is measured for each shape, kind and number of tokens (rounded up to a power of two), with a cold cache, and kept for
the process. While a CUDA graph is captured nothing can be measured, and what has not been measured goes by a rule: run once before.

Tensor shape legend: O out features, I in features, K kept values of a row (I / 2), G groups of columns that share a scale,
P sums that a branch multiplies, T tokens.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.packed.layout import FLOATS, Values
from sparsepass.graph.support import SparsepassError, first_line

if TYPE_CHECKING:
    from types import ModuleType

LOWEST_CAPABILITY: Final = (8, 0)
"""Ampere, the first generation with arithmetic in bfloat16."""
OWN_TOKENS: Final = 16
"""Up to here only our own kernels are tried: torch's start at tiles of 64 tokens, and unpacking reads and writes too much."""
DOT_TOKENS: Final = 256
"""Above, arithmetic takes the time, and our simple product loses to the libraries'."""
_ONE_BY_ONE: Final = 4
"""Above, the kernels for one token are not tried: each token costs them the same again."""
_WORDS: Final = {"bf16": torch.int64, "fp16": torch.int64, "int8": torch.int32, "int4": torch.int16}
_TYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

Timer = Callable[[Callable[[], Any]], float]
"""Gives the time of one call, in milliseconds."""


@final
@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to multiply on a GPU, with the sizes that our kernels take.

    Attributes:
        name: ``select`` and ``gather`` take one token at a time, ``dot`` several, on tensor cores; ``torch`` is torch's 2:4 kernel;
            ``dense`` unpacks the weight.
        rows: Rows of the weight in a program.
        units: Groups of eight columns in a step.
        per_thread: Of those, how many one thread takes (one token only).
        tokens: Tokens in a program (dot only).
        splits: Programs that share the columns of a row.
        warps: Warps of a program.
        stages: Steps whose loads are under way at once; 1 leaves it to the hardware.
    """

    name: Literal["select", "gather", "dot", "torch", "dense"]
    rows: int = 8
    units: int = 64
    per_thread: int = 2
    tokens: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 1


class GpuWeight(NamedTuple):
    """A packed weight on a GPU, as it is stored, with what is added to its product.

    Attributes:
        values: Kind of the values.
        kept: ``[O, K]``, or ``[O, K / 2]`` of bytes (int4).
        codes: ``[O, K / 4]``.
        scales: ``[O, G]``; None for floating values.
        group_size: Columns that share a scale; 0 for all of a row.
        branch: ``[O, P]``, or None.
        k: Columns that the branch sums; 0 without one.
        bias: ``[O]``, or None.
    """

    values: Values
    kept: Tensor
    codes: Tensor
    scales: Tensor | None
    group_size: int
    branch: Tensor | None
    k: int
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.codes.shape[0], 8 * self.codes.shape[1]


def gpu_refusal(device: torch.device) -> str:
    """Say why our kernels cannot run on a device; empty if they can.

    Example:
        >>> gpu_refusal(torch.device("meta"))
        'the kernels for packed weights run on NVIDIA GPUs, and this device is meta'
    """
    kernels = _kernels()
    if kernels is None:
        return "the kernels for packed weights on a GPU are written in Triton, which is not installed here: pip install triton"
    if kernels.is_interpreted():
        return ""
    if device.type != "cuda" or torch.version.hip:
        kind = "one of AMD" if device.type == "cuda" else str(device)
        return f"the kernels for packed weights run on NVIDIA GPUs, and this device is {kind}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LOWEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the kernels for packed weights need Ampere (SM80) or newer, and {name} is SM{major}{minor}"
    return ""


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
        group_size: Columns that share a scale, a multiple of 4; 0 for all of a row.
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
            f"this packed layer takes {columns} features of bfloat16, float16 or float32, and the input is {list(x.shape)} of {x.dtype}"
        )
    flat_TI = x.reshape(-1, columns)
    if flat_TI.stride(1) != 1:
        flat_TI = flat_TI.contiguous()
    y_TO = x.new_empty(flat_TI.shape[0], rows)
    if y_TO.numel():
        way = way or chosen_way(flat_TI, weight)
        _RUNS[way.name](way, flat_TI, weight, y_TO)
    return y_TO.view(*x.shape[:-1], rows)


def dense_weight(weight: GpuWeight, dtype: torch.dtype) -> Tensor:
    """The weight with its zeros, scaled and rounded to a type, by one kernel.

    Returns:
        ``[O, I]``.
    """
    kernels = _launchable(weight.kept)
    rows, columns = weight.shape
    out_OI = torch.empty(rows, columns, dtype=dtype, device=weight.kept.device)
    grid = (_ceil(rows, 8), _ceil(columns, 8 * 32))
    stored = (_words(weight), weight.codes, _or(weight.scales, weight.codes))
    kernels.make_dense[grid](*stored, out_OI, rows, *_constants(weight), 8, 32)
    return out_OI


# ---- Which way ----


_CHOSEN: dict[tuple[Any, ...], Way] = {}


def chosen_way(x_TI: Tensor, weight: GpuWeight) -> Way:
    """The way that was fastest for such a product; measured if there was none before.

    Raises:
        SparsepassError: If none works.
    """
    _launchable(x_TI)
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
    tokens, (rows, columns) = x_TI.shape[0], weight.shape
    found: list[Way] = []
    if tokens <= _ONE_BY_ONE or (x_TI.dtype == torch.float32 and tokens <= OWN_TOKENS):
        sizes = [Way(name="select", rows=4), Way(name="select", rows=8), Way(name="select", rows=16)]
        sizes += [Way(name="select", rows=16, units=128, per_thread=4, warps=8), Way(name="gather", rows=8)]
        found += [each for size in sizes for each in (size, replace(size, splits=4)) if each.splits * each.units * 8 <= columns]
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
    while _ceil(rows, way.rows) * splits < 500 and 2 * splits * way.units * 8 <= columns and splits < 8:
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
    for way in ways(x_TI, weight):
        y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
        try:
            times[way] = (timer or _time_ms)(functools.partial(_RUNS[way.name], way, x_TI, weight, y_TO))
        except (RuntimeError, *_triton_errors()) as error:  # one that needs more than this GPU has, or a library that is missing
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


# ---- The ways ----


def _one_token(way: Way, x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    kernels, (rows, _) = _launchable(x_TI), weight.shape
    wide = x_TI.dtype.itemsize == 2
    if wide and (x_TI.storage_offset() % 4 or x_TI.stride(0) % 4):
        x_TI = x_TI.clone(memory_format=torch.contiguous_format)
    tokens = x_TI.shape[0]
    out = _splits(way, y_TO)
    kernels.one_token[(_ceil(rows, way.rows), way.splits, tokens)](
        x_TI,
        x_TI.view(torch.int64) if wide else x_TI,
        *_tensors(weight),
        out,
        rows,
        tokens,
        x_TI.stride(0),
        *_constants(weight),
        *_branch(weight),
        _power(max(weight.k, 1)),
        weight.bias is not None,
        way.name == "gather",
        wide,
        way.rows,
        way.units,
        way.per_thread,
        way.splits,
        way.stages,
        num_warps=way.warps,
    )
    _add(way, out, y_TO)


def _several_tokens(way: Way, x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    kernels, (rows, _), tokens = _launchable(x_TI), weight.shape, x_TI.shape[0]
    if x_TI.dtype == torch.float32:
        raise SparsepassError("the way dot multiplies bfloat16 and float16, and this input is float32; take select or dense")
    out = _splits(way, y_TO)
    kernels.some_tokens[(_ceil(rows, way.rows), way.splits, _ceil(tokens, way.tokens))](
        x_TI,
        *_tensors(weight),
        out,
        rows,
        tokens,
        x_TI.stride(0),
        *_constants(weight),
        *_branch(weight),
        weight.bias is not None,
        kernels.is_interpreted(),
        way.rows,
        way.units,
        way.tokens,
        way.splits,
        num_warps=way.warps,
    )
    _add(way, out, y_TO)


def _dense(_way: Way, x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    torch.mm(x_TI, dense_weight(weight, x_TI.dtype).t(), out=y_TO)
    _add_rest(x_TI, weight, y_TO)


def _torch(_way: Way, x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    # CUTLASS takes tokens in steps of eight.
    filled_TI = functional.pad(x_TI, (0, 0, 0, -x_TI.shape[0] % 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says once that the operator is a prototype
        product_OT = torch._sparse_semi_structured_mm(weight.kept, cutlass_codes(weight.codes), filled_TI.t())
    y_TO.copy_(product_OT.t()[: x_TI.shape[0]])
    _add_rest(x_TI, weight, y_TO)


_RUNS: Final[dict[str, Callable[[Way, Tensor, GpuWeight, Tensor], None]]] = {
    "select": _one_token,
    "gather": _one_token,
    "dot": _several_tokens,
    "dense": _dense,
    "torch": _torch,
}


def _add_rest(x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    if weight.branch is not None:
        y_TO.addmm_(x_TI.unflatten(-1, (-1, weight.k)).sum(-1), weight.branch.t().to(x_TI.dtype))
    if weight.bias is not None:
        y_TO += weight.bias.to(x_TI.dtype)


def _splits(way: Way, y_TO: Tensor) -> Tensor:
    return y_TO if way.splits == 1 else y_TO.new_empty(way.splits, *y_TO.shape, dtype=torch.float32)


def _add(way: Way, out: Tensor, y_TO: Tensor) -> None:
    """Sum what the splits gave, always in the same order."""
    if way.splits > 1:
        _launchable(out).add_splits[(_ceil(y_TO.numel(), 512),)](out, y_TO, y_TO.numel(), way.splits, 512)


# ---- torch's 2:4 kernels ----


def two_four_refusal(weight: GpuWeight, dtype: torch.dtype) -> str:
    """Say why torch's 2:4 kernel does not take a weight; empty if it does.

    Example:
        >>> codes = torch.zeros(32, 4, dtype=torch.uint8)
        >>> two_four_refusal(GpuWeight("bf16", codes, codes, None, 0, None, 0, None), torch.bfloat16)
        'in_features 32 is not a multiple of 64'
    """
    rows, columns = weight.shape
    if FLOATS.get(weight.values) != dtype:
        return f"it multiplies weights of the activations' type, and these are {weight.values}"
    for what, size, multiple in (("out_features", rows, 32), ("in_features", columns, 64)):
        if size % multiple:
            return f"{what} {size} is not a multiple of {multiple}"
    return ""


def cutlass_codes(codes: Tensor) -> Tensor:
    """The codes in the order that CUTLASS reads, for values of 16 bits.

    Shapes: ``[O, I / 8]`` of bytes gives ``[O, I / 16]`` of int16, O a multiple of 32, I of 64.
    """
    rows, words = codes.shape[0], codes.shape[1] // 2
    order = _cutlass_order(rows, words, codes.device)
    return codes.view(torch.int16).flatten()[order].view(rows, words)


@functools.lru_cache(maxsize=32)  # a model has a handful of shapes; 4 bytes for 16 weights, once for each
def _cutlass_order(rows: int, words: int, device: torch.device) -> Tensor:
    from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

    places: Tensor = _calculate_meta_reordering_scatter_offsets(rows, words, torch.int16, device)
    return places.argsort().to(torch.int32)


# ---- What the kernels take ----


@functools.cache
def _kernels() -> "ModuleType | None":
    """Our kernels; None without triton. Loading it takes half a second, so it is not done before."""
    from sparsepass.graph.packed import gpu_kernels

    return gpu_kernels if gpu_kernels.HAS_TRITON else None


def _launchable(tensor: Tensor) -> Any:
    kernels = _kernels()
    if kernels is None or not (tensor.is_cuda or kernels.is_interpreted()):
        raise SparsepassError(gpu_refusal(tensor.device))
    return kernels


def _words(weight: GpuWeight) -> Tensor:
    return weight.kept.view(_WORDS[weight.values])


def _tensors(weight: GpuWeight) -> tuple[Tensor, ...]:
    """Tensors of a weight; for those that it lacks, one that no kernel then reads."""
    codes = weight.codes
    return _words(weight), codes, _or(weight.scales, codes), _or(weight.branch, codes), _or(weight.bias, codes)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _constants(weight: GpuWeight) -> tuple[Any, ...]:
    """Units, kind, scales of a row and columns that share one."""
    groups = 0 if weight.scales is None else weight.scales.shape[1]
    return weight.codes.shape[1], weight.values, groups, weight.group_size or weight.shape[1]


def _branch(weight: GpuWeight) -> tuple[int, int]:
    return (0, 1) if weight.branch is None else (weight.branch.shape[1], weight.k)


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
