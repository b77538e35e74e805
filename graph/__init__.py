"""What a program is: capture, linear sites, custom ops, equivalence, hierarchy."""

from sparsepass.graph.capture import capture
from sparsepass.graph.equivalence import Comparison, Difference, assert_equivalent, compare
from sparsepass.graph.fill import capture_without_weights, fill
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.program import Program
from sparsepass.graph.saved import Operators
from sparsepass.graph.sites import Site
from sparsepass.graph.support import CaptureError, EquivalenceError, PassError, ProgramFormatError, SparsepassError

__all__ = [
    "CaptureError",
    "Comparison",
    "Difference",
    "EquivalenceError",
    "Operators",
    "PassError",
    "Program",
    "ProgramFormatError",
    "Site",
    "SparsepassError",
    "assert_equivalent",
    "capture",
    "capture_without_weights",
    "compare",
    "fill",
    "split_siblings",
]
