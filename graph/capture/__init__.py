"""Capturing a model as a program: through torch.export, on example inputs, compared with the model, which stays as it was."""

from sparsepass.graph.capture.examples import example_inputs_for
from sparsepass.graph.capture.exporter import capture, program_from_graph_module, run_exporter

__all__ = [
    "capture",
    "example_inputs_for",
    "program_from_graph_module",
    "run_exporter",
]
