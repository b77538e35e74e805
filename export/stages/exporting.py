"""The one table of targets, and `export`, which takes a model or program through lowering and verification."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsepass.export.report import plain_json, run_record, write_report
from sparsepass.export.stages.preparing import Calibration, Evaluation, Prepared, Tell, prepare, silent
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.load import LoadedModel, parse_dtype
from sparsepass.graph.support import check_free, closest, replaced_folder
from sparsepass.passes import Pass, parse_pipeline

if TYPE_CHECKING:
    from sparsepass.export.targets.tensorrt import EngineOptions
    from sparsepass.export.targets.torch import SemiStructuredOptions

SAMPLES_FILE: Final = "samples/samples.safetensors"
"""In a folder of its own: loaders that read every safetensors file beside config.json would take it for weights."""


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What a target may need to know beside the program.

    Attributes:
        dtype: Type of the written weights; None for the program's own.
        opset: ONNX operator set; None for the target's default.
        task: What the model is for, such as ``text-generation``; None to tell from its class.
        tokenizer: The model's tokenizer, if it has one.
        processor: Its processor, if it has one.
        engine: How engines are built; None for the target's defaults.
        semi_structured: How layers are chosen that torch's 2:4 kernels run; None for the target's defaults.
    """

    dtype: torch.dtype | None = None
    opset: int | None = None
    task: str | None = None
    tokenizer: Any = None
    processor: Any = None
    engine: "EngineOptions | None" = None
    semi_structured: "SemiStructuredOptions | None" = None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What a target wrote.

    Attributes:
        dtype: Type of the written weights.
        expected_sparse: File (empty: the folder) -> stored weight -> pattern; every other weight is dense on purpose.
        axes: File -> stored weight -> axis along which the pattern runs, where the file itself does not tell.
        notes: What a reader should know of the files.
        details: The target's own record as JSON.
        artifact: The target's own record, for its verification.
        sections: Sections of the report that the target knows.
    """

    dtype: str
    expected_sparse: Mapping[str, Mapping[str, str]]
    axes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    artifact: Any = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was verified in the written files.

    Attributes:
        name: Such as ``pattern`` or ``outputs``.
        held: Whether it held; None if it cannot be checked here, and the summary says why.
        summary: One line for people.
        details: Everything for machines.
    """

    name: str
    held: bool | None
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A form in which a program leaves.

    Attributes:
        name: What `--target` takes.
        description: One line for the help.
        lower: Writes the files into a folder.
        verify: Opens them again and compares them with the program.
        options: Fields of `Lowering` that it reads, of those that a user sets.
    """

    name: str
    description: str
    lower: Callable[[Program, Path, Lowering], Lowered]
    verify: Callable[[Program, Path, Lowered, Lowering], tuple[Check, ...]]
    options: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        folder: Where it stands.
        held: Whether verification held; None if it was switched off.
        report: The content of report.json.
        program: The program that was written.
    """

    folder: Path
    held: bool | None
    report: Mapping[str, Any] = field(repr=False)
    program: Program = field(repr=False)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each check that did not hold."""
        checks = self.report["verification"]["checks"]
        return tuple(f"{check['name']}: {check['summary']}" for check in checks if check["held"] is False)


def export(
    model: "Program | nn.Module | LoadedModel | str | Path",
    target: str,
    out: str | Path,
    *,
    passes: "str | Pass | Iterable[str | Pass] | None" = None,
    calibration: Any = None,
    evaluation: Evaluation | None = None,
    tokenizer: Any = None,
    dtype: "torch.dtype | str | None" = None,
    opset: int | None = None,
    task: str | None = None,
    engine: "EngineOptions | None" = None,
    semi_structured: "SemiStructuredOptions | None" = None,
    example_inputs: Any = None,
    force: bool = False,
    verify: bool = True,
    validate: bool = True,
    progress: bool | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    sections: Mapping[str, Any] | None = None,
    command: str | None = None,
    tell: Tell = silent,
) -> ExportResult:
    """Rewrite a model, write it in a target's form, open what was written, and verify it.

    Beside the artifact stand recipe.txt (the passes as text), samples/samples.safetensors (inputs, and the outputs that
    the program gives for them), report.json and report.md. The folder is moved into place when everything is written;
    if verification does not hold it is written all the same, and the report says what differs.

    Args:
        model: A program, a model in memory, or what `load_model` takes.
        target: A name from `TARGETS`: ``onnx``, ``hf``, ``tensorrt`` or ``torch``.
        out: Folder to write.
        passes: What to apply first; see `apply_passes`. None applies nothing.
        calibration: Data for the passes, or a `Calibration` with its settings.
        evaluation: If given, perplexity is measured before and after, for the report.
        tokenizer: Goes into the folder, and turns calibration and evaluation text into tokens; by default the
            model's own.
        dtype: Type of the written weights; by default as they are.
        opset: ONNX operator set.
        task: Such as ``text-generation``; by default the model's class tells.
        engine: How the engines of the target tensorrt are built.
        semi_structured: How the target torch chooses the layers that 2:4 kernels run.
        example_inputs: What to capture a model with that is no transformers model.
        force: Whether a folder that is not empty is replaced.
        verify: Whether to verify what was written.
        validate: Whether each pass is validated; see `apply_passes`.
        progress: Whether to show progress; by default where standard error is a terminal.
        gguf_file: See `load_model`.
        revision: See `load_model`.
        trust_remote_code: See `load_model`.
        sections: Sections of the report that an earlier stage knows, such as ``accuracy``.
        command: The command line, for the report.
        tell: Called with one line at the beginning of each step.

    Returns:
        Where it is, whether verification held, and the report.

    Raises:
        SparsepassError: If something cannot be read, rewritten, lowered or written; nothing is written then.

    Example:
        >>> export("SmolLM2-135M-Instruct", "onnx", "out", passes="nm_sparsify").held  # doctest: +SKIP
        True
    """
    row = _target(target)
    given = {"opset": opset, "task": task, "engine": engine, "semi_structured": semi_structured}
    if unread := [name for name, value in given.items() if value is not None and name not in row.options]:
        raise SparsepassError(f"the target {row.name} has no option {unread[0]}; leave it out, or choose another target")
    wanted = None if dtype is None else parse_dtype(dtype)
    pipeline = parse_pipeline(passes) if passes else None
    check_free(out, force=force)
    prepared = prepare(
        model,
        passes=pipeline,
        calibration=calibration if isinstance(calibration, Calibration) else Calibration(data=calibration),
        evaluation=evaluation,
        tokenizer=tokenizer,
        task=task,
        example_inputs=example_inputs,
        gguf_file=gguf_file,
        revision=revision,
        trust_remote_code=trust_remote_code,
        validate=validate,
        progress=progress,
        tell=tell,
    )
    prepared.document.update(sections or {})
    options = Lowering(
        dtype=wanted,
        opset=opset,
        task=task,
        tokenizer=prepared.loaded.tokenizer,
        processor=prepared.loaded.processor,
        engine=engine,
        semi_structured=semi_structured,
    )
    return _write(prepared, row, Path(out), options, force=force, verify=verify, command=command, tell=tell)


def _write(
    prepared: Prepared, row: Target, out: Path, options: Lowering, *, force: bool, verify: bool, command: str | None, tell: Tell
) -> ExportResult:
    program = prepared.program
    with replaced_folder(out, force=force) as staging:
        tell(f"writing {row.name}")
        lowered = row.lower(program, staging, options)
        files = {str(path.relative_to(staging)): path.stat().st_size for path in sorted(staging.rglob("*")) if path.is_file()}
        if verify:
            tell("opening what was written, and comparing it with the program")
        checks = row.verify(program, staging, lowered, options) if verify else ()
        held = all(check.held is not False for check in checks) if verify else None
        document = (
            prepared.document
            | dict(lowered.sections)
            | {
                "artifact": {
                    "target": row.name,
                    "dtype": lowered.dtype,
                    "files": files,
                    "size_bytes": sum(files.values()),
                    "expected_sparse": lowered.expected_sparse,
                    "axes": lowered.axes,
                    "notes": lowered.notes,
                    "details": lowered.details,
                },
                "verification": {
                    "held": held,
                    "checks": [{"name": c.name, "held": c.held, "summary": c.summary, "details": c.details} for c in checks],
                },
                "samples": write_samples(program, staging / SAMPLES_FILE) | {"file": SAMPLES_FILE},
            }
        )
        seconds = time.perf_counter() - prepared.started
        document["runs"] = [*document["runs"], run_record("export", command=command, seconds=seconds)]
        written = write_report(staging, _moved(plain_json(document), staging, out))
    return ExportResult(folder=out, held=held, report=written, program=program)


@torch.no_grad()
def write_samples(program: Program, path: Path) -> dict[str, Any]:
    """Write the program's example inputs, and the outputs it gives for them, to a safetensors file.

    Returns:
        Names, shapes and types, for the report.
    """
    inputs = program.flat_inputs(**program.example_inputs)
    outputs = dict(zip(program.output_names, program.graph_module(*inputs.values()), strict=True))
    plain = {
        kind: {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if isinstance(t, Tensor)}
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({f"{kind}/{name}": t for kind, found in plain.items() for name, t in found.items()}, path)
    return {
        kind: {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in found.items()}
        for kind, found in plain.items()
    }


def read_samples(path: str | Path) -> dict[str, Tensor]:
    """Read the inputs of a samples file: name -> tensor.

    Raises:
        SparsepassError: If it cannot be read.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise SparsepassError(f"{path} cannot be read as safetensors ({error}); check the path") from error
    marked = {name.removeprefix("inputs/"): t for name, t in tensors.items() if name.startswith("inputs/")}
    return marked or {name: t for name, t in tensors.items() if not name.startswith("outputs/")}


