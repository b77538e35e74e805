"""The target `hf` and its options."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from sparsepass.export.targets.contract import Check, Lowered, LoweringContext, Target, option_error
from sparsepass.export.targets.evidence import pattern_summary

if TYPE_CHECKING:
    from sparsepass.graph import Program
    from sparsepass.passes import Pass


@final
@dataclass(frozen=True, kw_only=True)
class HuggingFace(Target):
    """A folder that plain transformers loads; SLoRB branches lie beside the model as a PEFT adapter.

    Attributes:
        form: How the target hf stores weights that are quantized: integers (and fp8, by compressed-tensors: pack-quantized and
            float-quantized), or dense (floating-point values on their grids).

    Raises:
        SparsepassError: If there is no such form.
    """

    name: ClassVar[str] = "hf"
    description: ClassVar[str] = "a folder that plain transformers loads; SLoRB beside it as a PEFT LoRA adapter"

    form: Literal["integers", "dense"] = "integers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("integers", "dense"):
            raise option_error(f"form={self.form} is not known; expected integers or dense")

    def is_checkpoint(self, *, is_quantized: bool) -> bool:
        """It is, unless weights are written as integers, which only transformers reads."""
        return not is_quantized or self.form == "dense"

    def check_here(self) -> None:
        """It is written anywhere."""

    def check_passes(self, passes: "Iterable[Pass]") -> None:
        """Make sure that no SLoRB branch comes to stand beside integers."""
        from sparsepass.passes import Quantize, SLoRB

        kinds = {type(item) for item in passes if not (item.targets or item.ignore)}
        if self.form == "integers" and kinds >= {Quantize, SLoRB}:
            raise option_error(
                "the target hf keeps SLoRB branches as an adapter, which has no place beside integers; leave slorb or quantize "
                "out, write floating-point values on their grids with hf{form=dense}, or write the target onnx or packed"
            )

    def lower(self, program: "Program", folder: Path, context: LoweringContext) -> Lowered:
        """Write the model, its adapter, tokenizer and processor."""
        from sparsepass.export.targets.hf.lower import lower_hf

        context.save_companions(folder)
        artifact = lower_hf(program, folder, dtype=self.dtype, as_integers=self.form == "integers")
        notes = [f"loaded by {artifact.auto_class}.from_pretrained"]
        if artifact.integers_note:
            notes.append(artifact.integers_note)
        if artifact.adapter is not None:
            notes.append(artifact.adapter_note)
        return Lowered(
            dtype=artifact.dtype,
            expected_sparse={"": artifact.expected_sparse},
            axes={"": artifact.axes},
            notes=tuple(notes),
            details=artifact.to_dict(),
            artifact=artifact,
        )

    def verify(self, program: "Program", folder: Path, lowered: Lowered, context: LoweringContext) -> tuple[Check, ...]:
        """Load the folder with plain transformers; check its pattern, its weights and its outputs."""
        from sparsepass.export.targets.hf.verify import verify_hf

        del context
        found = verify_hf(program, folder, integers=lowered.artifact.integers)
        pattern, weights, outputs = found["pattern"], found["weights"], found["outputs"]
        wrong = [failure for failure in found["failures"] if failure.startswith("the loaded weight")]
        rest = [failure for failure in found["failures"] if failure not in wrong and not failure.startswith("the N:M pattern")]
        by = f", adapter read by {found['adapter_read_by']}" if found["adapter_read_by"] else ""
        said = found["not_loaded"] if not rest else ""
        return (
            Check(
                name="pattern",
                held=pattern["conforms"],
                summary=pattern_summary("files", pattern | {"num_sparse": pattern["num_checked"]}),
                details=pattern,
            ),
            Check(
                name="weights",
                held=not wrong,
                summary="; ".join(wrong[:5]) or _equal(weights),
                details=weights,
            ),
            Check(
                name="outputs",
                held=None if said else not rest,
                summary=said or "; ".join(rest) or f"loaded by {found['loaded_by']}{by}: {outputs['said']}",
                details={**outputs, "versions": found["versions"]},
            ),
        )


def _equal(weights: Mapping[str, Any]) -> str:
    said = f"{weights['num_equal']} loaded weights are bit for bit the program's"
    if weights["num_integers"]:
        said = f"{weights['num_integers']} layers hold the program's own numbers and scales, zeros included; {said}"
    return said
