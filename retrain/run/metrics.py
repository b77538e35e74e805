"""What a run measured: ``metrics.jsonl``, a line for each step however often the run was resumed, and trackers.

A tracker, such as TensorBoard, is whatever accelerate knows; it gets the numbers that go into the file.
"""

import json
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from accelerate import Accelerator

from sparsepass.graph.support import SparsepassError, parse_json, write_text

JSON = Any

METRICS = "metrics.jsonl"
"""Name of the file in a run folder."""


@final
class MetricsFile:
    """Appends measurements to a file, and cuts off what a resumed run will measure again.

    Write everything about a step before the checkpoint of that step is saved: a run resumed at step s keeps the lines up to s.

    Args:
        path: The file, usually ``metrics.jsonl``.
        resumed_at: Step of the checkpoint the run goes on from: later lines, and a last line that was torn off, are dropped.
            None starts an empty file.
        enabled: Whether anything is written: true in the first process only.

    Raises:
        SparsepassError: If an earlier line of the file is not JSON with a step.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     path = Path(name) / "metrics.jsonl"
        ...     with MetricsFile(path) as metrics:
        ...         for step in (1, 2, 3):
        ...             metrics.write({"step": step, "loss": 4.0 / step})
        ...     with MetricsFile(path, resumed_at=1) as metrics:
        ...         metrics.write({"step": 2, "loss": 1.9})
        ...     read_metrics(path)
        [{'step': 1, 'loss': 4.0}, {'step': 2, 'loss': 1.9}]
    """

    def __init__(self, path: str | Path, *, resumed_at: int | None = None, enabled: bool = True) -> None:
        self._path = Path(path)
        self._descriptor: int | None = None
        if not enabled:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resumed_at is None else [line for line in read_metrics(self._path) if line["step"] <= resumed_at]
        write_text(self._path, "".join(map(_to_line, kept)))
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)

    def write(self, values: Mapping[str, JSON]) -> None:
        """Append one line, at once. Numbers that are not finite are written as null, since JSON has none.

        Args:
            values: With the entry ``step``.

        Raises:
            SparsepassError: If there is no ``step``, or the file is closed.
        """
        if not isinstance(values.get("step"), int):
            raise SparsepassError(f"each line of {self._path.name} needs a step that is a whole number, got {dict(values)}")
        if self._descriptor is not None:
            os.write(self._descriptor, _to_line(values).encode())

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file; what is written afterwards is dropped."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_metrics(path: str | Path) -> list[dict[str, JSON]]:
    """Read a metrics file, leaving out a last line that was torn off.

    Returns:
        One mapping a line; empty if there is no file.

    Raises:
        SparsepassError: If another line is not a JSON object with a step.

    Example:
        >>> read_metrics("no such file")
        []
    """
    if not Path(path).exists():
        return []
    # A line counts when its end was written too: what follows the last line break is torn.
    *lines, _ = Path(path).read_bytes().split(b"\n")
    return [_from_line(line, number, Path(path)) for number, line in enumerate(lines, 1)]


@contextmanager
def tracking(
    accelerator: Accelerator, project: str, config: Mapping[str, JSON], *, resumed_at: int | None = None
) -> Iterator[Callable[[Mapping[str, JSON]], None]]:
    """Start the trackers an accelerator was made with, give a function that logs to them, and end them.

    Only the main process logs. Of a line of metrics the numbers are sent, and those of nested mappings as ``outer/inner``;
    text and lists stay in ``metrics.jsonl``.

    Args:
        accelerator: Made with ``Accelerator(log_with="tensorboard", project_dir=folder)``; without ``log_with`` nothing
            is sent.
        project: Name of the project in the tracker. TensorBoard makes a folder of this name inside the accelerator's.
        config: Configuration of the run, nested as it may be.
        resumed_at: Step of the checkpoint the run goes on from; TensorBoard then hides what it holds of later steps.

    Yields:
        A function that takes the mapping that goes into ``metrics.jsonl``.

    Example:
        >>> with tracking(Accelerator(cpu=True), "doctest", {"lr": 1e-4}) as log:
        ...     log({"step": 1, "loss": 3.5})
    """
    plain = {name: value if isinstance(value, str | int | float) else str(value) for name, value in _flat(config)}
    options = {} if resumed_at is None else {"tensorboard": {"purge_step": resumed_at + 1}}
    accelerator.init_trackers(project, config=plain, init_kwargs=options)

    def log(values: Mapping[str, JSON]) -> None:
        numeric = {name: float(value) for name, value in _flat(values) if isinstance(value, numbers.Real) and name != "step"}
        accelerator.log(numeric, step=values["step"])

    try:
        yield log
    finally:
        # Accelerator.end_training would destroy the process group too, and what follows the training may need it.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _from_line(line: bytes, number: int, path: Path) -> dict[str, JSON]:
    values = parse_json(line, f"line {number} of {path}", advice="mend or move the file")
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise SparsepassError(f"line {number} of {path} is not a JSON object with a step; mend or move the file")
    return values


def _to_line(values: Mapping[str, JSON]) -> str:
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: JSON) -> JSON:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, JSON], prefix: str = "") -> Iterator[tuple[str, JSON]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
