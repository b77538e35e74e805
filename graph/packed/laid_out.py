"""A packed weight in memory, as a kernel reads it, and its product with activations.

How the bytes lie depends on the kernel (*path*) and is the library's affair; `interface.h` has its functions. The path
``torch`` has rows of kept values followed by their codes, and torch's own operations. A weight that was not laid out, or lies
on another device, is taken as it is stored (`codes` beside `data`), by torch's operations too.

Tensor shapes: O rows, I columns, R sums of k columns, T tokens.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Final, get_args

import torch
from torch import Tensor
from torch.nn import functional

from sparsepass.graph.native import KINDS, PATHS, TORCH, TYPES as TYPE_NAMES, Kernels, NativeWeight, kernels, processor
from sparsepass.graph.packed.gpu import packed_linear_gpu
from sparsepass.graph.packed.gpu_ways import gpu_refusal
from sparsepass.graph.packed.layout import PackedWeight, Values, bad_codes, check_codes, check_sizes, stored_form, with_zeros
from sparsepass.graph.support import SparsepassError

TYPES: Final = {getattr(torch, name): number for name, number in TYPE_NAMES.items()}
"""Activations that a packed layer takes."""
_FEW_TOKENS: Final = 16
_MANY_TOKENS: Final = 64
_ALL_TOKENS: Final = sys.maxsize
TILE: Final = 1 << 20
"""Weights that are unpacked at once where torch multiplies. With one thread 512 tokens then take 1% longer than by the dense
layer (2048 x 2048 bf16); with two 25%, since a tile that was just written lies in the other core's cache (AMD Zen 4)."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a weight in memory is, without its tensors.

    Attributes:
        values: Kind of the values.
        path: Kernel that the weight is laid out for.
        rows: Output features.
        columns: Input features.
        group_size: Columns that share a scale; 0 for one scale a row, or none.
        k: Input features that the SLoRB branch sums into one; 0 for no branch.
        dense: The data are all values, row by row.
    """

    values: Values
    path: str
    rows: int
    columns: int
    group_size: int = 0
    k: int = 0
    dense: bool = False

    def to_numbers(self) -> list[int]:
        """As integers, for an operator.

        Example:
            >>> form = Form(values="int8", path="generic", rows=2, columns=8)
            >>> Form.from_numbers(form.to_numbers()) == form
            True
        """
        return [KINDS[self.values], PATHS[self.path], self.rows, self.columns, self.group_size, self.k, int(self.dense)]

    @staticmethod
    def from_numbers(numbers: Sequence[int]) -> "Form":
        """The form that `to_numbers` gave."""
        kind, path, rows, columns, group_size, k, dense = numbers
        return Form(
            values=_NAMES_OF_KINDS[kind],
            path=_NAMES_OF_PATHS[path],
            rows=rows,
            columns=columns,
            group_size=group_size,
            k=k,
            dense=bool(dense),
        )


_NAMES_OF_KINDS: Final[dict[int, Values]] = {KINDS[name]: name for name in get_args(Values)}
_NAMES_OF_PATHS: Final = {number: name for name, number in PATHS.items()}


@cache
def most_tokens(form: Form) -> int:
    """How many tokens a kernel takes; more are multiplied by torch, with the weight unpacked.

    With many tokens arithmetic takes the time and not memory, and half of it is spared. With AVX512 that makes up for what
    finding the inputs costs: for 512 tokens bf16 is a tenth faster than torch's dense product (AMD Zen 4, two threads; weights
    of integers are made bf16 on the way). With AMX the kernel unpacks rows for the processor's unit for matrices, which meets
    all tokens. The other kernels win while there are few tokens.
    """
    if form.dense or form.path == "generic" or form.values == "fp16":
        return _FEW_TOKENS
    if form.path == "amx":
        return _ALL_TOKENS
    if form.path == "avx512" and "BF16" in processor():
        return _MANY_TOKENS if "AMX" in processor() else _ALL_TOKENS
    return _FEW_TOKENS if form.values == "bf16" else _MANY_TOKENS


class _Call:
    """What follows from the shape and the type of an input: told once, since most inputs are like the one before.

    Args:
        x: The input.
        widths: Columns of each result.

    Attributes:
        results: A tensor like each result, without memory: `torch.empty_like` takes half the time of `torch.empty`.
    """

    __slots__ = ("dtype", "number", "results", "shape", "tokens")

    def __init__(self, x: Tensor, widths: Sequence[int]) -> None:
        self.shape, self.dtype, self.number = x.shape, x.dtype, TYPES[x.dtype]
        self.tokens = x.numel() // self.shape[-1]
        self.results = [x.new_empty((*self.shape[:-1], width)) for width in widths]
        for result in self.results:
            result.untyped_storage().resize_(0)


class LaidOut:
    """A weight in memory, with all that its product needs.

    Args:
        form: What it is.
        data: Its bytes; for a weight that is not laid out, the kept values; for a dense one, all values ``[O, I]``.
        codes: For a weight that is not laid out.
        scales: ``[O, G]`` bfloat16 of integers; of dense ones, ``[O, 1]``.
        branch: ``[O, R]``, fp16 for the kind fp16 and else bfloat16.
        bias: ``[O]`` float32.
        parts: Rows of each layer whose weight it holds, for `products`.
    """

    __slots__ = (
        "address",
        "bias",
        "branch",
        "call",
        "codes",
        "columns",
        "data",
        "ends",
        "form",
        "most_tokens",
        "native",
        "parts",
        "pointer",
        "scales",
        "struct",
    )

    def __init__(
        self,
        form: Form,
        data: Tensor,
        *,
        codes: Tensor | None = None,
        scales: Tensor | None = None,
        branch: Tensor | None = None,
        bias: Tensor | None = None,
        parts: Sequence[int] = (),
    ) -> None:
        self.form, self.columns, self.most_tokens = form, form.columns, most_tokens(form)
        self.parts = tuple(parts) or (form.rows,)
        self.call: _Call | None = None
        self.ends = (ctypes.c_int64 * len(self.parts))(*accumulate(self.parts))
        self.data, self.codes, self.scales, self.branch, self.bias = data, codes, scales, branch, bias
        self.address = data.data_ptr()
        self.native = None if form.path == TORCH or codes is not None else native(form.path)
        if self.native is not None:
            self.struct = NativeWeight(
                KINDS[form.values],
                PATHS[form.path],
                int(form.dense),
                form.k if branch is not None else 0,
                form.rows,
                form.columns,
                form.group_size,
                self.address,
                *(None if each is None else each.data_ptr() for each in (scales, branch, bias)),
            )
            self.pointer = ctypes.byref(self.struct)

    def call_of(self, x: Tensor) -> _Call:
        """What its product with an input needs to know of that.

        Raises:
            SparsepassError: If x does not fit.
        """
        call = self.call
        if call is None or call.shape != x.shape or call.dtype is not x.dtype:
            if x.dtype not in TYPES or not x.dim() or x.shape[-1] != self.columns:
                raise refusal(x, self.columns)
            self.call = call = _Call(x, self.parts)
        return call


def native(path: str) -> Kernels:
    """The library that has a path.

    Raises:
        SparsepassError: If it is missing.
    """
    library = kernels()
    if library is None:
        raise SparsepassError(f"a weight is laid out for the kernel {path}, and there is no compiled library here")
    return library


def lay_out(packed: PackedWeight, path: str, name: str = "the packed weight") -> Tensor:
    """Bring a stored weight into the form that a kernel reads.

    Args:
        packed: The weight, on the processor. Sizes, types and codes are checked.
        path: The kernel.
        name: What the weight is called in a message.

    Returns:
        The bytes, of one axis.

    Raises:
        SparsepassError: If the weight is damaged.
    """
    rows, columns = packed.shape
    check_stored(packed, name, path)
    if path == TORCH:
        return torch.cat((packed.kept.view(torch.uint8), packed.codes), dim=1).flatten()
    library, kind, threads = native(path), KINDS[packed.values], torch.get_num_threads()
    data = torch.empty(library.laid_out_bytes(PATHS[path], kind, rows, columns), dtype=torch.uint8)
    library.huge_pages(data.data_ptr(), data.nbytes)
    kept, codes = packed.kept.contiguous(), packed.codes.contiguous()
    failed = library.lay_out(PATHS[path], kind, kept.data_ptr(), codes.data_ptr(), rows, columns, data.data_ptr(), threads)
    _check_path(failed, path, packed.values)
    return data


def store(form: Form, data: Tensor) -> tuple[Tensor, Tensor]:
    """The kept values and codes of a weight in memory, as they are stored."""
    parts = stored_form(form.values, form.rows, form.columns, form.group_size)
    if form.path == TORCH:
        kept, codes = _parts_of_rows(form, data, 0, form.rows)
        return kept, codes.clone()
    kept, codes = (torch.empty(shape, dtype=dtype) for shape, dtype in (parts["kept"], parts["codes"]))
    failed = native(form.path).store(
        PATHS[form.path],
        KINDS[form.values],
        data.data_ptr(),
        form.rows,
        form.columns,
        kept.data_ptr(),
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    _check_path(failed, form.path, form.values)
    return kept, codes


def product(weight: LaidOut, x: Tensor) -> Tensor:
    """``x`` times the transposed weight, plus branch and bias.

    Shapes: x ``[..., I]`` with any strides, the result ``[..., O]``, of x's type.

    Raises:
        SparsepassError: If x does not fit.
    """
    call = weight.call_of(x)
    if weight.native is None or call.tokens > weight.most_tokens:
        return _by_torch(weight, x, call)
    if not x.is_cpu:
        raise elsewhere(x)
    stride = weight.columns
    if not x.is_contiguous():
        x, stride = _rows(x)
    y = torch.empty_like(call.results[0])
    failed = weight.native.linear(
        weight.pointer, call.number, x.data_ptr(), stride, call.tokens, y.data_ptr(), torch.get_num_threads()
    )
    if failed:
        _check_path(failed, weight.form.path, weight.form.values)
    return y


def products(weight: LaidOut, x: Tensor, addresses: "ctypes.Array[ctypes.c_void_p]") -> list[Tensor]:
    """The products of several layers whose weights lie together, in one run of the kernel.

    Shapes: x ``[..., I]`` with any strides and at most `LaidOut.most_tokens` rows; each result ``[..., O]`` of its layer, of
    x's type.

    Args:
        weight: All weights.
        x: The input.
        addresses: Room for one address a layer, which no other thread uses.

    Raises:
        SparsepassError: If x does not fit.
    """
    call, library, stride = weight.call_of(x), weight.native, weight.columns
    assert library is not None
    if not x.is_cpu:
        raise elsewhere(x)
    if not x.is_contiguous():
        x, stride = _rows(x)
    ys = [torch.empty_like(like) for like in call.results]
    for i, y in enumerate(ys):
        addresses[i] = y.data_ptr()
    failed = library.linear_parts(
        weight.pointer,
        call.number,
        x.data_ptr(),
        stride,
        call.tokens,
        len(ys),
        weight.ends,
        addresses,
        torch.get_num_threads(),
    )
    _check_path(failed, weight.form.path, weight.form.values)
    return ys


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """The same as a matrix whose rows have no gaps, and the way from row to row."""
    x_TI = x.reshape(-1, x.shape[-1])
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    return x_TI, x_TI.stride(0)


def _by_torch(weight: LaidOut, x: Tensor, call: _Call) -> Tensor:
    """The product by torch's own operations."""
    form = weight.form
    if call.tokens > weight.most_tokens and form.dense and weight.scales is None:
        return functional.linear(x, weight.data.to(x.dtype), None if weight.bias is None else weight.bias.to(x.dtype))
    if weight.codes is not None and x.is_cuda and not gpu_refusal(x.device):
        return _on_gpu(weight, weight.codes, x).view(call.results[0].shape)
    y = x.new_empty(call.results[0].shape)
    _by_tiles(weight, x.reshape(-1, form.columns), y.view(-1, form.rows))
    return y


