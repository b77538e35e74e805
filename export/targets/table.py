"""The one table of targets, and targets as text: ``onnx{opset=18}``."""

from typing import Final

from sparsepass._plugins import extended
from sparsepass.export.targets.contract import Target
from sparsepass.export.targets.hf import HuggingFace
from sparsepass.export.targets.onnx import Onnx
from sparsepass.export.targets.packed import Packed
from sparsepass.export.targets.tensorrt import TensorRT
from sparsepass.export.targets.torch import SemiStructured

TARGETS: Final[dict[str, type[Target]]] = {kind.name: kind for kind in (Onnx, HuggingFace, TensorRT, SemiStructured, Packed)}
"""Name -> class. A new target is one folder, one line here, one test file."""


def targets_table() -> dict[str, type[Target]]:
    """The table with the targets that other packages add through the entry point ``sparsepass.targets``.

    Raises:
        SparsepassError: If an entry point cannot be loaded, is no target, or takes a name that is taken.
    """
    return extended(TARGETS, "sparsepass.targets", Target)  # type: ignore[type-abstract]


def parse_target(target: str | Target) -> Target:
    """Turn text into a target; a target stays as it is.

    Raises:
        SparsepassError: If the name or an option is unknown (the nearest known one is given), a value cannot be used, or the
            text cannot be read.

    Example:
        >>> parse_target("tensorrt{sm=86}").sm
        (86,)
    """
    from sparsepass.graph.support import SparsepassError, build, parse_items

    if isinstance(target, Target):
        return target
    items = parse_items(target, "target") if isinstance(target, str) else []
    if len(items) != 1:
        raise SparsepassError(f"expected one target, such as 'onnx' or 'onnx{{opset=18}}', got {target!r}")
    ((name, options),) = items
    return build(targets_table(), "target", name, options)


def target_to_text(target: Target) -> str:
    """Turn a target into text with all options that differ from their defaults; `parse_target` reads it back.

    Example:
        >>> target_to_text(Onnx(opset=18))
        'onnx{opset=18}'
    """
    from sparsepass.graph.support import item_to_text

    return item_to_text(target.name, target, defaults=False)
