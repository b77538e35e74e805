"""How a program leaves: targets, pattern checker, evaluation, report, command line."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.eval import Perplexity, perplexity
    from sparsepass.export.load import LoadedModel, load_model
    from sparsepass.export.pattern import PatternReport, check_pattern
    from sparsepass.export.report import read_report
    from sparsepass.export.targets import TARGETS, ExportResult, Target, export
else:
    _HOMES = {
        "sparsepass.export.eval": ("Perplexity", "perplexity"),
        "sparsepass.export.load": ("LoadedModel", "load_model"),
        "sparsepass.export.pattern": ("PatternReport", "check_pattern"),
        "sparsepass.export.report": ("read_report",),
        "sparsepass.export.targets": ("TARGETS", "ExportResult", "Target", "export"),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    # The command line imports this package before it has anything to do, so nothing heavy is imported up here.
    def __getattr__(name):
        if name not in _HOME_OF:
            raise AttributeError(f"module 'sparsepass.export' has no attribute {name!r}")
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value


__all__ = [
    "TARGETS",
    "ExportResult",
    "LoadedModel",
    "PatternReport",
    "Perplexity",
    "Target",
    "check_pattern",
    "export",
    "load_model",
    "perplexity",
    "read_report",
]
