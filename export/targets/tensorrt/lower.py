"""The tensorrt target: engines with sparse weights, and for each layer what is known of whether they were used.

1. The program is lowered to ONNX first; the graph stays beside the engines, and the pattern is proved in it.
2. Precision is the model's: networks are strongly typed. Only 2:4 and GPUs from Ampere on are taken.
3. A model that generates becomes two engines, for prefill and decode, or one with two profiles.
4. Each engine is built in a child process. What its log says is kept beside it.
5. tensorrt, tensorrt-rtx and torch-tensorrt build; for onnxruntime's provider, a session configuration is written.
"""

import gzip
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from sparsepass.export.pattern import check_pattern
from sparsepass.export.targets.evidence import LayerEvidence, check_two_four
from sparsepass.export.targets.onnx import OnnxArtifact, lower_onnx
from sparsepass.export.targets.tensorrt.artifact import Engine, TensorrtArtifact
from sparsepass.export.targets.tensorrt.build import BuildRequest, Built, build_engine
from sparsepass.export.targets.tensorrt.evidence import Observed, gather
from sparsepass.export.targets.tensorrt.graph import surroundings
from sparsepass.export.targets.tensorrt.log import SparsityLog, parse_inspection, parse_log
from sparsepass.export.targets.tensorrt.measure import measure
from sparsepass.export.targets.tensorrt.options import EngineTarget, check_sm
from sparsepass.export.targets.tensorrt.packages import RUNTIMES, Gpu, Installed, abilities, choose, gpus
from sparsepass.export.targets.tensorrt.profiles import EnginePlan, plan_engines, shapes
from sparsepass.export.targets.tensorrt.session import CONFIGURATION_FILE, session_configuration
from sparsepass.export.targets.tensorrt.through_torch import build_torch_engine
from sparsepass.export.targets.tensorrt.verify import engine_files, why_not_run
from sparsepass.graph.load import parse_dtype
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

ENGINES_FILE: Final = "engines.json"
AHEAD_OF_TIME: Final = (80, 86, 89, 120)
"""What tensorrt-rtx builds for where no GPU is and none is named."""


def lower_tensorrt(
    program: Program,
    folder: str | Path,
    options: EngineTarget,
) -> TensorrtArtifact:
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
    check_patterns(program)
    here = gpus()
    installed = choose(options.runtime, here)
    targets = resolve_targets(options, installed, here)
    task = _plain_task(options.task) if installed.runtime.name == "torch-tensorrt" else options.task
    artifact = lower_onnx(program, out, dtype=options.dtype, opset=options.opset, task=task)
    examples = {name: tuple(tensor.shape) for name, tensor in program.example_inputs.items()}
    plans = plan_engines(artifact, options, config=program.origin.config, examples=examples)
    engines: list[Engine] = []
    layers: list[LayerEvidence] = []
    notes = [*artifact.notes, *_notes(installed, artifact, here)]
    version = installed.version
    for plan in plans:
        log = out / f"{plan.name}.log"
        built = _build(program, artifact, plan, out, log, options, installed, targets, inspect=bool(here))
        version = built.version
        if built.inspection is not None and "error" in built.inspection:
            notes.append(f"the engine inspector could not read {plan.name}.engine: {built.inspection['error']}")
        with log.open(encoding="utf-8", errors="replace") as lines:
            told = parse_log(lines)
        _compress(log)
        engines.append(_engine(plan, built, told, options, targets or tuple(gpu.sm for gpu in here[:1])))
        layers += _evidence(out, artifact, plan, built, told, options, installed, on_gpu=bool(here))
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
            written = replace(written, measured=_measure(program, plans, out, written, options, installed, targets))
        except (SparsepassError, torch.OutOfMemoryError) as error:  # the engines stand, and are not lost for want of times
            written = replace(written, notes=(*written.notes, f"dense and sparse engines were not timed: {error}"))
    _write_json(out / ENGINES_FILE, {"runtime": written.runtime, "engines": [engine.to_dict() for engine in engines]})
    _write_json(out / CONFIGURATION_FILE, session_configuration(plans, dtype=artifact.dtype, sparse=options.sparse))
    return written


def check_patterns(program: Program) -> None:
    """Refuse patterns that sparse tensor cores do not know.

    Raises:
        SparsepassError: If a weight has another pattern than 2:4.
    """
    check_two_four({name: str(state.pattern) for name, state in program.sparse.items()}, "TensorRT", "use the onnx target")


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


