"""`export`: a model or program through lowering and verification."""

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsepass.export.report import (
    ArtifactSection,
    CheckEntry,
    SamplesSection,
    TensorEntry,
    VerificationSection,
    plain_json,
    run_record,
    write_report,
)
from sparsepass.export.stages.news import listen
from sparsepass.export.stages.preparing import Prepared, prepare
from sparsepass.export.stages.settings import Calibration, Evaluation, ModelSource, inputs_of
from sparsepass.export.targets import (
    LoweringContext,
    SemiStructured,
    State,
    Target,
    TensorRT,
    parse_target,
    state_of,
    target_to_text,
)
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.load import LoadedModel
from sparsepass.graph.support import check_free, find_device, load_tensors, one_at_a_time, replaced_folder
from sparsepass.passes import Pass, parse_pipeline

_LOG = logging.getLogger(__name__)

SAMPLES_FILE: Final = "samples/samples.safetensors"
"""In a folder of its own: loaders that read every safetensors file beside config.json would take it for weights."""

_HELD: Final = {"held": True, "did_not_hold": False, "not_checked": None}


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        folder: Where it stands.
        held: Whether everything was checked, and held.
        state: What verification came to: ``held``, ``did_not_hold``, or ``not_checked`` (something could not be compared here,
            or verification was switched off).
        report: The content of report.json.
        program: The program that was written.
    """

    folder: Path
    held: bool
    report: Mapping[str, Any] = field(repr=False)
    program: Program = field(repr=False)
    state: State = "not_checked"

    @property
    def unchecked(self) -> tuple[str, ...]:
        """One line for each check that decides and could not be made here."""
        checks = self.report["verification"]["checks"]
        return tuple(f"{check['name']}: {check['summary']}" for check in checks if check["held"] is None and check["decides"])

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each check that did not hold."""
        checks = self.report["verification"]["checks"]
        return tuple(f"{check['name']}: {check['summary']}" for check in checks if check["held"] is False)


class OldKeywords(TypedDict, total=False):
    """Keywords of `export` from before targets had options of their own. They are taken, with a warning."""

    dtype: "torch.dtype | str | None"
    opset: int | None
    task: str | None
    engine: TensorRT | None
    semi_structured: SemiStructured | None
    tell: Callable[[str], None]


OLD_GROUPS: Final = {"engine": TensorRT.name, "semi_structured": SemiStructured.name}
"""Old name of the options of one target -> the target. Recipes may use it, too."""


@one_at_a_time
def export(
    model: "Program | nn.Module | LoadedModel | ModelSource | str | Path",
    target: str | Target,
    out: str | Path,
    *,
    passes: "str | Pass | Iterable[str | Pass] | None" = None,
    calibration: Any = None,
    evaluation: Evaluation | None = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    force: bool = False,
    verify: bool = True,
    validate: bool = True,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    sections: Mapping[str, Any] | None = None,
    command: str | None = None,
    **old: Unpack[OldKeywords],
) -> ExportResult:
    """Rewrite a model, write it in a target's form, open what was written, and verify it.

    Beside the artifact stand recipe.txt (the passes as text), samples/samples.safetensors (inputs, and the outputs that
    the program gives for them), report.json and report.md. The folder is moved into place when everything is written;
    if verification does not hold it is written all the same, and the report says what differs.

    Args:
        model: A program, a model in memory, or the name of one: what `load_model` takes, or a `ModelSource`.
        target: A target with its options, as an object or as text: ``Onnx(opset=18)`` or ``onnx{opset=18}``.
        out: Folder to write.
        passes: What to apply first; see `apply_passes`. None applies nothing.
        calibration: Data for the passes, or a `Calibration` with its settings.
        evaluation: If given, perplexity is measured before and after, for the report.
        tokenizer: Goes into the folder, and turns calibration and evaluation text into tokens; by default the
            model's own.
        example_inputs: What to capture a model with that is no transformers model.
        force: Whether a folder that is not empty is replaced, if this library wrote it.
        verify: Whether to verify what was written.
        validate: Whether each pass is validated; see `apply_passes`.
        progress: Whether to show progress; by default where standard error is a terminal.
        device: Where passes and perplexity are computed, see `prepare`; what is written is verified on the processor, or by the
            target's own GPU.
        gguf_file: See `load_model`.
        revision: See `load_model`.
        trust_remote_code: See `load_model`.
        sections: Sections of the report that an earlier stage knows, such as ``accuracy``.
        command: The command line, for the report.
        old: Options that belong to the target now: ``dtype``, ``opset``, ``task``, ``engine``, ``semi_structured``; and
            ``tell``, which is called with each line of news that goes to the log now.

    Returns:
        Where it is, what verification came to, and the report.

    Raises:
        SparsepassError: If something cannot be read, rewritten, lowered or written; nothing is written then.

    Example:
        >>> export("SmolLM2-135M-Instruct", "onnx", "out", passes="nm_sparsify").held  # doctest: +SKIP
        True
    """
    chosen = parse_target(target)
    if unknown := old.keys() - OldKeywords.__annotations__.keys():
        raise TypeError(f"export() got an unexpected keyword argument {min(unknown)!r}")
    tell = old.pop("tell", None)
    if tell is not None:
        warnings.warn(
            "export(tell=...): news goes to the log now, to the logger sparsepass.export at level INFO",
            DeprecationWarning,
            stacklevel=2,
        )
    if old:
        chosen = with_options(chosen, old)
        warnings.warn(
            f"{', '.join(old)}: options of a target are given to the target now, as in export(model, "
            f"{target_to_text(chosen)!r}, ...) or export(model, {type(chosen).__name__}(...), ...)",
            DeprecationWarning,
            stacklevel=2,
        )
    pipeline = parse_pipeline(passes) if passes else None
    if device is not None:
        find_device(device)
    if isinstance(model, str | Path):
        model = ModelSource(source=str(model))
    calibration = calibration if isinstance(calibration, Calibration) else Calibration(data=calibration)
    check_free(out, force=force, inputs=inputs_of(model, calibration, evaluation, pipeline, chosen))
    chosen.check_passes(pipeline or ())
    chosen.check_here()
    if isinstance(model, ModelSource):
        model = replace(
            model,
            task=model.task or chosen.model_task,
            gguf_file=gguf_file or model.gguf_file,
            revision=revision or model.revision,
            trust_remote_code=trust_remote_code or model.trust_remote_code,
        )
    with nullcontext() if tell is None else listen(tell):
        prepared = prepare(
            model,
            passes=pipeline,
            calibration=calibration,
            evaluation=evaluation,
            tokenizer=tokenizer,
            example_inputs=example_inputs,
            validate=validate,
            progress=progress,
            device=device,
        )
        prepared.document.update(sections or {})
        return _write(prepared, chosen, Path(out), force=force, verify=verify, command=command)


