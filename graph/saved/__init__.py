"""A saved program: two files that hold names and numbers, checked word by word and read without running anything."""

from sparsepass.graph.saved.files import PROGRAM_FILE, TENSORS_FILE, check_as_written, read_state, write_state
from sparsepass.graph.saved.graph import graph_from_json, graph_to_json, module_stack
from sparsepass.graph.saved.names import check_tensor_name
from sparsepass.graph.saved.operators import DTYPES, OF_ZEROS, Operators, arguments_fit, is_number, names_fit
from sparsepass.graph.saved.schema import EXAMPLE_PREFIX, FORMAT_VERSION
from sparsepass.graph.saved.trial import Guard

__all__ = [
    "DTYPES",
    "EXAMPLE_PREFIX",
    "FORMAT_VERSION",
    "OF_ZEROS",
    "PROGRAM_FILE",
    "TENSORS_FILE",
    "Guard",
    "Operators",
    "arguments_fit",
    "check_as_written",
    "check_tensor_name",
    "graph_from_json",
    "graph_to_json",
    "is_number",
    "module_stack",
    "names_fit",
    "read_state",
    "write_state",
]