def _target(name: str) -> Target:
    if name not in TARGETS:
        near = closest(name, TARGETS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise SparsepassError(f"unknown target {name!r}{hint} (known are {', '.join(TARGETS)})")
    return TARGETS[name]


def _moved(document: Any, staging: Path, out: Path) -> Any:
    """Name the final folder wherever the document names the one it was written in."""
    text = json.dumps(document)
    for old, new in ((staging, out), (staging.resolve(), out.resolve())):
        text = text.replace(json.dumps(str(old))[1:-1], json.dumps(str(new))[1:-1])
    return json.loads(text)


def _lower_onnx(program: Program, folder: Path, options: Lowering) -> Lowered:
    from sparsepass.export.targets.onnx import lower_onnx

    artifact = lower_onnx(program, folder, dtype=options.dtype, opset=options.opset, task=options.task)
    _save_companions(folder, options)
    return Lowered(
        dtype=artifact.dtype,
        expected_sparse=artifact.expected_sparse,
        notes=artifact.notes,
        details=artifact.to_dict(),
        artifact=artifact,
    )


def _save_companions(folder: Path, options: Lowering) -> None:
    for companion in (options.processor, options.tokenizer):
        if companion is not None:
            companion.save_pretrained(folder)


def _verify_onnx(program: Program, folder: Path, lowered: Lowered, options: Lowering) -> tuple[Check, ...]:
    from sparsepass.export.targets.onnx import verify_onnx

    del options
    found = verify_onnx(program, folder, lowered.artifact)
    broken = {file: said for file, said in found["files"].items() if said != "ok"}
    patterns, weights, outputs = found["pattern"], found["weights"], found["outputs"]
    cases, differing = outputs["cases"], weights["differing"]
    converted = f", after conversion to {lowered.dtype}" if weights["num_converted"] else ""
    worst = max((case.get("max_relative", float("inf")) for case in cases), default=0.0)
    # A bfloat16 file cannot be run here at all; whatever else kept it from running is a failure.
    not_run = None if lowered.dtype == "bfloat16" else False
    rounding = ", beyond that only what is shown to be rounding" if worst > outputs["tolerance"] else ""
    ran = f"{len(cases)} cases in onnxruntime, largest relative error {worst:.2g} (allowed {outputs['tolerance']:g}{rounding})"
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
            summary="; ".join(_pattern_summary(file, one) for file, one in patterns.items()),
            details=patterns,
        ),
        Check(
            name="weights",
            held=not differing,
            summary=f"{len(differing)} stored weights are not the program's: {', '.join(differing[:5])}"
            if differing
            else f"{weights['num_checked']} stored weights are bit for bit the program's{converted}",
            details=weights,
        ),
        Check(
            name="outputs",
            held=all(case["holds"] for case in cases) if cases else not_run,
            summary=str(outputs["not_run"]) if outputs["not_run"] else ran,
            details=outputs,
        ),
    )


