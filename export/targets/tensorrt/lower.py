"""The tensorrt target: engines with sparse weights, and for each layer what is known of whether they were used.

1. The program is lowered to ONNX first; the graph stays beside the engines, and the pattern is proved in it.
2. Precision is the model's: networks are strongly typed. Only 2:4 and GPUs from Ampere on are taken.
3. A model that generates becomes two engines, for prefill and decode, or one with two profiles.
4. Each engine is built in a child process. What its log says is kept beside it.
5. tensorrt, tensorrt-rtx and torch-tensorrt build; for onnxruntime's provider, a session configuration is written.
6. Quantized weights are integers in the graph, where TensorRT takes their grid; any other is refused.
"""

import gzip
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets.evidence import LayerEvidence, check_two_four
from sparsepass.export.targets.onnx import Form, OnnxArtifact, lower_onnx
from sparsepass.export.targets.tensorrt.build import BuildRequest, Built, build_engine, build_torch_engine
from sparsepass.export.targets.tensorrt.evidence import Observed, gather, surroundings
from sparsepass.export.targets.tensorrt.grids import check_grids
from sparsepass.export.targets.tensorrt.log import SparsityLog, parse_inspection, parse_log
from sparsepass.export.targets.tensorrt.options import EngineTarget, check_sm
from sparsepass.export.targets.tensorrt.packages import RUNTIMES, Gpu, Installed, abilities, choose, gpus
from sparsepass.export.targets.tensorrt.profiles import EnginePlan, measure, plan_engines, shapes
from sparsepass.export.targets.tensorrt.session import CONFIGURATION_FILE, session_configuration
from sparsepass.export.targets.tensorrt.verify import Engine, TensorrtArtifact, engine_files, why_not_run
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

ENGINES_FILE: Final = "engines.json"
AHEAD_OF_TIME: Final = (80, 86, 89, 120)
"""What tensorrt-rtx builds for where no GPU is and none is named."""


@final
@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """What all engines of one export are built from.

    Attributes:
        program: The program.
        onnx: Its graphs.
        out: Folder of the graphs and the engines.
        options: How the engines are built.
        installed: What builds them.
        targets: Compute capabilities that the builder is told; empty to build for the GPU that is there.
        here: GPUs of this machine.
    """

    program: Program
    onnx: OnnxArtifact
    out: Path
    options: EngineTarget
    installed: Installed
    targets: tuple[int, ...]
    here: tuple[Gpu, ...]

    def build(self, plan: EnginePlan, *, inspect: bool = False) -> Built:
        """Build an engine into the folder; its log lies beside it."""
        engine, log = self.out / f"{plan.name}.engine", self.out / f"{plan.name}.log"
        if self.installed.runtime.name == "torch-tensorrt":
            return build_torch_engine(self.program, plan, engine, log, self.options, parse_dtype(self.onnx.dtype))
        request = BuildRequest(
            module=self.installed.module,
            onnx=self.out / plan.graph.file,
            engine=engine,
            log=log,
            profiles=tuple(shapes(plan.graph, profile) for profile in plan.profiles),
            capabilities=self.targets,
            sparse=self.options.sparse,
            hardware_compatible=self.options.hardware_compatible,
            timing_cache=self.options.timing_cache,
            inspect=inspect,
        )
        return build_engine(request, timeout_s=self.options.timeout_s)

    def engine(self, plan: EnginePlan, built: Built, told: SparsityLog) -> Engine:
        """The record of a built engine."""
        return Engine(
            name=plan.name,
            file=f"{plan.name}.engine",
            log=f"{plan.name}.log.gz",
            graph=plan.graph.file,
            profiles={profile.name: dict(profile.ranges) for profile in plan.profiles},
            targets=self.targets or tuple(gpu.sm for gpu in self.here[:1]),
            size_bytes=built.size_bytes,
            num_layers=built.num_layers,
            seconds=round(built.seconds, 2),
            flag_requested=self.options.sparse,
            num_eligible=None if told.eligible is None else told.eligible.count,
            num_chosen=None if told.chosen is None else told.chosen.count,
        )

    def evidence(self, plan: EnginePlan, built: Built, told: SparsityLog) -> tuple[LayerEvidence, ...]:
        """What is known of each weight in a built engine."""
        path = self.out / plan.graph.file
        report = check_pattern(path, expected_sparse=self.onnx.expected_sparse[plan.graph.file])
        seen = Observed(
            engine=plan.name,
            runtime=self.installed.runtime.name,
            sparse=self.options.sparse,
            on_gpu=bool(self.here),
            log=told,
            inspected=parse_inspection(built.inspection, told.nodes),
        )
        return gather(report.entries, surroundings(path), seen)


