"""The target `tensorrt`: engines with sparse weights, and the evidence of their layers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.targets.tensorrt.lower import lower_tensorrt as lower_tensorrt
    from sparsepass.export.targets.tensorrt.session import (
        PROVIDER as PROVIDER,
        open_tensorrt_session as open_tensorrt_session,
        read_configuration as read_configuration,
    )
    from sparsepass.export.targets.tensorrt.target import EngineOptions as EngineOptions, TensorRT as TensorRT
    from sparsepass.export.targets.tensorrt.verify import verify_engines as verify_engines
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
