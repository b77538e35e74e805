"""sparsepass: a compiler for N:M sparsity of transformer models.

Names are imported when they are first used, so that ``import sparsepass`` stays fast. The lowering to files is
`sparsepass.export.export`: the name ``sparsepass.export`` is the folder's.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.eval import Perplexity, perplexity
    from sparsepass.export.load import load_model
    from sparsepass.export.pattern import PatternReport, check_pattern
    from sparsepass.graph import (
        CaptureError,
        EquivalenceError,
        PassError,
        Program,
        ProgramFormatError,
        Site,
        SparsepassError,
    )
    from sparsepass.graph.capture import capture
    from sparsepass.graph.equivalence import assert_equivalent, compare
    from sparsepass.passes import Fold, NMSparsify, Pass, SLoRB, apply_passes, parse_pipeline, pipeline_to_text

    __version__: str
else:
    _HOMES = {
        "sparsepass.export.eval": ("Perplexity", "perplexity"),
        "sparsepass.export.load": ("load_model",),
        "sparsepass.export.pattern": ("PatternReport", "check_pattern"),
        "sparsepass.graph": (
            "CaptureError",
            "EquivalenceError",
            "PassError",
            "Program",
            "ProgramFormatError",
            "Site",
            "SparsepassError",
            "capture",
        ),
        "sparsepass.graph.equivalence": ("assert_equivalent", "compare"),
        "sparsepass.passes": (
            "Fold",
            "NMSparsify",
            "Pass",
            "SLoRB",
            "apply_passes",
            "parse_pipeline",
            "pipeline_to_text",
        ),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("sparsepass")
        if name not in _HOME_OF:
            raise AttributeError(f"module 'sparsepass' has no attribute {name!r}")
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted([*globals(), *_HOME_OF, "__version__"])


__all__ = [
    "CaptureError",
    "EquivalenceError",
    "Fold",
    "NMSparsify",
    "Pass",
    "PassError",
    "PatternReport",
    "Perplexity",
    "Program",
    "ProgramFormatError",
    "SLoRB",
    "Site",
    "SparsepassError",
    "__version__",
    "apply_passes",
    "assert_equivalent",
    "capture",
    "check_pattern",
    "compare",
    "load_model",
    "parse_pipeline",
    "perplexity",
    "pipeline_to_text",
]