def _on_gpu(weight: LaidOut, codes: Tensor, x: Tensor) -> Tensor:
    form = weight.form
    rest = (weight.scales, form.group_size, form.values, weight.branch, form.k, weight.bias)
    return packed_linear_gpu(x, weight.data, codes, *rest)


def refusal(x: Tensor, columns: int) -> SparsepassError:
    """The error for activations that a packed layer does not take."""
    if x.dtype not in TYPES:
        return SparsepassError(f"packed layers take bfloat16, float16 and float32, and this input is {x.dtype}; cast it")
    return SparsepassError(f"this packed layer takes {columns} features, and the input is {list(x.shape)}")


def elsewhere(x: Tensor) -> SparsepassError:
    """The error for activations that are on another device than the weight."""
    return SparsepassError(
        f"this packed layer lies in the processor's memory, and the input is on {x.device}; move one of them"
    )


def rows_of(weight: LaidOut, first: int, last: int, out: Tensor) -> None:
    """Write some rows of a weight with its zeros, scaled.

    Args:
        weight: The weight.
        first: The first row.
        last: The row behind the last one.
        out: ``[last - first, I]`` of a type of activations, without gaps.
    """
    form = weight.form
    if weight.native is not None and not form.dense:
        failed = weight.native.unpack(weight.pointer, first, last, TYPES[out.dtype], out.data_ptr(), torch.get_num_threads())
        _check_path(failed, form.path, form.values)
        return
    scales = None if weight.scales is None else weight.scales[first:last]
    if form.dense:
        numbers_OI = weight.data[first:last]
        if scales is not None:
            numbers_OI = numbers_OI.float() * scales.float()
        out.copy_(numbers_OI)
        return
    if weight.codes is not None:
        kept, codes = weight.data[first:last], weight.codes[first:last]
    else:
        kept, codes = _parts_of_rows(form, weight.data, first, last)
    out.copy_(with_zeros(form.values, kept, codes, scales, form.group_size, out.dtype))