def with_options(target: Target, options: Mapping[str, Any]) -> Target:
    """A target with some of its options set.

    Args:
        target: The target.
        options: Option -> value, None to leave it as it is. The names in `OLD_GROUPS` stand for a target that holds several.

    Raises:
        SparsepassError: If the target has no such option, or a value cannot be used.

    Example:
        >>> from sparsepass.export.targets import Onnx
        >>> with_options(Onnx(), {"opset": 18, "task": None}).opset
        18
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in OLD_GROUPS and isinstance(value, Target) and target.name == OLD_GROUPS[name]:
            found |= {each.name: given for each in fields(value) if (given := getattr(value, each.name)) != each.default}
        elif value is not None:
            refuse_option(target, name)
            found[name] = value
    return replace(target, **found)


def refuse_option(target: "Target | type[Target]", name: str) -> None:
    """Raise unless the target has an option.

    Raises:
        SparsepassError: If it has none of that name.
    """
    if name not in target.options():
        raise SparsepassError(f"the target {target.name} has no option {name}; leave it out, or choose another target")


def _write(prepared: Prepared, target: Target, out: Path, *, force: bool, verify: bool, command: str | None) -> ExportResult:
    program = prepared.program
    context = LoweringContext(
        tokenizer=prepared.loaded.tokenizer, processor=prepared.loaded.processor, source=prepared.loaded.folder
    )
    with replaced_folder(out, force=force, inputs=(*prepared.inputs, *inputs_of(target))) as staging:
        _LOG.info("writing %s", target.name)
        lowered = target.lower(program, staging, context)
        files = {str(path.relative_to(staging)): path.stat().st_size for path in sorted(staging.rglob("*")) if path.is_file()}
        if verify:
            _LOG.info("opening what was written, and comparing it with the program")
        checks = target.verify(program, staging, lowered, context) if verify else ()
        state = state_of(checks)
        artifact = ArtifactSection(
            target=target.name,
            dtype=lowered.dtype,
            files=files,
            size_bytes=sum(files.values()),
            expected_sparse={file: dict(weights) for file, weights in lowered.expected_sparse.items()},
            axes={file: dict(axes) for file, axes in lowered.axes.items()},
            notes=list(lowered.notes),
            details=dict(lowered.details),
        )
        found = [CheckEntry(**(vars(check) | {"details": dict(check.details)})) for check in checks]
        document = prepared.document | dict(lowered.sections)
        document["artifact"] = artifact
        document["verification"] = VerificationSection(state=state, held=_HELD[state], checks=found)
        document["samples"] = write_samples(program, staging / SAMPLES_FILE)
        seconds = time.perf_counter() - prepared.started
        document["runs"] = [*document["runs"], run_record("export", command=command, seconds=seconds)]
        written = write_report(staging, _moved(plain_json(document), staging, out))
    return ExportResult(folder=out, held=state == "held", state=state, report=written, program=program)


@torch.no_grad()
def write_samples(program: Program, path: Path) -> SamplesSection:
    """Write the program's example inputs, and the outputs it gives for them, to a safetensors file.

    Returns:
        Names, shapes and types, for the report.
    """
    inputs = program.flat_inputs(**program.example_inputs)
    outputs = dict(zip(program.output_names, program.run(inputs), strict=True))
    plain = {
        kind: {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if isinstance(t, Tensor)}
        for kind, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({f"{kind}/{name}": t for kind, found in plain.items() for name, t in found.items()}, path)
    described = {
        kind: {name: TensorEntry(shape=list(t.shape), dtype=str(t.dtype).removeprefix("torch.")) for name, t in found.items()}
        for kind, found in plain.items()
    }
    return SamplesSection(file=SAMPLES_FILE, inputs=described["inputs"], outputs=described["outputs"])


def read_samples(path: str | Path) -> dict[str, Tensor]:
    """Read the inputs of a samples file: name -> tensor.

    Raises:
        SparsepassError: If it cannot be read.
    """
    tensors = load_tensors(Path(path), advice="check the path")
    marked = {name.removeprefix("inputs/"): t for name, t in tensors.items() if name.startswith("inputs/")}
    return marked or {name: t for name, t in tensors.items() if not name.startswith("outputs/")}


def _moved(document: Any, staging: Path, out: Path) -> Any:
    """Name the final folder wherever the document names the one it was written in."""
    text = json.dumps(document)
    for old, new in ((staging, out), (staging.resolve(), out.resolve())):
        text = text.replace(json.dumps(str(old))[1:-1], json.dumps(str(new))[1:-1])
    return json.loads(text)
