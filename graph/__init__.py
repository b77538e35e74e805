"""What a program is: capture, linear sites, custom ops, equivalence, hierarchy."""

from sparsepass.graph.capture import capture
from sparsepass.graph.errors import (
    CaptureError,
    EquivalenceError,
    PassError,
    ProgramFormatError,
    SparsepassError,
)
from sparsepass.graph.program import Program
from sparsepass.graph.sites import Site

__all__ = [
    "CaptureError",
    "EquivalenceError",
    "PassError",
    "Program",
    "ProgramFormatError",
    "Site",
    "SparsepassError",
    "capture",
]
