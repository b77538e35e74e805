"""The target `torch` and its options."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from sparsepass.export.targets.contract import Check, Lowered, LoweringContext, Target, option, option_error
from sparsepass.export.targets.hf import HuggingFace
from sparsepass.export.targets.torch.choice import ChoiceRules, Shapes, parse_shapes

if TYPE_CHECKING:
    from sparsepass.graph import Program


@final
@dataclass(frozen=True, kw_only=True)
class SemiStructured(Target):
    """The folder of the target hf, and which of its layers torch's semi-structured kernels run.

    Attributes:
        timings: Times recorded before, for the target torch: a torch_semi_structured.json, its folder, or a result of
            benchmarks/gpu_torch.py. By default they are measured on this machine's GPU, or where the folder is loaded.
        shapes: Sizes at which the target torch measures, BATCHxSEQUENCE: 1x1,1x512,8x2048. By default from one token to 16384.
        compiled: The target torch measures compiled layers, for a model that torch.compile will run.
        sparse_only: The target torch lowers a layer only if 2:4 is faster at every size, so that no dense weight is kept
            beside it.
        measure: By default dense and sparse are timed on a GPU; with ``--no-measure`` they are not, and have to be where the
            folder is loaded.

    Raises:
        SparsepassError: If a value makes no sense.
    """

    name: ClassVar[str] = "torch"
    description: ClassVar[str] = (
        "a Hugging Face folder whose layers torch's 2:4 kernels run, where that is measured to be faster"
    )

    timings: Path | None = None
    shapes: Shapes = option((), flag="measure-shapes", parse=parse_shapes)
    compiled: bool = False
    sparse_only: bool = False
    measure: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.rules
        if self.timings is not None and (self.shapes or self.compiled):
            raise option_error(
                "times are taken from a file (timings), so nothing is measured: leave shapes and compiled out, or leave "
                "timings out"
            )

    @property
    def rules(self) -> ChoiceRules:
        """How layers are chosen."""
        return ChoiceRules(shapes=self.shapes, sparse_only=self.sparse_only, compiled=self.compiled)

    def is_checkpoint(self, *, is_quantized: bool) -> bool:
        """It is, whatever its weights are."""
        del is_quantized
        return True

    def check_here(self) -> None:
        """Make sure that recorded times can be read, and that the kernels take the type and run on the GPU, if there is one."""
        from sparsepass.export.targets.torch.lower import check_machine

        check_machine(self.dtype, self.timings, measure=self.measure)

    def lower(self, program: "Program", folder: Path, context: LoweringContext) -> Lowered:
        """Write the folder, and the record of its layers."""
        from sparsepass.export.targets.torch.lower import write_torch

        context.save_companions(folder)
        artifact = write_torch(program, folder, rules=self.rules, timings=self.timings, measure=self.measure, dtype=self.dtype)
        return Lowered(
            dtype=artifact.hf.dtype,
            expected_sparse={"": artifact.hf.expected_sparse},
            axes={"": artifact.hf.axes},
            notes=artifact.notes,
            details=artifact.to_dict(),
            artifact=artifact,
            sections={"sparsity": artifact.section()},
        )

    def verify(self, program: "Program", folder: Path, lowered: Lowered, context: LoweringContext) -> tuple[Check, ...]:
        """Check the folder as the target hf does, then torch's packing and, on a GPU, its kernels."""
        from sparsepass.export.targets.torch.verify import verify_torch

        return (
            *HuggingFace().verify(program, folder, replace(lowered, artifact=lowered.artifact.hf), context),
            *verify_torch(program, folder, lowered.artifact.record),
        )


SemiStructuredOptions = SemiStructured
"""Another name of `SemiStructured`, from when its options had a class of their own."""
