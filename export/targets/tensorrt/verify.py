"""Proving engines: that they stand, on a GPU that they compute what the program computes, and what is known of sparsity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsepass.export.targets.contract import Check
from sparsepass.export.targets.tensorrt.artifact import TensorrtArtifact
from sparsepass.export.targets.tensorrt.engines import DecoderEngines, EngineFile
from sparsepass.export.targets.tensorrt.packages import find
from sparsepass.graph.equivalence import Artifact, compare
from sparsepass.graph.program import Program
from sparsepass.graph.support import EquivalenceError


def verify_engines(program: Program, folder: Path, artifact: TensorrtArtifact) -> tuple[Check, ...]:
    """Check what `lower_tensorrt` wrote.

    Returns:
        The checks ``engines``, ``engine outputs`` and ``sparse kernels``.
    """
    return (_files(folder, artifact), _outputs(program, folder, artifact), _sparsity(artifact))


def engine_files(folder: Path, artifact: TensorrtArtifact) -> dict[str, EngineFile]:
    """Open each engine on the GPU: profile -> engine.

    Raises:
        EquivalenceError: If there is no GPU, or an engine cannot be loaded.
    """
    name = "tensorrt" if artifact.runtime == "torch-tensorrt" else artifact.runtime
    installed = find(name)
    module = installed.module if installed is not None else "tensorrt"
    opened: dict[str, EngineFile] = {}
    for engine in artifact.engines:
        file = EngineFile(folder / engine.file, folder / engine.graph, module)
        opened |= dict.fromkeys(engine.profiles, file)
    return opened


def _files(folder: Path, artifact: TensorrtArtifact) -> Check:
    sizes = {
        engine.file: (folder / engine.file).stat().st_size for engine in artifact.engines if (folder / engine.file).is_file()
    }
    wrong = [engine.file for engine in artifact.engines if sizes.get(engine.file) != engine.size_bytes]
    stand = ", ".join(f"{file} {size / 1e6:.1f} MB" for file, size in sizes.items())
    said = f"missing or cut off: {', '.join(wrong)}" if wrong else f"{len(sizes)} whole as the builder made them: {stand}"
    return Check(name="engines", held=bool(sizes) and not wrong, summary=said, details=sizes)


def _outputs(program: Program, folder: Path, artifact: TensorrtArtifact) -> Check:
    def check(held: bool | None, summary: str, details: Mapping[str, Any] | None = None) -> Check:
        return Check(name="engine outputs", held=held, summary=summary, details=details or {})

    if reason := why_not_run(artifact):
        return check(None, f"not run: {reason}")
    if any(engine.name == "encoder" for engine in artifact.engines):
        return check(None, "engines of an encoder and its decoder are not run as one; compare each by itself")
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    try:
        opened = engine_files(folder, artifact)
        candidate: Artifact = opened["model"] if "model" in opened else DecoderEngines(opened["prefill"], opened["decode"])
        found = compare(program, candidate, inputs, layers=False)
    except torch.OutOfMemoryError as error:
        return check(None, f"not run: {artifact.gpus[0].name} has too little free memory ({error})")
    except EquivalenceError as error:  # an engine that does not run is a check that fails, and no reason to lose the engines
        return check(False, f"on {artifact.gpus[0].name}: {error}")
    failed = found.failures()
    said = "; ".join(failed) or f"relative error {found.relative_error:.2g} (allowed {found.tolerance:g})"
    return check(not failed, f"on {artifact.gpus[0].name}: {said}", found.to_dict())


def why_not_run(artifact: TensorrtArtifact) -> str:
    """Why engines cannot be run here; empty if they can."""
    if not artifact.gpus:
        return "no GPU here; the ONNX file that they were built from was run, see above"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of torch to run engines"
    if not all(artifact.gpus[0].sm in engine.targets for engine in artifact.engines):
        return f"built for other GPUs than {artifact.gpus[0].name} (SM{artifact.gpus[0].sm})"
    return ""


def _sparsity(artifact: TensorrtArtifact) -> Check:
    """What is known of sparse kernels. None chosen is no fault of the files, so this holds or stays open."""
    meant = [layer for layer in artifact.layers if layer.conforms != "unknown"]
    number = {known: sum(layer.ran_sparse == known for layer in meant) for known in ("yes", "no", "unknown")}
    told = f"of {len(meant)} uses of sparse weights in all engines, {number['yes']} run sparse, {number['no']} do not"
    reasons = {layer.reason for layer in meant if layer.ran_sparse == "unknown"}
    unknown = f", and {number['unknown']} are unknown ({'; '.join(sorted(reasons))})" if number["unknown"] else ""
    return Check(name="sparse kernels", held=True if number["yes"] else None, summary=told + unknown, details=number)
