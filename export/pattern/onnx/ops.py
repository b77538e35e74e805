"""Which ONNX operations multiply by a weight, and where they take it.

Three kinds of operation hold weights, and the checker lists all three, so that a fused node never hides a weight:

1. Those in `PRODUCTS`: their reduction axis is known.
2. Those in `OPAQUE`: their weights lie in an order of their own.
3. Those that `is_known` does not know: their domain is foreign.
"""

from dataclasses import dataclass
from typing import Literal, final

Side = Literal["left", "right", "conv"]


@final
@dataclass(frozen=True)
class Operand:
    """Where an operation takes a weight.

    Attributes:
        index: Input index.
        side: "left" (K is its last axis), "right" (its last but one) or "conv" (its second).
        zero_point: Input that holds its zero point, if the operation takes quantized weights.
        transpose: Attribute that swaps its last two axes, if there is one.
    """

    index: int
    side: Side
    zero_point: int | None = None
    transpose: str | None = None


DOMAINS = {"", "ai.onnx", "com.microsoft", "trt"}
_MATMUL = (Operand(0, "left"), Operand(1, "right"))
_GEMM = (Operand(0, "left", transpose="transA"), Operand(1, "right", transpose="transB"))
_CONV = (Operand(1, "conv"),)
_SECOND = (Operand(1, "right"),)
PRODUCTS: dict[str, tuple[Operand, ...]] = {
    "MatMul": _MATMUL,
    "Gemm": _GEMM,
    "Conv": _CONV,
    "MatMulInteger": (Operand(0, "left", 2), Operand(1, "right", 3)),
    "QLinearMatMul": (Operand(0, "left", 2), Operand(3, "right", 5)),
    "ConvInteger": (Operand(1, "conv", 3),),
    "QLinearConv": (Operand(3, "conv", 5),),
    # What onnxruntime's optimizers write (domain com.microsoft).
    "FusedMatMul": _GEMM,
    "TransposeMatMul": _GEMM,
    "FusedMatMulActivation": _GEMM,
    "FusedGemm": _GEMM,
    "GemmFloat8": _GEMM,
    "GemmFastGelu": _SECOND,
    "FusedConv": _CONV,
    "DynamicQuantizeMatMul": (Operand(1, "right", 3),),
    "MatMulIntegerToFloat": (Operand(0, "left", 4), Operand(1, "right", 5)),
    "QGemm": (Operand(0, "left", 2, "transA"), Operand(3, "right", 5, "transB")),
    # The projections of q, k and v side by side: [in, 3 * hidden].
    "Attention": _SECOND,
    "PackedAttention": _SECOND,
    "QAttention": (Operand(1, "right", 7),),
    "LongformerAttention": (Operand(1, "right"), Operand(4, "right")),
    "DecoderAttention": (Operand(2, "right"), Operand(3, "right")),
    "DecoderMaskedSelfAttention": _SECOND,
}
# Operations whose weights no N:M rule covers: (input that holds the weight, why). They are listed, and decide nothing.
WITHOUT_RULE: dict[str, tuple[int, str]] = {
    "ConvTranspose": (1, "no runtime has an N:M rule for ConvTranspose weights [in, out/group, ...]"),
    "DeformConv": (1, "no runtime has an N:M rule for DeformConv"),
    "LSTM": (1, "recurrent weights are not run by sparse kernels"),
    "GRU": (1, "recurrent weights are not run by sparse kernels"),
    "RNN": (1, "recurrent weights are not run by sparse kernels"),
    "DynamicQuantizeLSTM": (1, "recurrent weights are not run by sparse kernels"),
}
_OWN_LAYOUT = "holds its weights in a layout of its own"
# Operations whose weights are real matmul weights in an order of their own: domain and type -> (inputs, why).
OPAQUE: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {
    ("com.microsoft", "MoE"): ((2, 4, 6), "holds its experts in an order that depends on the version of onnxruntime"),
    ("com.microsoft", "QMoE"): ((2, 5, 8), "holds its experts in an order that depends on the version of onnxruntime"),
    ("com.microsoft", "MatMulFpQ4"): ((1,), _OWN_LAYOUT),
    ("com.microsoft", "NhwcConv"): ((1,), "holds its weight channels-last, or not, depending on the device it is for"),
    ("com.microsoft", "NhwcFusedConv"): ((1,), "holds its weight channels-last, or not, depending on the device it is for"),
    ("com.microsoft.nchwc", "Conv"): (
        (1,),
        "holds its weight in blocks made for one processor; check the file from before onnxruntime optimized it",
    ),
    ("", "Attention"): ((1, 2), "multiplies by a constant key or value, which is no weight [in, out]"),
}
# Operations of com.microsoft that multiply by no matrix: elementwise ones, norms, look-ups, attention without projections.
_HARMLESS = {
    *("BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "BitmaskBiasDropout", "BitmaskDropout"),
    *("FastGelu", "Gelu", "QuickGelu", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere", "QLinearSoftmax"),
    *("QLinearLeakyRelu", "QLinearSigmoid", "QLinearReduceMean", "QLinearAveragePool", "QLinearGlobalAveragePool"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "GroupNorm"),
    *("SkipGroupNorm", "EmbedLayerNormalization", "QEmbedLayerNormalization", "GatherBlockQuantized", "GatherND"),
    *("RotaryEmbedding", "GemmaRotaryEmbedding", "RelativePositionBias", "GroupQueryAttention", "MultiHeadAttention"),
    *("PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention", "PagedAttention", "SparseAttention"),
    *("QuantizeLinear", "DequantizeLinear", "Pad", "Trilu", "Tokenizer", "Unique", "ExpandDims", "Range", "CropAndResize"),
    *("GridSample", "BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch", "RemovePadding", "RestorePadding"),
    *("DynamicTimeWarping", "UnfoldTensor", "NGramRepeatBlock", "MaxpoolWithMask", "NhwcMaxPool"),
}


def is_known(domain: str, op_type: str) -> bool:
    """Tell whether an operation is known: its weights are listed above, or it multiplies by no weight.

    >>> is_known("", "Add"), is_known("com.microsoft", "BiasGelu"), is_known("com.acme", "MyLinear")
    (True, True, False)
    """
    if domain in ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training"):
        return True
    if (domain, op_type) in OPAQUE:
        return True
    if domain == "com.microsoft":
        return (
            op_type in PRODUCTS or op_type in WITHOUT_RULE or op_type in _HARMLESS or op_type in ("MatMulNBits", "MatMulBnb4")
        )
    return domain == "trt" and op_type in ("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear")
