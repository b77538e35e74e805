"""How a program leaves: targets, pattern checker, plan, report, stages, command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.pattern import PatternReport as PatternReport, check_pattern as check_pattern
    from sparsepass.export.report import read_report as read_report
    from sparsepass.export.stages import ExportResult as ExportResult, export as export
    from sparsepass.export.targets import (
        TARGETS as TARGETS,
        HuggingFace as HuggingFace,
        Onnx as Onnx,
        Packed as Packed,
        SemiStructured as SemiStructured,
        Target as Target,
        TensorRT as TensorRT,
    )
    from sparsepass.graph.load import LoadedModel as LoadedModel, load_model as load_model
    from sparsepass.graph.perplexity import Perplexity as Perplexity, perplexity as perplexity
else:
    # The command line imports this package before it has anything to do, so nothing heavy is imported up here.
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
