"""The target `onnx` and its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from sparsepass.export.targets.contract import Check, Lowered, LoweringContext, Target, option
from sparsepass.export.targets.evidence import pattern_summary
from sparsepass.export.targets.onnx.forms import check_form

if TYPE_CHECKING:
    from sparsepass.graph import Program


@final
@dataclass(frozen=True, kw_only=True)
class Onnx(Target):
    """ONNX files, with a key-value cache for models that generate.

    Attributes:
        opset: ONNX operator set; by default the newest that is tried.
        task: What the model is for, such as ``text-generation``; by default its configuration tells.
        form: How weights that are quantized are stored. onnx: qdq (the default: integers and DequantizeLinear), matmulnbits
            (onnxruntime's operator; qdq where it does not fit) or dense. tensorrt: qdq or dense. hf: integers (the default: by
            compressed-tensors, fp8 too) or dense. dense: floating-point values on their grids.
        fold_slorb: With form=matmulnbits, write SLoRB branches into zero points, without operators of their own.

    Raises:
        SparsepassError: If a value cannot be used.

    Example:
        >>> Onnx(opset=18, dtype="fp16").form
        'qdq'
    """

    name: ClassVar[str] = "onnx"
    description: ClassVar[str] = "ONNX for onnxruntime, TensorRT and others, with a key-value cache where the model generates"

    opset: int | None = None
    task: str | None = None
    form: str = option("qdq", parse=str)
    fold_slorb: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form(self.form, self.fold_slorb)

    def check_here(self) -> None:
        """Make sure that opset, task and type can be written."""
        from sparsepass.export.targets.onnx.options import check_options

        check_options(self.dtype, self.opset, self.task)

    def lower(self, program: "Program", folder: Path, context: LoweringContext) -> Lowered:
        """Write the graphs, the configuration, tokenizer and processor."""
        from sparsepass.export.targets.onnx.config import write_config
        from sparsepass.export.targets.onnx.lower import lower_onnx

        artifact = lower_onnx(
            program,
            folder,
            dtype=self.dtype,
            opset=self.opset,
            task=self.task,
            form=self.form,  # type: ignore[arg-type]  # one of FORMS
            fold_slorb=self.fold_slorb,
        )
        write_config(program, folder, artifact.dtype)
        context.save_companions(folder)
        return Lowered(
            dtype=artifact.dtype,
            expected_sparse=artifact.expected_sparse,
            notes=artifact.notes,
            details=artifact.to_dict(),
            artifact=artifact,
        )

    def verify(self, program: "Program", folder: Path, lowered: Lowered, context: LoweringContext) -> tuple[Check, ...]:
        """Check the graphs by onnx.checker, their pattern, their weights, and their outputs in onnxruntime."""
        from sparsepass.export.targets.onnx.verify import verify_onnx

        del context
        found = verify_onnx(program, folder, lowered.artifact)
        broken = {file: said for file, said in found["files"].items() if said != "ok"}
        patterns = found["pattern"]
        return (
            Check(
                name="files",
                held=not broken,
                summary="; ".join(f"{file}: {said}" for file, said in broken.items()) or "onnx.checker accepts each graph",
                details=found["files"],
            ),
            Check(
                name="pattern",
                held=all(one["conforms"] for one in patterns.values()),
                summary="; ".join(pattern_summary(file, one) for file, one in patterns.items()),
                details=patterns,
            ),
            _weights(found["weights"], lowered.dtype),
            _outputs(found["outputs"], lowered.dtype),
        )


def _weights(found: Mapping[str, Any], dtype: str) -> Check:
    differing = found["differing"]
    converted = f", after conversion to {dtype}" if found["num_converted"] else ""
    said = f"{found['num_checked']} stored weights are bit for bit the program's{converted}"
    if found["num_integers"]:
        said = f"{said}; {found['num_integers']} of them are the program's own integers"
    if differing:
        said = f"{len(differing)} stored weights are not the program's: {', '.join(differing[:5])}"
    return Check(name="weights", held=not differing, summary=said, details=found)


def _outputs(found: Mapping[str, Any], dtype: str) -> Check:
    cases = found["cases"]
    broken = [f"{case['case']}: {case.get('reason') or 'too far from the program'}" for case in cases if not case["holds"]]
    worst = max((case.get("max_relative", float("inf")) for case in cases), default=0.0)
    rounding = ", beyond that only what is shown to be rounding" if worst > found["tolerance"] and not broken else ""
    how = ", computed in float32 (no CPU kernels for bfloat16)" if dtype == "bfloat16" else ""
    ran = (
        f"{len(cases)} cases in onnxruntime{how}, relative error {worst:.2g} at most (allowed {found['tolerance']:g}{rounding})"
    )
    return Check(
        name="outputs",
        held=bool(cases) and not broken,
        summary=str(found["not_run"]) if found["not_run"] else "; ".join((ran, *broken[:3])),
        details=found,
    )