def _pattern_summary(file: str, found: Mapping[str, Any]) -> str:
    if not found["conforms"]:
        return str(found["summary"])
    return f"{file}: the {found['num_sparse']} weights that have to be sparse are, along the axis that is summed over"


def _lower_hf(program: Program, folder: Path, options: Lowering) -> Lowered:
    from sparsepass.export.targets.hf import lower_hf

    artifact = lower_hf(program, folder, dtype=options.dtype, tokenizer=options.tokenizer, processor=options.processor)
    notes = [f"loaded by {artifact.auto_class}.from_pretrained"]
    if artifact.adapter is not None:
        notes.append(f"the SLoRB branches of {artifact.num_branches} layers are the PEFT adapter in {artifact.adapter.name}/")
    return Lowered(
        dtype=artifact.dtype,
        expected_sparse={"": artifact.expected_sparse},
        axes={"": artifact.axes},
        notes=tuple(notes),
        details=artifact.to_dict(),
        artifact=artifact,
    )


def _verify_hf(program: Program, folder: Path, lowered: Lowered, options: Lowering) -> tuple[Check, ...]:
    from sparsepass.export.targets.hf import verify_hf

    del lowered, options
    found = verify_hf(program, folder)
    pattern, weights, outputs = found["pattern"], found["weights"], found["outputs"]
    wrong = [failure for failure in found["failures"] if failure.startswith("the loaded weight")]
    rest = [failure for failure in found["failures"] if failure not in wrong and not failure.startswith("the N:M pattern")]
    by = f", adapter read by {found['adapter_read_by']}" if found["adapter_read_by"] else ""
    return (
        Check(
            name="pattern",
            held=pattern["conforms"],
            summary=_pattern_summary("files", pattern | {"num_sparse": pattern["num_checked"]}),
            details=pattern,
        ),
        Check(
            name="weights",
            held=not wrong,
            summary="; ".join(wrong[:5]) or f"{weights['num_equal']} loaded weights are bit for bit the program's",
            details=weights,
        ),
        Check(
            name="outputs",
            held=not rest,
            summary="; ".join(rest)
            or f"loaded by {found['loaded_by']}{by}: relative error {outputs['relative_error']:.2g} (allowed "
            f"{outputs['tolerance']:g})",
            details={**outputs, "versions": found["versions"]},
        ),
    )


