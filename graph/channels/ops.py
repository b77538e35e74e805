"""Names of operators by what they do to channels."""

LAYOUT = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "numpy_T", "mT", "movedim", "expand", "expand_as",
    "slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "flatten", "unflatten",
    "narrow", "alias", "repeat", "repeat_interleave", "index", "index_select", "gather", "roll", "flip", "view_as",
    "reshape_as", "detach", "clone", "contiguous", "lift_fresh_copy", "unfold", "tile", "swapaxes", "diagonal",
    "take_along_dim", "im2col",
}  # fmt: skip
"""Each element of the result is one of the argument."""

PICKING = {"index", "index_select", "gather", "take_along_dim", "repeat_interleave"}
"""Some of these elements may be there more often than others."""

PICKING_EACH = {"gather", "take_along_dim"}
"""Each element of the result chooses for itself."""

WRAPPERS = {"masked_weight"}
"""A weight behind its mask is the weight."""

SAME = {"to", "_to_copy", "type_as", "dropout", "neg", "float", "half", "bfloat16", "feature_dropout", "native_dropout"}
"""Element by element, and linear."""

POSITIVE = {"relu", "abs", "leaky_relu", "prelu"}
"""Element by element; a positive factor goes through."""

CURVED = {
    "pow", "rsqrt", "sqrt", "exp", "log", "silu", "gelu", "tanh", "sigmoid", "softplus", "cos", "sin", "square", "elu",
    "hardtanh", "hardswish", "hardsigmoid", "mish", "relu6", "reciprocal", "erf", "log1p", "expm1", "clamp", "clip",
    "clamp_min", "clamp_max", "log_sigmoid", "selu", "celu", "sign", "nan_to_num", "round", "floor", "isnan", "logical_not",
    "silu_backward", "threshold",
}  # fmt: skip
"""Element by element, and not linear."""

SUMS = {"add", "sub", "rsub", "where", "masked_fill", "maximum", "minimum", "lerp", "addcmul", "addcdiv"}
"""Element by element from several; all that is summed carries the same factor."""

PRODUCTS = {"mul", "div"}

REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min"}
"""Symmetric in what they reduce."""

LINEAR_REDUCTIONS = {"mean", "sum"}

KEEP_SQUARES = LAYOUT | SAME | LINEAR_REDUCTIONS
"""What squares of channels may meet before they are added up, if the channels are to be mixed."""

BY_SHAPE = {
    "empty_like", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "sym_size",
}  # fmt: skip
"""What they give depends on the shape of what they get alone."""

SOFTMAX = {"softmax", "_softmax", "log_softmax", "_log_softmax"}

POINTWISE_WITH_LAYER = {"layer_norm", "native_layer_norm", "rms_norm"}
