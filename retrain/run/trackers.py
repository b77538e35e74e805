"""Trackers such as TensorBoard: whatever accelerate knows gets the numbers that go into ``metrics.jsonl``."""

import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from accelerate import Accelerator

JSON = Any


class Log(Protocol):
    """Sends the numbers of one step to the trackers."""

    def __call__(self, values: Mapping[str, JSON]) -> None:
        """Send ``values``, which has the entry ``step``."""


@contextmanager
def tracking(
    accelerator: Accelerator, project: str, config: Mapping[str, JSON], *, resumed_at: int | None = None
) -> Iterator[Log]:
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


def _flat(values: Mapping[str, JSON], prefix: str = "") -> Iterator[tuple[str, JSON]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
