"""The target `tensorrt`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from sparsepass.export.targets.contract import Check, Lowered, LoweringContext
from sparsepass.export.targets.onnx import Onnx
from sparsepass.export.targets.tensorrt.options import EngineTarget

if TYPE_CHECKING:
    from sparsepass.graph import Program


@final
@dataclass(frozen=True, kw_only=True)
class TensorRT(EngineTarget):
    """TensorRT engines with sparse weights, and for each layer whether they were used.

    Args:
        dtype: Type of the weights and of the arithmetic; float16 and bfloat16 have sparse kernels, float32 has none.
        opset: Operator set of the ONNX files that the engines are built from.
        task: What the model is for, as for `Onnx`.
        runtime: Name in `RUNTIMES`; None to take what can build here.
        sm: Compute capabilities to build for, as 86 for SM86; empty for the GPU that is there, or, with tensorrt-rtx and
            without a GPU, for all that it knows from SM80 on.
        profiles: Lengths of axes, each ``AXIS=N``, ``AXIS=MIN:COMMON:MAX`` or the same with ``ENGINE.`` before it.
        timeout_s: Seconds that the builder may take for one engine.
        timing_cache: File that keeps measured times from build to build.
        hardware_compatible: Whether an engine of tensorrt has to run on all GPUs from Ampere on, at some cost of speed.
        one_engine: Whether prefill and decode share one engine (with a profile each, and weights once) instead of two.
        sparse: Whether the builder may use sparse tactics; off, the engine is the dense one to compare with.
        measure: Whether, on a GPU, each engine is built dense too and both are timed.

    Raises:
        SparsepassError: If a value cannot be used.

    Example:
        >>> TensorRT(sm=(86,), profiles=("decode.batch=1:8:32",)).ranges
        {'decode': {'batch': (1, 8, 32)}}
        >>> TensorRT(sm=(75,))
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: SM75 (Turing) has no 2:4 kernels: they need Ampere (SM80) or newer; ...
    """

    name: ClassVar[str] = "tensorrt"
    description: ClassVar[str] = "TensorRT engines with sparse weights, and for each layer whether they were used"

    @property
    def model_task(self) -> str | None:
        """The option `task`."""
        return self.task

    def lower(self, program: "Program", folder: Path, context: LoweringContext) -> Lowered:
        """Write the graphs, and the engines that are built from them."""
        from sparsepass.export.targets.tensorrt.lower import lower_tensorrt

        artifact = lower_tensorrt(program, folder, self)
        context.save_companions(folder)
        return Lowered(
            dtype=artifact.onnx.dtype,
            expected_sparse=artifact.onnx.expected_sparse,
            notes=artifact.notes,
            details=artifact.onnx.to_dict(),
            artifact=artifact,
            sections={"sparsity": artifact.section()},
        )

    def verify(self, program: "Program", folder: Path, lowered: Lowered, context: LoweringContext) -> tuple[Check, ...]:
        """Check the graphs as the target onnx does, then the engines: their files, their outputs, and what ran sparse."""
        from sparsepass.export.targets.tensorrt.verify import verify_engines

        graphs = Onnx().verify(program, folder, replace(lowered, artifact=lowered.artifact.onnx), context)
        return (*graphs, *verify_engines(program, folder, lowered.artifact))


EngineOptions = TensorRT
"""Another name of `TensorRT`, from when the options of engines had a class of their own."""
