"""Building engines in a child process: there is a time limit, and a native crash becomes an error message.

TensorRT builds from an ONNX file, torch-tensorrt from the program's own graph. torch-tensorrt needs a CUDA build of torch and
raises plain exceptions at import.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch

from sparsepass.export.targets.onnx import plain_program
from sparsepass.export.targets.tensorrt.options import EngineTarget
from sparsepass.export.targets.tensorrt.profiles import EnginePlan, Lengths, Shapes, shapes
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError, one_at_a_time

CHILD: Final = Path(__file__).with_name("child.py")
TORCH_CHILD: Final = Path(__file__).with_name("through_torch_child.py")
_NUM_LINES_SHOWN = 12
_TAIL_BYTES = 65536


class BuildError(SparsepassError):
    """An engine that cannot be built: refused, crashed, or not ready in time."""


@final
@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What one engine is built from.

    Attributes:
        module: Python module with the TensorRT API, such as ``tensorrt``.
        onnx: The graph.
        engine: Where the engine goes.
        log: Where the whole log goes.
        profiles: Optimization profiles, in order.
        capabilities: Compute capabilities to build for, as 86 for SM86; empty for the GPU that is there.
        sparse: Whether the builder may use sparse tactics.
        hardware_compatible: Whether the engine has to run on all GPUs from Ampere on.
        timing_cache: File that keeps measured times from build to build; None for none.
        inspect: Whether the engine is opened again and asked for its layers, which needs a GPU.
    """

    module: str
    onnx: Path
    engine: Path
    log: Path
    profiles: tuple[Shapes, ...]
    capabilities: tuple[int, ...] = ()
    sparse: bool = True
    hardware_compatible: bool = False
    timing_cache: Path | None = None
    inspect: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine that stands.

    Attributes:
        version: Version of the runtime.
        num_layers: Layers of the network that was read.
        size_bytes: Size of the engine.
        seconds: Time the builder took.
        inspection: What the engine inspector said; None if it was not asked.
    """

    version: str
    num_layers: int
    size_bytes: int
    seconds: float
    inspection: Mapping[str, Any] | None = field(default=None, repr=False)


def build_engine(request: BuildRequest, *, timeout_s: float) -> Built:
    """Build one engine in a child process.

    Args:
        request: What to build. The engine appears under its name only when it is whole.
        timeout_s: Seconds after which the child is ended.

    Raises:
        BuildError: If TensorRT refuses the graph, crashes or takes too long, with the log's last lines.
    """
    command = [sys.executable, "-P", str(CHILD)]
    return Built(**run_child(command, asdict(request), log=request.log, timeout_s=timeout_s, what=request.engine.name))


def build_torch_engine(
    program: Program, plan: EnginePlan, engine: Path, log: Path, options: EngineTarget, dtype: torch.dtype
) -> Built:
    """Build one engine with torch-tensorrt, in a child process: from the program's own graph, without ONNX in between.

    Precision comes from the program's dtype, so there is no list of precisions to give.

    Args:
        program: The program; it is not changed.
        plan: Profile of the engine; it has one.
        engine: Where the engine goes.
        log: Where the log goes.
        options: How it is built.
        dtype: Type of the weights and of the arithmetic.

    Raises:
        BuildError: If torch-tensorrt cannot be imported, refuses the graph, crashes or takes too long.
    """
    (profile,) = plan.profiles
    lengths = shapes(plan.graph, profile).shapes
    exported = engine.with_suffix(".pt2")
    try:
        plain = plain_program(program, dtype)
        torch.export.save(exported_program(plain, lengths), exported)
        request = {
            "program": exported,
            "engine": engine,
            "arguments": arguments(options),
            "inputs": [[name, lengths[name] if varying_axes(lengths.get(name)) else None] for name in plain.input_names],
        }
        command = [sys.executable, "-P", str(TORCH_CHILD)]
        return Built(**run_child(command, request, log=log, timeout_s=options.timeout_s, what=engine.name))
    finally:
        exported.unlink(missing_ok=True)


def arguments(options: EngineTarget) -> dict[str, Any]:
    """Keyword arguments for ``torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine``.

    Example:
        >>> from sparsepass.export.targets import TensorRT
        >>> arguments(TensorRT())["sparse_weights"]
        True
    """
    found: dict[str, Any] = {
        "sparse_weights": options.sparse,
        "hardware_compatible": options.hardware_compatible,
        "require_full_compilation": True,
        "disable_tf32": False,
    }
    if options.timing_cache is not None:
        found["timing_cache_path"] = str(options.timing_cache)
    return found


@one_at_a_time
def exported_program(program: Program, lengths: Mapping[str, Lengths]) -> torch.export.ExportedProgram:
    """Export a program's graph, with the axes that a profile lets vary.

    Args:
        program: The program; it is not changed.
        lengths: Input -> its smallest, most common and largest shape.

    Raises:
        SparsepassError: If torch cannot export it with these lengths.
    """
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    dynamic = tuple(dict.fromkeys(varying_axes(lengths.get(name)), torch.export.Dim.AUTO) for name in inputs)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(program.graph_module, tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises anything
        raise SparsepassError(f"the program cannot be exported for torch-tensorrt: {type(error).__name__}: {error}") from error


def varying_axes(lengths: Lengths | None) -> tuple[int, ...]:
    """The axes whose length a profile lets vary; none without a profile.

    Example:
        >>> varying_axes(((1, 8), (1, 8), (4, 8)))
        (0,)
    """
    low, _, high = lengths or ((), (), ())
    return tuple(axis for axis, (shortest, longest) in enumerate(zip(low, high, strict=True)) if shortest != longest)


def run_child(command: list[str], request: Mapping[str, Any], *, log: Path, timeout_s: float, what: str) -> dict[str, Any]:
    """Run a command with the files of a request and of an answer as its last arguments, and return the answer.

    Args:
        command: What to run.
        request: What it reads, as JSON; paths become text.
        log: File for all that it prints.
        timeout_s: Seconds after which it is ended, with its own children.
        what: What is being made, for errors.

    Returns:
        What it wrote to the file of the answer.

    Raises:
        BuildError: If it answers with an error, ends without an answer, or takes longer.
    """
    with tempfile.TemporaryDirectory(prefix="sparsepass-build-") as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        question.write_text(json.dumps(request, default=str), encoding="utf-8")
        started = time.monotonic()
        with log.open("wb") as file:
            child = subprocess.Popen(
                [*command, str(question), str(answer)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = child.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                _end(child)
                raise BuildError(
                    f"{what} was not built within {timeout_s:g} s, and the builder was ended; allow more with --timeout, or "
                    f"give smaller --profile ranges",
                    lines=_last_lines(log),
                ) from None
            except BaseException:
                _end(child)
                raise
        if answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            if "error" in found:
                more = _last_lines(log) if found["log_tells_more"] else ()
                raise BuildError(f"{what} cannot be built: {found['error']}", lines=more)
            return found
        seconds = time.monotonic() - started
        raise BuildError(f"{what} cannot be built: the builder {_ended(code)} after {seconds:.0f} s", lines=_last_lines(log))


def _end(child: "subprocess.Popen[bytes]") -> None:
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)  # its session is its own, so nothing else is in the group
    else:
        child.kill()
    child.wait()


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    memory = "; the machine may be out of memory" if name == "SIGKILL" else ""
    return f"crashed with {name}{memory}"


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-_NUM_LINES_SHOWN:]
    return ["The log ends with:", *(f"  {line[:300]}" for line in lines)] if lines else ["Its log is empty."]
