"""What every command shares: clean errors, exit codes, and the options that several commands take.

Nothing heavy is imported here or in the command modules at import time, so that `--help` and usage errors come at once.
"""

import errno
import functools
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from sparsepass.export.stages import Calibration, Evaluation

HELD, FAILED, UNREADABLE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: what was asked about holds; it does not; it cannot be read or is wrongly asked; Ctrl-C."""


DEFAULT_PASSES = "nm_sparsify"

Command = TypeVar("Command", bound=Callable[..., None])

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder, hub id, .gguf file, or folder written by `sparsepass prune`.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
Passes = Annotated[
    str,
    typer.Option(
        "--passes",
        help="Passes in order, as text: 'nm_sparsify{criterion=wanda,pattern=2:4},slorb{k=16}'.",
        show_default=True,
    ),
]
CalibrationData = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text file (.txt, .jsonl, .parquet), data set folder or hub data set name (name:config:split), or "
        "'python-docs' for text that is always there. nm_sparsify prunes by SparseGPT with it, by magnitude without.",
    ),
]
CalibrationNeeded = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="Text file (.txt, .jsonl, .parquet), data set folder or hub data set name, or 'python-docs'.",
        show_default=False,
    ),
]
DenseModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id or .gguf file of a dense model.", show_default=False)
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Load the weights as float32, bfloat16 or float16.")]
Pattern = Annotated[str, typer.Option("--pattern", help="N:M.")]
NumSequences = Annotated[int, typer.Option("--num-sequences", min=1, help="Calibration sequences to use at most.")]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Tokens in a calibration sequence; by default 2048 or the model's limit."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Calibration sequences at once: memory and speed only.")]
Seed = Annotated[int, typer.Option("--seed", help="Chooses where in the calibration data the sequences lie.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty.")]
NoValidate = Annotated[
    bool, typer.Option("--no-validate", help="Do not measure after each pass how far the outputs moved. Saves time.")
]
EvalText = Annotated[
    str | None,
    typer.Option("--eval-text", help="Text file, or 'python-docs': measure perplexity before and after on it, for the report."),
]
EvalContext = Annotated[int, typer.Option("--eval-context", min=2, help="Tokens in an evaluation window.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=2, help="Use only so many tokens of the evaluation text.")]
Task = Annotated[
    str | None,
    typer.Option("--task", help="What the model is for, such as text-generation; by default its configuration tells."),
]
GgufFile = Annotated[str | None, typer.Option("--gguf-file", help="Name of the .gguf file, if MODEL holds several.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let code that comes with the checkpoint run. Off unless you ask for it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


class Compute(StrEnum):
    """Precision of calibration's matmuls."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


ComputeOption = Annotated[
    Compute,
    typer.Option("--compute", help="Precision of calibration's matmuls; auto is bfloat16 where the processor computes in it."),
]


def command_line() -> str:
    """The command that was typed, for the report."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def no_passes(text: str) -> bool:
    """Whether ``--passes none`` was given."""
    return text.strip().lower() in ("", "none")


def stdout() -> Any:
    """Console for results."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty())


def say(text: str) -> None:
    """Print a line of news on standard error."""
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def news() -> Callable[[str], None]:
    """What tells a user who sits at a terminal which step has begun; elsewhere it is silent."""
    return (lambda text: say(f"[dim]{text} ...[/]")) if sys.stderr.isatty() else (lambda _: None)


def complain(text: str) -> None:
    """Print an error in red on standard error."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]Error:[/] [red]{escape(text)}[/]", highlight=False, soft_wrap=True)


def finish(held: bool) -> None:
    """End a command with exit code 0 or 1."""
    if not held:
        raise typer.Exit(FAILED)


_ADVICE = {
    errno.EACCES: "name a place where you may read and write, or change its permissions",
    errno.EPERM: "name a place where you may read and write, or change its permissions",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: "free some space, or name a place on another disk; nothing half-written was left",
}


def clean(command: Command) -> Command:
    """Turn what a user can cause into one message and an exit code; what is a defect keeps its traceback."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with _quiet():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            complain("interrupted; an output folder that stood there before is as it was")
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            complain(f"{what}; {_ADVICE[error.errno]}" if error.errno in _ADVICE else what)
            raise typer.Exit(UNREADABLE) from None
        except ValueError as error:
            from sparsepass.graph.support import SparsepassError

            if not isinstance(error, SparsepassError):
                raise
            complain(str(error))
            raise typer.Exit(UNREADABLE) from None

    return guarded  # type: ignore[return-value]


def quiet_bars() -> None:
    """Keep bars of the libraries underneath out of logs (they show at a terminal only), and their advice off the screen."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class _quiet:  # noqa: N801  # used as a context manager only
    """Keep other libraries' warnings and bars off the screen, unless Python was asked to show warnings."""

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        if not sys.warnoptions and "PYTEST_CURRENT_TEST" not in os.environ:
            warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(*error)  # type: ignore[arg-type]


def calibration_of(
    data: str | None, num_sequences: int, context: int | None, batch_size: int, seed: int, compute: Compute
) -> "Calibration":
    """The options of calibration, brought together."""
    from sparsepass.export.stages import Calibration

    return Calibration(
        data=data,
        num_sequences=num_sequences,
        context=context,
        batch_size=batch_size,
        seed=seed,
        compute=compute.value,
    )


def evaluation_of(text: str | None, context: int, max_tokens: int | None) -> "Evaluation | None":
    """The options of evaluation, brought together; None without a text."""
    from sparsepass.export.stages import Evaluation

    return None if text is None else Evaluation(text=text, context=context, max_tokens=max_tokens)


def show_report(document: Any, out: Path) -> None:
    """Print what a report says, in short."""
    from sparsepass.export.cli.show import summary

    stdout().print(summary(document, str(out)))
