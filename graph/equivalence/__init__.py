"""Whether two artifacts compute the same, and where they part."""

from sparsepass.graph.equivalence.artifact import Artifact, Inputs, Observe, coarsest
from sparsepass.graph.equivalence.comparison import Comparison, assert_equivalent, compare, default_rtol
from sparsepass.graph.equivalence.differences import Difference, difference
from sparsepass.graph.equivalence.onnx_file import OnnxFile, exact_products, output_name
from sparsepass.graph.equivalence.widened import widened_copy

__all__ = [
    "Artifact",
    "Comparison",
    "Difference",
    "Inputs",
    "Observe",
    "OnnxFile",
    "assert_equivalent",
    "coarsest",
    "compare",
    "default_rtol",
    "difference",
    "exact_products",
    "output_name",
    "widened_copy",
]
