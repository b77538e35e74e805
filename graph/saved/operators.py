"""The operators that a saved program may call, by name and overload, and what arguments each of them takes.

The list was made from what torch.export (2.13) writes for the models of transformers (5.24) and from the functional part of
ATen's core. It leaves out whatever could reach memory that is not its own or not yet written (``_reshape_alias``, ``set_``,
``resize_``, ``empty``; ``as_strided`` is checked in a trial), files, random numbers, sparse and quantized layouts, operators
whose values decide the sizes of results, and private ones that check nothing.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsepass._plugins import extended_by_rows
from sparsepass.graph.support import ProgramFormatError


def _text(target: torch._ops.OpOverload) -> str:
    return f"{target.namespace}.{target._opname}.{target._overloadname}"


_ELEMENTWISE = """
abs.default acos.default acosh.default add.Scalar add.Tensor addcdiv.default addcmul.default asin.default asinh.default
atan.default atan2.default atanh.default bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor
bitwise_left_shift.Tensor_Scalar bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor
bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Tensor ceil.default celu.default clamp.Tensor clamp.default
clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default clip.default clone.default copysign.Scalar
copysign.Tensor cos.default cosh.default deg2rad.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode
divide.Scalar divide.Tensor divide.Tensor_mode elu.default eq.Scalar eq.Tensor erf.default erfc.default erfinv.default
exp.default exp2.default expm1.default floor.default floor_divide.Scalar floor_divide.default fmod.Scalar fmod.Tensor
frac.default gather.default ge.Scalar ge.Tensor gelu.default glu.default greater.Scalar greater.Tensor greater_equal.Scalar
greater_equal.Tensor gt.Scalar gt.Tensor hardshrink.default hardsigmoid.default hardswish.default hardtanh.default
heaviside.default hypot.default isfinite.default isinf.default isnan.default isneginf.default isposinf.default le.Scalar
le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor less.Scalar less.Tensor less_equal.Scalar less_equal.Tensor log.default
log10.default log1p.default log2.default log_sigmoid.default logaddexp.default logaddexp2.default logical_and.default
logical_not.default logical_or.default logical_xor.default logit.default lt.Scalar lt.Tensor masked_fill.Scalar
masked_fill.Tensor max.other maximum.default min.other minimum.default mish.default mul.Scalar mul.Tensor multiply.Scalar
multiply.Tensor nan_to_num.default ne.Scalar ne.Tensor neg.default negative.default not_equal.Scalar not_equal.Tensor
positive.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default rad2deg.default reciprocal.default relu.default
relu6.default remainder.Scalar remainder.Tensor round.decimals round.default rsqrt.default rsub.Scalar rsub.Tensor
selu.default sgn.default sigmoid.default sign.default signbit.default silu.default sin.default sinc.default sinh.default
softplus.default softshrink.default sqrt.default square.default sub.Scalar sub.Tensor subtract.Scalar subtract.Tensor
tan.default tanh.default threshold.default true_divide.Scalar true_divide.Tensor trunc.default where.Scalar
where.ScalarOther where.ScalarSelf where.self xlogy.Tensor __and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor
__xor__.Scalar __xor__.Tensor __lshift__.Scalar __lshift__.Tensor __rshift__.Scalar __rshift__.Tensor
"""

_REDUCTIONS = """
all.default all.dim all.dims amax.default amin.default aminmax.default any.default any.dim any.dims argmax.default
argmin.default argsort.default argsort.stable
cummax.default cummin.default cumprod.default cumsum.default diff.default histc.default
log_softmax.int _log_softmax.default logcumsumexp.default logsumexp.default max.default max.dim mean.default mean.dim
median.default median.dim min.default min.dim norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype prod.default
prod.dim_int softmax.int _softmax.default sort.default sort.stable std.correction std.default std.dim sum.default
sum.dim_IntList topk.default var.correction var.default var.dim var_mean.correction var_mean.dim linalg_vector_norm.default
linalg_norm.default count_nonzero.default count_nonzero.dim_IntList
"""

_SHAPES = """
alias.default atleast_1d.default atleast_2d.default broadcast_to.default cat.default chunk.default concat.default
constant_pad_nd.default contiguous.default detach.default diag_embed.default diagonal.default dstack.default expand.default
expand_as.default flatten.using_ints flip.default fliplr.default flipud.default hstack.default lift_fresh_copy.default
matrix_H.default meshgrid.default meshgrid.indexing moveaxis.int movedim.int movedim.intlist narrow.default numpy_T.default
mT.default pad.default permute.default pixel_shuffle.default pixel_unshuffle.default reflection_pad1d.default
reflection_pad2d.default repeat.default repeat_interleave.self_int replication_pad1d.default replication_pad2d.default
reshape.default reshape_as.default roll.default select.int select_scatter.default slice.Tensor slice_scatter.default
split.Tensor split.sizes split_with_sizes.default squeeze.default squeeze.dim squeeze.dims stack.default swapaxes.default
swapdims.default t.default tile.default transpose.int tril.default triu.default unbind.int unflatten.int unfold.default
unsafe_chunk.default unsafe_split.Tensor unsafe_split_with_sizes.default unsqueeze.default view.default view_as.default
vstack.default _unsafe_view.default as_strided.default
"""

_MAKERS = """
arange.default arange.start arange.start_step eye.default eye.m full.default full_like.default linspace.default
new_full.default new_ones.default new_zeros.default ones.default ones_like.default one_hot.default scalar_tensor.default
tril_indices.default triu_indices.default zeros.default zeros_like.default hann_window.default
"""

_DTYPES = """
_to_copy.default to.device to.dtype to.dtype_layout to.other type_as.default
"""

_LOOKUPS = """
embedding.default index.Tensor index_add.default index_copy.default index_fill.int_Scalar index_put.default
index_select.default masked_scatter.default scatter.src scatter.value scatter_add.default scatter_reduce.two take.default
take_along_dim.default bucketize.Tensor searchsorted.Tensor isin.Tensor_Tensor isin.Tensor_Scalar
"""

_PRODUCTS = """
addbmm.default addmm.default addmv.default baddbmm.default bmm.default conv1d.default conv1d.padding conv2d.default
conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default conv_transpose2d.input convolution.default cross.default
dot.default einsum.default inner.default kron.default linalg_cross.default linear.default matmul.default mm.default
mv.default outer.default scaled_dot_product_attention.default _grouped_mm.default
"""

_LAYERS = """
_adaptive_avg_pool2d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_max_pool2d.default
avg_pool1d.default avg_pool2d.default avg_pool3d.default batch_norm.default cosine_similarity.default dropout.default
feature_dropout.default fft_fft.default fft_fft2.default fft_fftn.default fft_irfft.default fft_rfft.default
view_as_complex.default view_as_real.default real.default imag.default grid_sampler.default grid_sampler_2d.default
group_norm.default instance_norm.default layer_norm.default max_pool1d.default max_pool2d.default
max_pool2d_with_indices.default max_pool3d.default native_group_norm.default native_layer_norm.default
_native_batch_norm_legit_no_training.default pairwise_distance.default rms_norm.default upsample_bicubic2d.default
upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec upsample_linear1d.default upsample_linear1d.vec
upsample_nearest1d.default upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec im2col.default
"""

# They may change what the graph itself has made, never a tensor of the file or an input.
_IN_PLACE = """
add_.Scalar add_.Tensor bitwise_and_.Tensor bitwise_or_.Tensor clamp_.default clamp_max_.default clamp_min_.default
copy_.default detach_.default div_.Scalar div_.Tensor exp_.default fill_.Scalar fill_.Tensor floor_.default hardtanh_.default
index_add_.default index_copy_.default index_fill_.int_Scalar index_put_.default leaky_relu_.default log_.default
logical_and_.default logical_not_.default logical_or_.default masked_fill_.Scalar masked_fill_.Tensor mul_.Scalar mul_.Tensor
neg_.default pow_.Scalar relu_.default relu6_.default rsqrt_.default scatter_.src scatter_.value scatter_add_.default
scatter_reduce_.two sigmoid_.default silu_.default sqrt_.default sub_.Scalar sub_.Tensor tanh_.default zero_.default
"""

_SIZES = "sym_size.int sym_numel.default sym_stride.int _assert_scalar.default"
_ATEN = (
    _ELEMENTWISE, _REDUCTIONS, _SHAPES, _MAKERS, _DTYPES, _LOOKUPS, _PRODUCTS, _LAYERS, _IN_PLACE, _SIZES,
)  # fmt: skip
_OTHERS = (
    "sparsepass.masked_weight.default",
    "sparsepass.learned_weight.default",
    "sparsepass.quantized_weight.default",
    "transformers.grouped_mm_fallback.default",
)
OPERATORS = frozenset([*(f"aten.{name}" for text in _ATEN for name in text.split()), *_OTHERS])

OF_ZEROS = {
    torch.ops.aten.empty.memory_format: torch.ops.aten.zeros.default,
    torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default: torch.ops.aten.new_zeros.default,
}
"""What is made without values would show whatever was in that memory before: captured, written or read, it is made of zeros."""
_OF_ZEROS = {_text(empty): _text(zeros) for empty, zeros in OF_ZEROS.items()}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem", "eq", "ne", "lt", "le", "gt", "ge",
            "and_", "or_", "not_",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")
    },
}  # fmt: skip
"""Functions of numbers: what torch.export writes about sizes."""

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool", "uint8", "int8", "int16",
        "int32", "int64",
    )
}  # fmt: skip
_WORD = 2**63
_LONGEST_TEXT = 256


@dataclass(frozen=True, kw_only=True)
class Operators:
    """Operators of another package that its passes write into programs, as the entry point `sparsepass.operators` names them.

    Attributes:
        name: Of the package.
        targets: Such as ``"mine.scaled_weight.default"``. Loading their module has to register them, with a fake kernel.

    Example:
        >>> Operators(name="mine", targets=("mine.scaled_weight.default",)).targets
        ('mine.scaled_weight.default',)
    """

    name: str
    targets: tuple[str, ...]


def _added() -> frozenset[str]:
    own: dict[str, Operators] = {}
    found = extended_by_rows(own, "sparsepass.operators", Operators)
    names = [target for row in found.values() for target in row.targets]
    for target in names:
        if not isinstance(target, str) or target.partition(".")[0] in ("aten", "prims", "sparsepass"):
            raise ProgramFormatError(f"the entry point sparsepass.operators may not add {target!r}")
    return frozenset(names)


def text_of_operator(target: Any) -> str | None:
    """The name by which a saved program calls an operator; None if it may not.

    Example:
        >>> text_of_operator(torch.ops.aten.add.Tensor), text_of_operator(torch.ops.aten.set_.source_Tensor)
        ('aten.add.Tensor', None)
    """
    if not isinstance(target, torch._ops.OpOverload):
        return None
    text = _OF_ZEROS.get(_text(target), _text(target))
    return text if text in OPERATORS or text in _added() else None


def operator_named(target: str) -> torch._ops.OpOverload:
    """The operator of that name.

    Raises:
        ProgramFormatError: If a saved program may not call it, or the installed libraries do not have it.

    Example:
        >>> operator_named("aten.add.Tensor")
        <OpOverload(op='aten.add', overload='Tensor')>
    """
    target = _OF_ZEROS.get(target, target)
    if target not in OPERATORS and target not in _added():
        raise ProgramFormatError(f"a saved program may not call {target!r:.200}")
    namespace, name, overload = target.split(".")
    if namespace == "transformers":
        import transformers.integrations.moe  # noqa: F401  (registers its grouped matmul)
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as error:
        raise ProgramFormatError(
            f"the program calls {target}, which torch {torch.__version__} does not have; load it with the versions it was "
            "made with (see program.json)"
        ) from error
    assert isinstance(found, torch._ops.OpOverload)
    return found


def names_fit(target: torch._ops.OpOverload, num_args: int, keywords: Iterable[str]) -> str | None:
    """What is wrong with the number of arguments and the keywords, as torch.export writes them; None if nothing is.

    Example:
        >>> names_fit(torch.ops.aten.add.Tensor, 2, ["alpha"]), names_fit(torch.ops.aten.add.Tensor, 2, ["other"])
        (None, "it has no keyword 'other'")
    """
    arguments = target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    by_keyword = {a.name for a in arguments if a.kwarg_only}
    if num_args > len(positional):
        return f"it takes {len(positional)} arguments, got {num_args}"
    if missing := [a.name for a in positional[num_args:] if not a.has_default_value()]:
        return f"its argument {missing[0]!r} is missing"
    if unknown := [name for name in keywords if name not in by_keyword]:
        return f"it has no keyword {unknown[0]!r}"
    return None


def arguments_fit(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with the values given to an operator, by its schema; None if nothing is.

    Example:
        >>> arguments_fit(torch.ops.aten.add.Tensor, (torch.ones(2), "x"), {})
        "its argument 'other' is a Tensor, got 'x'"
    """
    schema = target._schema.arguments
    named = {a.name: a for a in schema}
    positional = [a for a in schema if not a.kwarg_only]
    given = [*zip(positional, args, strict=False), *((named[name], value) for name, value in kwargs.items())]
    for argument, value in given:
        if not _fits(value, argument.real_type):
            return f"its argument {argument.name!r} is a {argument.real_type}, got {value!r:.100}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    match kind.kind():
        case "OptionalType":
            return value is None or _fits(value, kind.getElementType())
        case "ListType":
            element = kind.getElementType()
            if isinstance(value, list | tuple):
                return all(_fits(item, element) for item in value)
            return element.kind() in ("IntType", "SymIntType") and _fits(value, element)
        case "TensorType":
            return isinstance(value, Tensor) or is_number(value)
        case "IntType" | "SymIntType":
            return type(value) is int and is_number(value)
        case "FloatType" | "NumberType" | "SymFloatType":
            return is_number(value)
        case "BoolType" | "SymBoolType":
            return isinstance(value, bool)
        case "StringType":
            return isinstance(value, str) and len(value) <= _LONGEST_TEXT and value.isprintable()
        case "ScalarTypeType":
            return value in DTYPES.values()
        case "LayoutType":
            return value is torch.strided
        case "DeviceObjType":
            return isinstance(value, torch.device)
        case "MemoryFormatType":
            return isinstance(value, torch.memory_format)
    return False


def is_number(value: Any) -> bool:
    """Whether a value is a number that fits into a word of the machine.

    Example:
        >>> is_number(3), is_number(10**30), is_number("3")
        (True, False, False)
    """
    return isinstance(value, bool | float) or (type(value) is int and -_WORD <= value < _WORD)
