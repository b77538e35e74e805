"""The pattern checker: whether every stored weight is N:M along the axis that its operation sums over."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.pattern.bits import unpack_bits as unpack_bits
    from sparsepass.export.pattern.check import check_pattern as check_pattern
    from sparsepass.export.pattern.checkpoints import safetensors_files as safetensors_files
    from sparsepass.export.pattern.onnx import folded_note as folded_note
    from sparsepass.export.pattern.report import PatternEntry as PatternEntry, PatternReport as PatternReport
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
