"""Building in a child process: a time limit, and a native crash that becomes an error message."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from sparsepass.graph.support import SparsepassError

CHILD: Final = Path(__file__).with_name("child.py")
_NUM_LINES_SHOWN = 12
_TAIL_BYTES = 65536


class BuildError(SparsepassError):
    """An engine that cannot be built: refused, crashed, or not ready in time."""


@final
@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One optimization profile.

    Attributes:
        name: Such as ``prefill``.
        shapes: Input -> its smallest, most common and largest shape.
    """

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


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
    asked = {
        "module": request.module,
        "onnx": str(request.onnx),
        "engine": str(request.engine),
        "profiles": [{"name": each.name, "shapes": dict(each.shapes)} for each in request.profiles],
        "capabilities": list(request.capabilities),
        "sparse": request.sparse,
        "hardware_compatible": request.hardware_compatible,
        "timing_cache": None if request.timing_cache is None else str(request.timing_cache),
        "inspect": request.inspect,
    }
    answer = run_child(
        [sys.executable, "-P", str(CHILD)], asked, log=request.log, timeout_s=timeout_s, what=request.engine.name
    )
    return Built(**answer)


def run_child(command: list[str], request: Mapping[str, Any], *, log: Path, timeout_s: float, what: str) -> dict[str, Any]:
    """Run a command with the files of a request and of an answer as its last arguments, and return the answer.

    Args:
        command: What to run.
        request: What it reads, as JSON.
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
        question.write_text(json.dumps(request), encoding="utf-8")
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
                    f"give smaller --profile ranges. {_last_lines(log)}"
                ) from None
            except BaseException:
                _end(child)
                raise
        if answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            if "error" in found:
                more = f". {_last_lines(log)}" if found["log_tells_more"] else ""
                raise BuildError(f"{what} cannot be built: {found['error']}{more}")
            return found
        seconds = time.monotonic() - started
        raise BuildError(f"{what} cannot be built: the builder {_ended(code)} after {seconds:.0f} s. {_last_lines(log)}")


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


def _last_lines(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()][-_NUM_LINES_SHOWN:]
    return "The log ends with:\n" + "\n".join(f"  {line[:300]}" for line in lines) if lines else "Its log is empty."
