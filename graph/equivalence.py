"""Whether two artifacts compute the same function: models, programs and ONNX files."""

from sparsepass.graph.difference import Difference, TensorDifference, difference

__all__ = ["Difference", "TensorDifference", "difference"]
