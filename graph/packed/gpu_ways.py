"""The ways to multiply packed 2:4 weights on a GPU: our kernels, torch's 2:4 kernels, and unpacking. `gpu.py` chooses.

Tensor shape legend: O out features, I in features, K kept values of a row (I / 2), G groups of columns that share a scale,
P sums that a branch multiplies, T tokens.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.packed.layout import FLOATS, Values
from sparsepass.graph.support import SparsepassError

if TYPE_CHECKING:
    from types import ModuleType

LOWEST_CAPABILITY: Final = (8, 0)
"""Ampere, the first generation with arithmetic in bfloat16."""
_OPTIONS: Final = {"enable_fp_fusion": True}
"""Said to the compiler, since triton 3.9 warns where nothing is said, and 3.10 will not fuse."""
_WORDS: Final = {"bf16": torch.int64, "fp16": torch.int64, "int8": torch.int32, "int4": torch.int16}


@final
@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to multiply on a GPU, with the sizes that our kernels take.

    Attributes:
        name: ``select`` and ``gather`` take one token at a time, ``dot`` several, on tensor cores; ``torch`` is torch's 2:4
            kernel; ``dense`` unpacks the weight.
        rows: Rows of the weight in a program.
        units: Groups of eight columns in a step.
        per_thread: Of those, how many one thread takes (one token only).
        tokens: Tokens in a program (dot only).
        splits: Programs that share the columns of a row.
        warps: Warps of a program.
        stages: Steps whose loads are under way at once, in shared memory; 1 leaves it to the hardware (one token only).
        unroll: Steps that are written out one after the other (one token only).
    """

    name: Literal["select", "gather", "dot", "torch", "dense"]
    rows: int = 8
    units: int = 64
    per_thread: int = 2
    tokens: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 1
    unroll: int = 1


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


def check_stored(weight: GpuWeight) -> None:
    """Refuse tensors whose sizes do not fit together, before a kernel reads beyond their ends.

    Raises:
        SparsepassError: If so.
    """
    rows, columns = weight.shape
    groups = 1 if not weight.group_size else ceil_div(columns, weight.group_size)
    expected: dict[str, tuple[Tensor | None, list[int]]] = {
        "kept": (weight.kept, [rows, columns // (4 if weight.values == "int4" else 2)]),
        "codes": (weight.codes, [rows, columns // 8]),
        "scales": (weight.scales, [rows, groups]),
        "branch": (weight.branch, [rows, columns // max(weight.k, 1)]),
        "bias": (weight.bias, [rows]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (list(tensor.shape) != shape or not tensor.is_contiguous()):
            gaps = "" if tensor.is_contiguous() else " with gaps"
            raise SparsepassError(
                f"{name} of a packed weight {rows} x {columns} has to be {shape}, and is {list(tensor.shape)}{gaps}"
            )
    if (weight.scales is None) != (weight.values in FLOATS):
        raise SparsepassError(
            f"scales belong to integers, and {weight.values} has {'none' if weight.scales is None else 'some'}"
        )
    if weight.group_size % 8:
        raise SparsepassError(f"a scale is shared by a multiple of 8 columns, and group_size is {weight.group_size}")
    if weight.branch is not None and (weight.k < 1 or columns % weight.k):
        raise SparsepassError(f"a branch sums k columns, where k divides {columns}, and k is {weight.k}")


def gpu_refusal(device: torch.device) -> str:
    """Say why our kernels cannot run on a device; empty if they can.

    Example:
        >>> bool(gpu_refusal(torch.device("meta")))
        True
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


def dense_weight(weight: GpuWeight, dtype: torch.dtype) -> Tensor:
    """The weight with its zeros, scaled and rounded to a type, by one kernel.

    Returns:
        ``[O, I]``.
    """
    kernels = launchable(weight.kept)
    rows, columns = weight.shape
    out_OI = torch.empty(rows, columns, dtype=dtype, device=weight.kept.device)
    grid = (ceil_div(rows, 8), ceil_div(columns, 8 * 32))
    stored = (_words(weight), weight.codes, _or(weight.scales, weight.codes))
    kernels.make_dense[grid](*stored, out_OI, rows, *_constants(weight), 8, 32, **_OPTIONS)
    return out_OI


# ---- The ways ----


def _one_token(way: Way, x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    kernels, (rows, _) = launchable(x_TI), weight.shape
    wide = x_TI.dtype.itemsize == 2
    if wide and (x_TI.storage_offset() % 4 or x_TI.stride(0) % 4):
        x_TI = x_TI.clone(memory_format=torch.contiguous_format)
    tokens = x_TI.shape[0]
    out = _splits(way, y_TO)
    kernels.one_token[(ceil_div(rows, way.rows), way.splits, tokens)](
        x_TI,
        x_TI.view(torch.int64) if wide else x_TI,
        *_tensors(weight),
        out,
        rows,
        tokens,
        x_TI.stride(0),
        way.splits,
        *_constants(weight),
        *_branch(weight),
        _power(max(weight.k, 1)),
        weight.bias is not None,
        way.name == "gather",
        wide,
        way.rows,
        way.units,
        way.per_thread,
        way.stages,
        way.unroll,
        num_warps=way.warps,
        **_OPTIONS,
    )
    _add(way, out, y_TO)


def _several_tokens(way: Way, x_TI: Tensor, weight: GpuWeight, y_TO: Tensor) -> None:
    kernels, (rows, _), tokens = launchable(x_TI), weight.shape, x_TI.shape[0]
    if x_TI.dtype == torch.float32:
        raise SparsepassError("the way dot multiplies bfloat16 and float16, and this input is float32; take select or dense")
    out = _splits(way, y_TO)
    kernels.some_tokens[(ceil_div(rows, way.rows), way.splits, ceil_div(tokens, way.tokens))](
        x_TI,
        *_tensors(weight),
        out,
        rows,
        tokens,
        x_TI.stride(0),
        way.splits,
        *_constants(weight),
        *_branch(weight),
        weight.bias is not None,
        kernels.is_interpreted(),
        way.rows,
        way.units,
        way.tokens,
        num_warps=way.warps,
        **_OPTIONS,
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


RUNS: Final[dict[str, Callable[[Way, Tensor, GpuWeight, Tensor], None]]] = {
    "select": _one_token,
    "gather": _one_token,
    "dot": _several_tokens,
    "dense": _dense,
    "torch": _torch,
}
"""Name of a way -> what writes the product to its last argument, ``[T, O]``."""


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
        launchable(out).add_splits[(ceil_div(y_TO.numel(), 512),)](out, y_TO, y_TO.numel(), way.splits, 512, **_OPTIONS)


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


def launchable(tensor: Tensor) -> Any:
    """Our kernels.

    Raises:
        SparsepassError: If they cannot run where a tensor is.
    """
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


def ceil_div(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
