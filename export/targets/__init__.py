"""How a program leaves: one room for each target."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.targets.contract import (
        Check as Check,
        Lowered as Lowered,
        LoweringContext as LoweringContext,
        State as State,
        Target as Target,
        option as option,
        state_of as state_of,
    )
    from sparsepass.export.targets.hf import HuggingFace as HuggingFace
    from sparsepass.export.targets.onnx import Onnx as Onnx
    from sparsepass.export.targets.packed import Packed as Packed
    from sparsepass.export.targets.table import (
        TARGETS as TARGETS,
        parse_target as parse_target,
        target_to_text as target_to_text,
        targets_table as targets_table,
    )
    from sparsepass.export.targets.tensorrt import TensorRT as TensorRT
    from sparsepass.export.targets.torch import SemiStructured as SemiStructured
else:
    from sparsepass._lazy import face

    __getattr__, __dir__, __all__ = face(__name__, __file__)