def _by_tiles(weight: LaidOut, x_TI: Tensor, y_TO: Tensor) -> None:
    """The product by torch, with a few rows of the weight unpacked at a time."""
    form = weight.form
    num_tiles = max(1, -(-form.rows * form.columns // TILE))
    step = max(1, -(-form.rows // num_tiles))
    tile_OI = torch.empty(step, form.columns, dtype=x_TI.dtype, device=x_TI.device)
    for first in range(0, form.rows, step):
        last = min(form.rows, first + step)
        rows_of(weight, first, last, tile_OI[: last - first])
        torch.mm(x_TI, tile_OI[: last - first].T, out=y_TO[:, first:last])
    if weight.branch is not None:
        y_TO.addmm_(x_TI.unflatten(-1, (-1, form.k)).sum(-1), weight.branch.T.to(x_TI.dtype))
    if weight.bias is not None:
        y_TO += weight.bias.to(x_TI.dtype)


def _parts_of_rows(form: Form, data: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Kept values and codes of rows that are laid out for the path ``torch``."""
    (_, width), dtype = stored_form(form.values, form.rows, form.columns, form.group_size)["kept"]
    num_bytes = width * dtype.itemsize
    rows_OB = data.view(form.rows, num_bytes + form.columns // 8)[first:last]
    kept_OB = rows_OB[:, :num_bytes].clone(memory_format=torch.contiguous_format)
    return kept_OB.flatten().view(dtype).view(last - first, width), rows_OB[:, num_bytes:]


def check_stored(packed: PackedWeight, name: str, path: str = TORCH) -> None:
    """Refuse a damaged weight; the codes are looked at by the compiled kernels where there are any.

    Raises:
        SparsepassError: If sizes, types or codes do not fit.
    """
    rows, columns = packed.shape
    check_sizes(packed, name)
    if path == TORCH:
        check_codes(packed.codes, name)
        return
    codes = packed.codes.contiguous()
    group = native(path).bad_codes(codes.data_ptr(), rows, columns, torch.get_num_threads())
    if group >= 0:
        raise bad_codes(name, group // (columns // 4), group % (columns // 4) * 4)


def _check_path(failed: int, path: str, values: str) -> None:
    if failed:
        raise SparsepassError(f"this processor lacks the kernel {path} for {values}, which the weight was laid out for")