def lower_tensorrt(program: Program, folder: str | Path, options: EngineTarget) -> TensorrtArtifact:
    """Write a program as ONNX, and build engines from it.

    Args:
        program: The program; it is not changed.
        folder: An existing folder, to write into.
        options: How the engines are built.

    Returns:
        What was written, and what is known of each layer.

    Raises:
        SparsepassError: If no package can build here, a target or pattern has no sparse kernels, the program cannot be
            lowered, or an engine cannot be built.

    Example:
        >>> from sparsepass.export.targets import TensorRT
        >>> options = TensorRT(runtime="tensorrt-rtx", sm=(86,), dtype="float16")
        >>> lower_tensorrt(program, "out", options).engines  # doctest: +SKIP
    """
    out = Path(folder)
    if options.timing_cache is not None:
        options = replace(options, timing_cache=options.timing_cache.absolute())
    check_two_four(program, "TensorRT", "use the onnx target")
    here = gpus()
    installed = choose(options.runtime, here)
    targets = resolve_targets(options, installed, here)
    task = _plain_task(options.task) if installed.runtime.name == "torch-tensorrt" else options.task
    form: Form = "dense" if options.form == "dense" or installed.runtime.name == "torch-tensorrt" else "qdq"
    if form == "qdq":
        check_grids(program, targets or tuple(gpu.sm for gpu in here))
    artifact = lower_onnx(program, out, dtype=options.dtype, opset=options.opset, task=task, form=form)
    examples = {name: tuple(tensor.shape) for name, tensor in program.example_inputs.items()}
    plans = plan_engines(artifact, options, config=program.origin.config, examples=examples, limits=program.limits)
    engines: list[Engine] = []
    layers: list[LayerEvidence] = []
    notes = [*artifact.notes, *_notes(program, installed, artifact, here)]
    version = installed.version
    job = EngineJob(program=program, onnx=artifact, out=out, options=options, installed=installed, targets=targets, here=here)
    for plan in plans:
        built = job.build(plan, inspect=bool(here))
        version = built.version
        if built.inspection is not None and "error" in built.inspection:
            notes.append(f"the engine inspector could not read {plan.name}.engine: {built.inspection['error']}")
        log = out / f"{plan.name}.log"
        with log.open(encoding="utf-8", errors="replace") as lines:
            told = parse_log(lines)
        _compress(log)
        engines.append(job.engine(plan, built, told))
        layers += job.evidence(plan, built, told)
    written = TensorrtArtifact(
        onnx=artifact,
        runtime=installed.runtime.name,
        version=version,
        gpus=here,
        engines=tuple(engines),
        layers=tuple(layers),
        notes=tuple(notes),
    )
    if options.measure and options.sparse and not why_not_run(written):
        try:
            written = replace(written, measured=_measure(job, plans, written))
        except (SparsepassError, torch.OutOfMemoryError) as error:  # the engines stand, and are not lost for want of times
            written = replace(written, notes=(*written.notes, f"dense and sparse engines were not timed: {error}"))
    _write_json(out / ENGINES_FILE, {"runtime": written.runtime, "engines": [engine.to_dict() for engine in engines]})
    _write_json(out / CONFIGURATION_FILE, session_configuration(plans, dtype=artifact.dtype, sparse=options.sparse))
    return written


def resolve_targets(options: EngineTarget, installed: Installed, here: tuple[Gpu, ...]) -> tuple[int, ...]:
    """Say which compute capabilities the builder is told; empty to build for the GPU that is there.

    Raises:
        SparsepassError: If the package cannot build for what was asked, or the GPU is older than Ampere.
    """
    name = installed.runtime.name
    if name == "tensorrt-rtx":
        if options.sm or not here:
            return options.sm or AHEAD_OF_TIME
        check_sm(here[0].sm)
        return (here[0].sm,)
    check_sm(here[0].sm)
    if other := [number for number in options.sm if number != here[0].sm]:
        raise SparsepassError(
            f"{name} builds for the GPU it runs on, {here[0].name} (SM{here[0].sm}), and --sm asks for SM{other[0]}; leave "
            "--sm out, add --hardware-compatible for an engine that runs on all GPUs from Ampere on, or --runtime tensorrt-rtx"
        )
    return ()


def _measure(job: EngineJob, plans: tuple[EnginePlan, ...], written: TensorrtArtifact) -> dict[str, Any]:
    """Build each engine again without the flag, beside the folder, and time both."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="sparsepass-dense-") as folder:
        place = Path(folder)
        without = replace(job, out=place, options=replace(job.options, sparse=False))
        for graph in {plan.graph.file for plan in plans}:
            for path in job.out.glob(f"{graph}*"):
                (place / path.name).symlink_to(path.absolute())
        for plan in plans:
            without.build(plan)
            # One pair at a time: all engines of a large model together do not fit the GPU's memory.
            pair = replace(written, engines=tuple(engine for engine in written.engines if engine.name == plan.name))
            dense, sparse = engine_files(place, pair), engine_files(job.out, pair)
            for profile in plan.profiles:
                found[profile.name] = measure(plan.graph, profile, dense[profile.name].time_ms, sparse[profile.name].time_ms)
            del dense, sparse
            (place / f"{plan.name}.engine").unlink()
    return found


def _notes(program: Program, installed: Installed, artifact: OnnxArtifact, here: tuple[Gpu, ...]) -> tuple[str, ...]:
    notes = []
    if program.quantized and installed.runtime.name == "torch-tensorrt":
        notes.append(
            "torch-tensorrt builds from the program's own graph, in which it knows no rounding: quantized weights are "
            "floating-point values on their grids, there and in the ONNX file"
        )
    if artifact.dtype == "float32":
        notes.append("float32 has no sparse kernels for 2:4: the engines run dense; export with --dtype float16 or bfloat16")
    if installed.runtime.name == "tensorrt-rtx":
        notes.append(
            "tensorrt-rtx takes the sparsity flag and picks its kernels when an engine is loaded; that its engines "
            f"run sparse is not shown by this build; {RUNTIMES['tensorrt'].install} on a GPU times sparse tactics and reports"
        )
    if not here:
        notes.append("\n".join(abilities(here)))
    return tuple(notes)


def _plain_task(task: str | None) -> str:
    """torch-tensorrt builds from the program's own graph, which has no cache, so the ONNX file beside it has none either."""
    if task is not None and task.endswith("-with-past"):
        raise SparsepassError(
            f"torch-tensorrt builds no graph with a cache, and --task {task} asks for one; name another --runtime"
        )
    return "forward"


def _compress(log: Path) -> None:
    with log.open("rb") as source, gzip.GzipFile(f"{log}.gz", "wb", mtime=0) as target:
        shutil.copyfileobj(source, target)
    log.unlink()


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
