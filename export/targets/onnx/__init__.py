"""The target `onnx`: ONNX files, with a key-value cache for models that generate."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.targets.onnx.artifact import OnnxArtifact as OnnxArtifact, OnnxGraph as OnnxGraph
    from sparsepass.export.targets.onnx.forms import Form as Form, check_form as check_form
    from sparsepass.export.targets.onnx.lower import lower_onnx as lower_onnx, plain_program as plain_program
    from sparsepass.export.targets.onnx.session import generate_greedy as generate_greedy, open_session as open_session
    from sparsepass.export.targets.onnx.target import Onnx as Onnx
    from sparsepass.export.targets.onnx.verify import verify_onnx as verify_onnx
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