def _build(
    program: Program,
    artifact: OnnxArtifact,
    plan: EnginePlan,
    out: Path,
    log: Path,
    options: EngineTarget,
    installed: Installed,
    targets: tuple[int, ...],
    *,
    inspect: bool,
) -> Built:
    engine = out / f"{plan.name}.engine"
    if installed.runtime.name == "torch-tensorrt":
        return build_torch_engine(program, plan, engine, log, options, parse_dtype(artifact.dtype))
    request = BuildRequest(
        module=installed.module,
        onnx=out / plan.graph.file,
        engine=engine,
        log=log,
        profiles=tuple(shapes(plan.graph, profile) for profile in plan.profiles),
        capabilities=targets,
        sparse=options.sparse,
        hardware_compatible=options.hardware_compatible,
        timing_cache=options.timing_cache,
        inspect=inspect,
    )
    return build_engine(request, timeout_s=options.timeout_s)


def _measure(
    program: Program,
    plans: tuple[EnginePlan, ...],
    out: Path,
    written: TensorrtArtifact,
    options: EngineTarget,
    installed: Installed,
    targets: tuple[int, ...],
) -> dict[str, Any]:
    """Build each engine again without the flag, beside the folder, and time both."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="sparsepass-dense-") as folder:
        place = Path(folder)
        for graph in {plan.graph.file for plan in plans}:
            for path in out.glob(f"{graph}*"):
                (place / path.name).symlink_to(path.absolute())
        for plan in plans:
            log = place / f"{plan.name}.log"
            _build(program, written.onnx, plan, place, log, replace(options, sparse=False), installed, targets, inspect=False)
            # One pair at a time: all engines of a large model together do not fit the GPU's memory.
            pair = replace(written, engines=tuple(engine for engine in written.engines if engine.name == plan.name))
            dense, sparse = engine_files(place, pair), engine_files(out, pair)
            for profile in plan.profiles:
                found[profile.name] = measure(plan.graph, profile, dense[profile.name].time_ms, sparse[profile.name].time_ms)
            del dense, sparse
            (place / f"{plan.name}.engine").unlink()
    return found


def _engine(plan: EnginePlan, built: Built, told: SparsityLog, options: EngineTarget, targets: tuple[int, ...]) -> Engine:
    return Engine(
        name=plan.name,
        file=f"{plan.name}.engine",
        log=f"{plan.name}.log.gz",
        graph=plan.graph.file,
        profiles={profile.name: dict(profile.ranges) for profile in plan.profiles},
        targets=targets,
        size_bytes=built.size_bytes,
        num_layers=built.num_layers,
        seconds=round(built.seconds, 2),
        flag_requested=options.sparse,
        num_eligible=None if told.eligible is None else told.eligible.count,
        num_chosen=None if told.chosen is None else told.chosen.count,
    )


def _evidence(
    out: Path,
    artifact: OnnxArtifact,
    plan: EnginePlan,
    built: Built,
    told: SparsityLog,
    options: EngineTarget,
    installed: Installed,
    *,
    on_gpu: bool,
) -> tuple[LayerEvidence, ...]:
    path = out / plan.graph.file
    report = check_pattern(path, expected_sparse=artifact.expected_sparse[plan.graph.file])
    seen = Observed(
        engine=plan.name,
        runtime=installed.runtime.name,
        sparse=options.sparse,
        on_gpu=on_gpu,
        log=told,
        inspected=parse_inspection(built.inspection, told.nodes),
    )
    return gather(report.entries, surroundings(path), seen)


def _notes(installed: Installed, artifact: OnnxArtifact, here: tuple[Gpu, ...]) -> tuple[str, ...]:
    notes = []
    if artifact.dtype == "float32":
        notes.append("float32 has no sparse kernels for 2:4: the engines run dense; export with --dtype float16 or bfloat16")
    if installed.runtime.name == "tensorrt-rtx":
        notes.append(
            "tensorrt-rtx takes the sparsity flag and picks its kernels when an engine is loaded; that its engines "
            f"run sparse is not shown by this build; {RUNTIMES['tensorrt'].install} on a GPU times sparse tactics and reports"
        )
    if not here:
        notes.append(abilities(here))
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
