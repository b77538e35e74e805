"""The Triton kernels for packed 2:4 weights. `gpu_ways.py` launches them; without triton, this file is read but not run.

They read the stored form as it is. A byte of codes places the kept values of eight columns, a *unit*, so every tile counts in
units: its codes are bytes, and its values words of 64 bits (16 for each value), 32 (int8) or 16 (int4). Both then lie alike
over the threads, and no value has to move from one to another.

Three ways to multiply:

- *select*: the columns of x stand in registers, and two tests of bits and two selections give the one that a kept value meets.
- *gather*: x is loaded by index. It lies in L1.
- *dot*: selections give the weights with their zeros, and tensor cores multiply. Its cost hardly grows with the tokens.

Codes ascend within a group, so the first is 0, 1 or 2 and the second 1, 2 or 3: two bits of each decide between three.

Rows beyond the last one are computed as the last one, and write the same numbers to the same place.

Tensor shape legend: R rows, U units, T tokens, P sums that a branch multiplies, K columns of each.
"""

# Triton reads annotations that are text, and without it `tl.constexpr` could not be evaluated.
from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def jit(function: Any) -> Any:
        """Leave a kernel as it is: without triton, none is launched."""
        return function
else:
    jit = triton.jit


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device: TRITON_INTERPRET=1 was set when this file was loaded."""
    return HAS_TRITON and not isinstance(one_token, triton.runtime.JITFunction)


@jit
def _of_word(word, J: tl.constexpr, dtype: tl.constexpr):
    """The J-th number of 16 bits in a word of 64, as float32."""
    if dtype == tl.bfloat16:  # the upper half of a float32: one shift, or one mask
        half = (word >> (32 * (J // 2))).to(tl.int32)
        number = ((half & -65536) if J % 2 == 1 else (half << 16)).to(tl.float32, bitcast=True)
    else:
        number = (word >> (16 * J)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return number


@jit
def _value(word, J: tl.constexpr, VALUES: tl.constexpr):
    """The J-th kept value of a unit, as float32 without its scale.

    Integers go into the mantissa of 2^23, which is then taken away: a conversion has a quarter of an addition's throughput.
    """
    if VALUES == "int8":
        number = (((word ^ -2139062144) >> (8 * J)) & 255) | 0x4B000000  # the word is 0x80808080: from -128..127 to 0..255
        value = number.to(tl.float32, bitcast=True) - (8388608.0 + 128)
    elif VALUES == "int4":
        number = ((word.to(tl.int32) >> (4 * J)) & 15) | 0x4B000000
        value = number.to(tl.float32, bitcast=True) - (8388608.0 + 8)
    elif VALUES == "bf16":
        value = _of_word(word, J, tl.bfloat16)
    else:
        value = _of_word(word, J, tl.float16)
    return value


@jit
def _columns(x, x_words, unit_U, inside_U, HALF: tl.constexpr, WIDE: tl.constexpr):
    """The first (HALF = 0) or last four columns of each unit of x: four of [1, U] float32.

    WIDE: x has 16 bits and lies on a multiple of 64, and the four columns are loaded as one word.
    """
    if WIDE:
        word_U = tl.load(x_words + unit_U * 2 + HALF, mask=inside_U, other=0)
        dtype: tl.constexpr = x.dtype.element_ty
        x0, x1, x2, x3 = (
            _of_word(word_U, 0, dtype),
            _of_word(word_U, 1, dtype),
            _of_word(word_U, 2, dtype),
            _of_word(word_U, 3, dtype),
        )
    else:
        at_U = x + unit_U * 8 + 4 * HALF
        x0 = tl.load(at_U, mask=inside_U, other=0.0).to(tl.float32)
        x1 = tl.load(at_U + 1, mask=inside_U, other=0.0).to(tl.float32)
        x2 = tl.load(at_U + 2, mask=inside_U, other=0.0).to(tl.float32)
        x3 = tl.load(at_U + 3, mask=inside_U, other=0.0).to(tl.float32)
    return x0[None, :], x1[None, :], x2[None, :], x3[None, :]


@jit
def _met(x, x_words, unit_U, inside_U, code_RU, HALF: tl.constexpr, WIDE: tl.constexpr, GATHER: tl.constexpr):
    """The activations that the two values of the first or last group of each unit meet: two of [R, U] float32."""
    if GATHER:
        at_1U = (x + unit_U * 8 + 4 * HALF)[None, :]
        first_RU = tl.load(at_1U + ((code_RU >> (4 * HALF)) & 3), mask=inside_U[None, :], other=0.0).to(tl.float32)
        second_RU = tl.load(at_1U + ((code_RU >> (4 * HALF + 2)) & 3), mask=inside_U[None, :], other=0.0).to(tl.float32)
    else:
        x0, x1, x2, x3 = _columns(x, x_words, unit_U, inside_U, HALF, WIDE)
        first_RU = tl.where((code_RU & (2 << (4 * HALF))) != 0, x2, tl.where((code_RU & (1 << (4 * HALF))) != 0, x1, x0))
        second_RU = tl.where((code_RU & (8 << (4 * HALF))) == 0, x1, tl.where((code_RU & (4 << (4 * HALF))) != 0, x3, x2))
    return first_RU, second_RU


@jit
def _inside(unit_U, UNITS: tl.constexpr, U: tl.constexpr):
    """Which units are columns of the weight. All of them where steps fill a row, which the compiler then need not ask."""
    if UNITS % U == 0:
        inside_U = tl.full((U,), True, tl.int1)
    else:
        inside_U = unit_U < UNITS
    return inside_U


@jit
def _tile(codes, kept, row_R, unit_U, inside_U, UNITS: tl.constexpr):
    """Codes and words of a tile, [R, U]; zeros beyond the last column."""
    at_RU = row_R[:, None].to(tl.int64) * UNITS + unit_U[None, :]
    # Each is read once: x should stay in L1 instead.
    code_RU = tl.load(codes + at_RU, mask=inside_U[None, :], other=0, eviction_policy="evict_first").to(tl.int32)
    return code_RU, tl.load(kept + at_RU, mask=inside_U[None, :], other=0, eviction_policy="evict_first")


@jit
def _scale(scales, row_R, unit_U, inside_U, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Scale of each unit, [R, U] float32."""
    at_RU = row_R[:, None] * GROUPS + (unit_U // (SIZE // 8))[None, :]
    return tl.load(scales + at_RU, mask=inside_U[None, :], other=0.0).to(tl.float32)


@jit
def _branch(x, branch, row_R, first, step, PARTS: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr):
    """What the branch adds for one token, [R]: its weights times the sums of K consecutive columns.

    Of the blocks of sums, it takes the first-th and each step-th after it.
    """
    BLOCK: tl.constexpr = max(1024 // K_BLOCK, 16)
    added_R = tl.zeros((row_R.shape[0],), tl.float32)
    within_K = tl.arange(0, K_BLOCK)
    for start in range(first * BLOCK, PARTS, step * BLOCK):
        part_P = start + tl.arange(0, BLOCK)
        inside_P = part_P < PARTS
        inside_PK = inside_P[:, None] & (within_K < K)[None, :]
        x_PK = tl.load(x + part_P[:, None] * K + within_K[None, :], mask=inside_PK, other=0.0)
        sums_P = tl.sum(x_PK.to(tl.float32), axis=1)
        at_RP = row_R[:, None].to(tl.int64) * PARTS + part_P[None, :]
        weight_RP = tl.load(branch + at_RP, mask=inside_P[None, :], other=0.0).to(tl.float32)
        added_R += tl.sum(weight_RP * sums_P[None, :], axis=1)
    return added_R


@jit
def _dot(a, b, total, EXACT: tl.constexpr):
    """The product on tensor cores.

    EXACT: in float32, since Triton's interpreter (3.9) takes the bits of a bfloat16 for an integer.
    """
    if EXACT:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total)
    return total


@jit
def _branch_dot(
    x, branch, row_R, token_T, x_stride, inside_T, first, step,
    PARTS: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """As `_branch` for several tokens, [R, T]; the sums are rounded to DTYPE, as a dense branch's are."""
    added_RT = tl.zeros((row_R.shape[0], token_T.shape[0]), tl.float32)
    for start in range(first * 64, PARTS, step * 64):
        part_P = start + tl.arange(0, 64)
        inside_P = part_P < PARTS
        at_PT = x + token_T[None, :] * x_stride + part_P[:, None] * K
        sums_PT = tl.zeros((64, token_T.shape[0]), tl.float32)
        for j in range(K):
            sums_PT += tl.load(at_PT + j, mask=inside_P[:, None] & inside_T[None, :], other=0.0).to(tl.float32)
        at_RP = row_R[:, None].to(tl.int64) * PARTS + part_P[None, :]
        weight_RP = tl.load(branch + at_RP, mask=inside_P[None, :], other=0.0)
        added_RT = _dot(weight_RP.to(DTYPE), sums_PT.to(DTYPE), added_RT, EXACT)
    return added_RT


@jit
def _finish(y, total_RT, bias, row_R, token_T, rows, tokens, split, HAS_BIAS: tl.constexpr):
    """Write what one split of the columns gives; the first one adds the bias."""
    if HAS_BIAS:
        total_RT += tl.where(split == 0, tl.load(bias + row_R).to(tl.float32), 0.0)[:, None]
    at_RT = (split * tokens + token_T[None, :]).to(tl.int64) * rows + row_R[:, None]
    tl.store(y + at_RT, total_RT.to(y.dtype.element_ty), mask=(token_T < tokens)[None, :])


@jit
def one_token(
    x, x_words, kept, codes, scales, branch, bias, y,
    rows, tokens, x_stride, splits,
    UNITS: tl.constexpr, VALUES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PARTS: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATHER: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, U: tl.constexpr, PER_THREAD: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Multiply R rows with one token, by selection or by gathering. Tokens lie along the third axis of the programs.

    Args:
        x: ``[tokens, columns]``, rows `x_stride` apart.
        x_words: The same as words of 64 bits, for WIDE.
        kept: ``[rows, UNITS]``, words.
        codes: ``[rows, UNITS]``.
        scales: ``[rows, GROUPS]``, or anything where GROUPS is 0.
        branch: ``[rows, PARTS]``, or anything where PARTS is 0.
        bias: ``[rows]``, or anything.
        y: ``[splits, tokens, rows]``: float32 if there are splits.
        rows: Rows of the weight.
        tokens: Tokens.
        x_stride: Elements.
        splits: Parts of the columns, one for each program along the second axis.
        UNITS: Columns over eight.
        VALUES: Kind of the values.
        GROUPS: Scales of a row.
        SIZE: Columns that share a scale, a multiple of 8.
        PARTS: Columns of the branch.
        K: Columns of x that it sums.
        K_BLOCK: The next power of two.
        HAS_BIAS: Whether there is a bias.
        GATHER: Whether x is loaded by index.
        WIDE: Whether x is loaded as words.
        R: Rows of a program.
        U: Units of a step.
        PER_THREAD: Units of a step that one thread takes.
        STAGES: Steps whose loads are under way at once, in shared memory; 1 leaves them to the hardware.
        UNROLL: Steps that are written out one after the other, so that their loads can start together.
    """
    row_R = tl.minimum(tl.program_id(0) * R + tl.arange(0, R), rows - 1)
    split, token = tl.program_id(1), tl.program_id(2)
    x_here, words_here = x + token * x_stride, x_words + token * (x_stride // 4)
    sums_RU = tl.zeros((R, U), tl.float32)
    for start in tl.range(split * U, UNITS, splits * U, num_stages=STAGES, loop_unroll_factor=UNROLL):
        # Without the hint, one thread would take 16 bytes of codes, and hold all of x that they meet.
        unit_U = start + tl.max_contiguous(tl.arange(0, U), PER_THREAD)
        inside_U = _inside(unit_U, UNITS, U)
        code_RU, word_RU = _tile(codes, kept, row_R, unit_U, inside_U, UNITS)
        a, b = _met(x_here, words_here, unit_U, inside_U, code_RU, 0, WIDE, GATHER)
        c, d = _met(x_here, words_here, unit_U, inside_U, code_RU, 1, WIDE, GATHER)
        v0, v1 = _value(word_RU, 0, VALUES), _value(word_RU, 1, VALUES)
        v2, v3 = _value(word_RU, 2, VALUES), _value(word_RU, 3, VALUES)
        if GROUPS > 1:
            part_RU = tl.fma(v3, d, tl.fma(v2, c, tl.fma(v1, b, v0 * a)))
            sums_RU = tl.fma(part_RU, _scale(scales, row_R, unit_U, inside_U, GROUPS, SIZE), sums_RU)
        else:
            sums_RU = tl.fma(v3, d, tl.fma(v2, c, tl.fma(v1, b, tl.fma(v0, a, sums_RU))))
    total_R = tl.sum(sums_RU, axis=1)
    if GROUPS == 1:
        total_R *= tl.load(scales + row_R).to(tl.float32)
    if PARTS > 0:
        total_R += _branch(x_here, branch, row_R, split, splits, PARTS, K, K_BLOCK)
    _finish(y, total_R[:, None], bias, row_R, token + tl.arange(0, 1), rows, tokens, split, HAS_BIAS)


@jit
def _dense_columns(code_RU, first_RU, second_RU, HALF: tl.constexpr):
    """The four columns of the first or last group of each unit, with their zeros: four of [R, U]."""
    nothing = tl.zeros_like(first_RU)
    first_RU1 = (code_RU >> (4 * HALF)) & 3
    second_RU1 = (code_RU >> (4 * HALF + 2)) & 3
    w0 = tl.where(first_RU1 == 0, first_RU, nothing)
    w1 = tl.where(first_RU1 == 1, first_RU, tl.where(second_RU1 == 1, second_RU, nothing))
    w2 = tl.where(first_RU1 == 2, first_RU, tl.where(second_RU1 == 2, second_RU, nothing))
    w3 = tl.where(second_RU1 == 3, second_RU, nothing)
    return w0, w1, w2, w3


@jit
def _dense_half(
    code_RU, word_RU, scales, row_R, unit_U, inside_U,
    VALUES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The first or last four columns of each unit of the weight, scaled and rounded to DTYPE; scales of a row are left out."""
    first_RU, second_RU = _value(word_RU, 2 * HALF, VALUES), _value(word_RU, 2 * HALF + 1, VALUES)
    if GROUPS > 1:
        scale_RU = _scale(scales, row_R, unit_U, inside_U, GROUPS, SIZE)
        first_RU, second_RU = first_RU * scale_RU, second_RU * scale_RU
    return _dense_columns(code_RU, first_RU.to(DTYPE), second_RU.to(DTYPE), HALF)


@jit
def _column(x, token_T, unit_U, x_stride, inside_UT, J: tl.constexpr):
    """Column J of each unit of x, [U, T]."""
    return tl.load(x + token_T[None, :] * x_stride + (unit_U * 8 + J)[:, None], mask=inside_UT, other=0.0)


@jit
def some_tokens(
    x, kept, codes, scales, branch, bias, y,
    rows, tokens, x_stride, splits,
    UNITS: tl.constexpr, VALUES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PARTS: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    R: tl.constexpr, U: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Multiply R rows with T tokens on tensor cores, in the type of x.

    Args: as `one_token`; tokens may be any number.

    EXACT: see `_dot`.
    """
    row_R = tl.minimum(tl.program_id(0) * R + tl.arange(0, R), rows - 1)
    split = tl.program_id(1)
    token_T = tl.program_id(2) * T + tl.arange(0, T)
    inside_T = token_T < tokens
    dtype: tl.constexpr = x.dtype.element_ty
    total_RT = tl.zeros((R, T), tl.float32)
    for start in range(split * U, UNITS, splits * U):
        unit_U = start + tl.arange(0, U)
        inside_U = _inside(unit_U, UNITS, U)
        inside_UT = inside_U[:, None] & inside_T[None, :]
        code_RU, word_RU = _tile(codes, kept, row_R, unit_U, inside_U, UNITS)
        w0, w1, w2, w3 = _dense_half(code_RU, word_RU, scales, row_R, unit_U, inside_U, VALUES, GROUPS, SIZE, 0, dtype)
        total_RT = _dot(w0, _column(x, token_T, unit_U, x_stride, inside_UT, 0), total_RT, EXACT)
        total_RT = _dot(w1, _column(x, token_T, unit_U, x_stride, inside_UT, 1), total_RT, EXACT)
        total_RT = _dot(w2, _column(x, token_T, unit_U, x_stride, inside_UT, 2), total_RT, EXACT)
        total_RT = _dot(w3, _column(x, token_T, unit_U, x_stride, inside_UT, 3), total_RT, EXACT)
        w0, w1, w2, w3 = _dense_half(code_RU, word_RU, scales, row_R, unit_U, inside_U, VALUES, GROUPS, SIZE, 1, dtype)
        total_RT = _dot(w0, _column(x, token_T, unit_U, x_stride, inside_UT, 4), total_RT, EXACT)
        total_RT = _dot(w1, _column(x, token_T, unit_U, x_stride, inside_UT, 5), total_RT, EXACT)
        total_RT = _dot(w2, _column(x, token_T, unit_U, x_stride, inside_UT, 6), total_RT, EXACT)
        total_RT = _dot(w3, _column(x, token_T, unit_U, x_stride, inside_UT, 7), total_RT, EXACT)
    if GROUPS == 1:
        total_RT *= tl.load(scales + row_R).to(tl.float32)[:, None]
    if PARTS > 0:
        total_RT += _branch_dot(x, branch, row_R, token_T, x_stride, inside_T, split, splits, PARTS, K, dtype, EXACT)
    _finish(y, total_RT, bias, row_R, token_T, rows, tokens, split, HAS_BIAS)


@jit
def add_splits(parts, y, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum ``[SPLITS, size]`` float32 over its splits, in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@jit
def make_dense(
    kept, codes, scales, out, rows,
    UNITS: tl.constexpr, VALUES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Write R rows and U units of the weight with its zeros, scaled, to out ``[rows, 8 * UNITS]``. Args: as `one_token`."""
    row_R = tl.minimum(tl.program_id(0) * R + tl.arange(0, R), rows - 1)
    unit_U = tl.program_id(1) * U + tl.arange(0, U)
    inside_U = _inside(unit_U, UNITS, U)
    dtype: tl.constexpr = tl.float32 if GROUPS == 1 else out.dtype.element_ty
    code_RU, word_RU = _tile(codes, kept, row_R, unit_U, inside_U, UNITS)
    w0, w1, w2, w3 = _dense_half(code_RU, word_RU, scales, row_R, unit_U, inside_U, VALUES, GROUPS, SIZE, 0, dtype)
    w4, w5, w6, w7 = _dense_half(code_RU, word_RU, scales, row_R, unit_U, inside_U, VALUES, GROUPS, SIZE, 1, dtype)
    even = tl.interleave(tl.interleave(w0, w4), tl.interleave(w2, w6))
    weight = tl.interleave(even, tl.interleave(tl.interleave(w1, w5), tl.interleave(w3, w7)))
    if GROUPS == 1:
        weight *= tl.load(scales + row_R).to(tl.float32)[:, None]
    column = tl.program_id(1) * U * 8 + tl.arange(0, U * 8)
    at = row_R[:, None].to(tl.int64) * (8 * UNITS) + column[None, :]
    tl.store(out + at, weight.to(out.dtype.element_ty), mask=(column < 8 * UNITS)[None, :])
