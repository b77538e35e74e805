"""What a user sees while a model trains: one line with the loss, the speed and the time that is left."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import final

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from sparsepass._terminal import Terminal


@final
class ProgressLine:
    """One line about a running training: live on a terminal, else a plain line on stderr now and then.

    Speed and remaining time come from the last steps, without the pauses for validation and checkpoints; until the first step
    is done they are unknown. Other output of Python on the terminal, and `print`'s, stands above the live line.

    Args:
        total_steps: Optimizer steps of the whole run.
        start: Steps done before, in a resumed run.
        interval_seconds: How often a line is written where there is no terminal; the first and the last step always are.
        window_steps: How many of the last steps speed and remaining time are taken from.
        enabled: Whether anything is shown: true in the first process only.
        console: Where it is shown; stderr if None.
        clock: Gives the time in seconds.

    Example:
        >>> import sys
        >>> with ProgressLine(2, console=Console(file=sys.stdout, width=200), clock=iter(range(9)).__next__) as line:
        ...     line.update(1, tokens=100, loss=3.25, lr=1e-4)  # doctest: +ELLIPSIS
        step 1/2  loss 3.2500  lr 1.00e-04  100 tokens/s  ...  ETA 0:00:01
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start: int = 0,
        interval_seconds: float = 30.0,
        window_steps: int = 50,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._interval, self._clock = total_steps, start, interval_seconds, clock
        self._console = console or Terminal(stderr=True)
        self._enabled = enabled
        self._recent: deque[tuple[int, float, int]] = deque(maxlen=window_steps)
        self._mark = clock()
        self._written: float | None = None
        self._live: Progress | None = None
        self._text = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens in a second over the last steps; None until one is done."""
        seconds = sum(entry[1] for entry in self._recent)
        return sum(entry[2] for entry in self._recent) / seconds if seconds > 0 else None

    @property
    def remaining_seconds(self) -> float | None:
        """Time until the last step at the pace of the last steps, without pauses; None until one is done."""
        steps = sum(entry[0] for entry in self._recent)
        return (self._total - self._done) * sum(entry[1] for entry in self._recent) / steps if steps else None

    def update(
        self,
        step: int,
        *,
        tokens: int,
        loss: float | None = None,
        kl: float | None = None,
        flip_rate: float | None = None,
        lr: float | None = None,
    ) -> None:
        """Show a step that is done.

        Args:
            step: How many optimizer steps are done now.
            tokens: Tokens trained on since the last call, of all processes together.
            loss: Of the step.
            kl: Its distillation part, per token.
            flip_rate: Share of mask entries that changed at the last refresh, between 0 and 1.
            lr: Learning rate.
        """
        now = self._clock()
        self._recent.append((step - self._done, now - self._mark, tokens))
        self._mark, self._done = now, step
        if not self._enabled:
            return
        parts = [] if loss is None else [f"loss {loss:.4f}"]
        parts += [] if kl is None else [f"KL {kl:.4f}"]
        parts += [] if flip_rate is None else [f"flips {100 * flip_rate:.3f}%"]
        parts += [] if lr is None else [f"lr {lr:.2e}"]
        parts += [] if self.tokens_per_second is None else [f"{self.tokens_per_second:,.0f} tokens/s"]
        parts += [f"{memory_bytes() / 1e9:.1f} GB"]
        parts += [] if self.remaining_seconds is None else [f"ETA {timedelta(seconds=round(self.remaining_seconds))}"]
        self._text = text = "  ".join(parts)
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=step, text=text)
        elif self._written is None or now - self._written >= self._interval or step >= self._total:
            self._written = now
            self.print(f"step {step}/{self._total}  {text}")

    def print(self, message: str) -> None:
        """Write a message above the line."""
        if self._enabled:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def pause(self, why: str) -> Iterator[None]:
        """Leave the time of a block out of the speed, as for validation and checkpoints.

        Args:
            why: What is shown meanwhile on a terminal.
        """
        began = self._clock()
        self._show(why)
        try:
            yield
        finally:
            self._show(self._text)
            self._mark += self._clock() - began

    def _show(self, text: str) -> None:
        if self._live is not None:
            self._live.update(self._live.task_ids[0], text=text, refresh=True)

    def __enter__(self) -> "ProgressLine":
        self._mark = self._clock()
        if self._enabled and self._console.is_terminal:
            text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True))
            count = TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True))
            # Stdout may be a pipe while stderr is a terminal: what goes into the pipe must stay there.
            self._live = Progress(count, BarColumn(12), text, console=self._console, redirect_stdout=sys.stdout.isatty())
            self._live.add_task("", total=self._total, completed=self._done, text="")
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def memory_bytes() -> int:
    """The memory this process holds: on a machine with a GPU the most that was allocated on it, else resident memory.

    Example:
        >>> memory_bytes() > 1_000_000
        True
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # the most that was ever resident
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