def _lower_tensorrt(program: Program, folder: Path, options: Lowering) -> Lowered:
    from sparsepass.export.targets.tensorrt import lower_tensorrt

    artifact = lower_tensorrt(
        program, folder, options=options.engine, dtype=options.dtype, opset=options.opset, task=options.task
    )
    _save_companions(folder, options)
    return Lowered(
        dtype=artifact.onnx.dtype,
        expected_sparse=artifact.onnx.expected_sparse,
        notes=artifact.notes,
        details=artifact.onnx.to_dict(),
        artifact=artifact,
        sections={"sparsity": artifact.section()},
    )


def _verify_tensorrt(program: Program, folder: Path, lowered: Lowered, options: Lowering) -> tuple[Check, ...]:
    from sparsepass.export.targets.tensorrt import verify_engines

    graphs = _verify_onnx(program, folder, replace(lowered, artifact=lowered.artifact.onnx), options)
    found = verify_engines(program, folder, lowered.artifact)
    return (*graphs, *(Check(**check) for check in found))


def _lower_torch(program: Program, folder: Path, options: Lowering) -> Lowered:
    from sparsepass.export.targets.torch import write_torch

    artifact = write_torch(
        program,
        folder,
        options=options.semi_structured,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        processor=options.processor,
    )
    return Lowered(
        dtype=artifact.hf.dtype,
        expected_sparse={"": artifact.hf.expected_sparse},
        axes={"": artifact.hf.axes},
        notes=artifact.notes,
        details=artifact.to_dict(),
        artifact=artifact,
        sections={"sparsity": artifact.section()},
    )


def _verify_torch(program: Program, folder: Path, lowered: Lowered, options: Lowering) -> tuple[Check, ...]:
    from sparsepass.export.targets.torch import verify_torch

    found = verify_torch(program, folder, lowered.artifact)
    return (*_verify_hf(program, folder, lowered, options), *(Check(**check) for check in found))


TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        Target(
            name="onnx",
            description="ONNX for onnxruntime, TensorRT and others, with a key-value cache where the model generates",
            lower=_lower_onnx,
            verify=_verify_onnx,
            options=frozenset({"dtype", "opset", "task"}),
        ),
        Target(
            name="hf",
            description="a folder that plain transformers loads; SLoRB beside it as a PEFT LoRA adapter",
            lower=_lower_hf,
            verify=_verify_hf,
            options=frozenset({"dtype"}),
        ),
        Target(
            name="tensorrt",
            description="TensorRT engines with sparse weights, and for each layer whether they were used",
            lower=_lower_tensorrt,
            verify=_verify_tensorrt,
            options=frozenset({"dtype", "opset", "task", "engine"}),
        ),
        Target(
            name="torch",
            description="a Hugging Face folder whose layers torch's 2:4 kernels run, where that is measured to be faster",
            lower=_lower_torch,
            verify=_verify_torch,
            options=frozenset({"dtype", "semi_structured"}),
        ),
    )
}
"""Name -> target. A new target is one file, one row here, one test file."""
