"""The target `packed` and its options."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from sparsepass.export.targets.contract import Check, Lowered, LoweringContext, Target, option_error

if TYPE_CHECKING:
    from sparsepass.graph import Program
    from sparsepass.passes import Pass

_VALUES = ("bf16", "fp16", "int8", "int4")
_GROUP_SIZE = 64


@final
@dataclass(frozen=True, kw_only=True)
class Packed(Target):
    """A Hugging Face folder whose 2:4 layers hold their kept values alone.

    Attributes:
        values: What the target packed keeps a value as: bf16, fp16, int8 or int4, rounded to the nearest. By default the
            integers of a program that is quantized, and else bf16.
        group_size: Input features that share a scale in the target packed, for int8 and int4; 0 for one scale a row.
        embedding: Keep embedding and head as int8 in the target packed; by default they stay as they are.

    Raises:
        SparsepassError: If a value makes no sense.
    """

    name: ClassVar[str] = "packed"
    description: ClassVar[str] = "a Hugging Face folder of 2:4 layers without their zeros, which sparsepass's own kernels run"

    values: str | None = None
    group_size: int = _GROUP_SIZE
    embedding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values not in (None, *_VALUES):
            raise option_error(f"values={self.values} is not known; expected one of {', '.join(_VALUES)}")
        if self.embedding not in (None, "int8"):
            raise option_error(f"embedding={self.embedding} is not known; expected int8, or nothing for as it is")
        if self.group_size != _GROUP_SIZE:
            from sparsepass.graph.packed import check_form

            if self.values is None:
                raise option_error("group_size belongs to values=int8 and int4; name one of them, or leave it out")
            if not self.values.startswith("int"):
                raise option_error(f"group_size belongs to int8 and int4, and values={self.values} has no scales; leave it out")
            check_form(self.values, 8, self.group_size, "the target packed")
        if self.dtype not in (None, "bfloat16", "float16", "float32"):
            raise option_error(f"dtype={self.dtype}: packed layers take bfloat16, float16 and float32; choose one of these")

    def is_checkpoint(self, *, is_quantized: bool) -> bool:
        """It is, whatever its weights are."""
        del is_quantized
        return True

    def check_here(self) -> None:
        """It is written anywhere."""

    def check_passes(self, passes: "Iterable[Pass]") -> None:
        """Make sure that what they round layers to is what packed layers hold."""
        from sparsepass.export.targets.packed.own import check_own
        from sparsepass.passes import Quantize

        for item in passes:
            if isinstance(item, Quantize):
                check_own("what quantize rounds", item.grid, self.values, self.group_size)

    def lower(self, program: "Program", folder: Path, context: LoweringContext) -> Lowered:
        """Write the model, tokenizer and processor."""
        from sparsepass.export.targets.packed.lower import lower_packed

        context.save_companions(folder)
        artifact = lower_packed(
            program,
            folder,
            values=self.values,
            group_size=self.group_size,
            embedding=self.embedding,
            dtype=self.dtype,
        )
        return Lowered(
            dtype=artifact.dtype,
            expected_sparse={},
            notes=artifact.notes,
            details=artifact.to_dict(),
            artifact=artifact,
            sections={"sparsity": artifact.section()},
        )

    def verify(self, program: "Program", folder: Path, lowered: Lowered, context: LoweringContext) -> tuple[Check, ...]:
        """Load the folder as a user does; check its pattern, its values and its outputs."""
        from sparsepass.export.targets.packed.verify import verify_packed

        del context
        return verify_packed(program, folder, lowered.artifact)
