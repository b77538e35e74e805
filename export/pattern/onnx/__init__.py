"""The weights of an ONNX graph as its operations read them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.pattern.onnx.candidates import onnx_candidates as onnx_candidates
    from sparsepass.export.pattern.onnx.data import onnx_files as onnx_files, read_onnx as read_onnx
    from sparsepass.export.pattern.onnx.folded import folded_note as folded_note
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
