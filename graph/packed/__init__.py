"""2:4 weights in packed form: stored, in memory, and as layers of a model, for inference."""

from sparsepass.graph.packed.dense import DenseLinear, Int8Embedding
from sparsepass.graph.packed.gpu_ways import gpu_refusal
from sparsepass.graph.packed.laid_out import Form, LaidOut, lay_out, product
from sparsepass.graph.packed.layout import (
    FLOATS,
    PackedWeight,
    Values,
    check,
    check_form,
    pack,
    quantize_rows,
    stored_form,
    unpack,
)
from sparsepass.graph.packed.module import PackedLinear
from sparsepass.graph.packed.norm import RMSNorm, fused_norm
from sparsepass.graph.packed.siblings import group_siblings

__all__ = [
    "FLOATS",
    "DenseLinear",
    "Form",
    "Int8Embedding",
    "LaidOut",
    "PackedLinear",
    "PackedWeight",
    "RMSNorm",
    "Values",
    "check",
    "check_form",
    "fused_norm",
    "gpu_refusal",
    "group_siblings",
    "lay_out",
    "pack",
    "product",
    "quantize_rows",
    "stored_form",
    "unpack",
]
