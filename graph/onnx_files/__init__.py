"""ONNX files that others made: read, with the files of weights beside them."""

from sparsepass.graph.onnx_files.external_data import check_external_data
from sparsepass.graph.onnx_files.reading import read_proto

__all__ = [
    "check_external_data",
    "read_proto",
]
