"""The target `tensorrt`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from sparsepass.export.targets.contract import Check, Lowered, LoweringContext
from sparsepass.export.targets.onnx import Onnx
from sparsepass.export.targets.tensorrt.options import EngineTarget

if TYPE_CHECKING:
    from sparsepass.graph import Program
    from sparsepass.passes import Pass


@final
@dataclass(frozen=True, kw_only=True)
class TensorRT(EngineTarget):
    """TensorRT engines with sparse weights, and for each layer whether they were used.

    Attributes:
        opset: ONNX operator set; by default the newest that is tried.
        task: What the model is for, such as ``text-generation``; by default its configuration tells.
        form: How weights that are quantized are stored in the graph: qdq (integers and DequantizeLinear; symmetric ones of 8
            bits with one scale a row, or of 4 bits in groups of 64 or 128) or dense (floating-point values on their grids).
        runtime: What builds engines: tensorrt, tensorrt-rtx or torch-tensorrt; by default what is installed and can build
            here.
        sm: Compute capabilities to build for: 80,86. By default this machine's GPU, or, with tensorrt-rtx and without a GPU,
            80,86,89,120.
        profiles: Lengths of an axis: AXIS=N or AXIS=MIN:COMMON:MAX, for one engine with ENGINE. before it:
            decode.batch=1:8:32. Separated by commas, or repeated.
        timeout_s: Seconds that the builder may take for one engine; by default 3600.
        timing_cache: File that keeps the builder's measured times from build to build.
        hardware_compatible: Engines that run on all GPUs from Ampere on, at some cost of speed.
        one_engine: One engine with two profiles for prefill and decode: weights once, not twice.
        sparse: By default the builder may use sparse tactics; with ``--no-sparse`` it builds the dense engine to compare with.
        measure: By default dense and sparse are timed on a GPU, for which tensorrt builds dense engines too; with
            ``--no-measure`` they are not.

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

    def check_here(self) -> None:
        """Make sure that a package is installed which can build here for what is asked."""
        from sparsepass.export.targets.tensorrt.lower import resolve_targets
        from sparsepass.export.targets.tensorrt.packages import choose, gpus

        here = gpus()
        resolve_targets(self, choose(self.runtime, here), here)
        Onnx(dtype=self.dtype, opset=self.opset, task=self.task).check_here()

    def check_passes(self, passes: "Iterable[Pass]") -> None:
        """Make sure that what they round weights to is what TensorRT takes."""
        from sparsepass.export.targets.tensorrt.grids import check_passes

        if self.form != "dense" and self.runtime != "torch-tensorrt":
            check_passes(passes, self.sm)

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
