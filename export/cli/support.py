"""What every command shares: clean errors, exit codes, and the options that several commands take.

Nothing heavy is imported here or in the command modules at import time, so that `--help` and usage errors come at once.
"""

import errno
import functools
import inspect
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from sparsepass.export.cli.advice import as_options, flags_of
from sparsepass.export.cli.options import Fields, with_settings
from sparsepass.export.cli.output import complain, print_json, say, show, talking
from sparsepass.export.stages import Calibration, Evaluation, ModelSource

if TYPE_CHECKING:
    from sparsepass.export.targets import State

HELD, FAILED, UNREADABLE, UNCHECKED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: it holds; it does not; it cannot be read or is wrongly asked; it could not be checked; Ctrl-C."""


DEFAULT_PASSES = "nm_sparsify"

Model = Annotated[ModelSource, Fields(flags={"source": "MODEL"})]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
Passes = Annotated[
    str,
    typer.Option(
        "--passes",
        help="Passes in order, as text: 'nm_sparsify{criterion=wanda,pattern=2:4},slorb{k=16}'.",
        show_default=True,
    ),
]
DenseModel = Annotated[
    ModelSource,
    Fields(flags={"source": "MODEL"}, left_out=("task",), help={"source": "Folder, hub id or .gguf file of a dense model."}),
]
DATA: Final = {
    "data": "Text file (.txt, .jsonl, .parquet), data set folder or hub data set name (name:config:split), or 'python-docs' "
    "for text that is always there. May be repeated, for several files."
}
"""Help of calibration data that has to be given."""
CalibrationOptions = Annotated[
    Calibration,
    Fields(
        flags={"data": "--calibration"},
        help={"data": f"{DATA['data']} nm_sparsify prunes by SparseGPT with it, by magnitude without."},
        repeated=("data",),
    ),
]
EvaluationOptions = Annotated[
    Evaluation | None,
    Fields(
        flags={
            "text": "--eval-text",
            "context": "--eval-context",
            "stride": "--eval-stride",
            "bos": "--eval-bos",
            "text_column": "--eval-text-column",
        },
        left_out=("batch_size",),
        help={"text": "Measure perplexity on it before and after. As --calibration; may be repeated, for several files."},
        repeated=("text",),
    ),
]
Pattern = Annotated[str, typer.Option("--pattern", help="N:M.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output folder that is not empty, if sparsepass wrote it.")]
AllowUnchecked = Annotated[
    bool,
    typer.Option("--allow-unchecked", help="Exit with 0, not 3, where a part could not be checked on this machine."),
]
NoValidate = Annotated[
    bool, typer.Option("--no-validate", help="Do not measure after each pass how far the outputs moved. Saves time.")
]
ModelWithoutWeights = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder, hub id, config .json, .gguf file, or saved program. Weights are not needed.",
        show_default=False,
    ),
]
GgufFile = Annotated[str | None, typer.Option("--gguf-file", help="Name of the .gguf file, if MODEL holds several.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let code that comes with the checkpoint run. Off unless you ask for it."),
]
Device = Annotated[
    str,
    typer.Option("--device", help="Where to compute, such as cuda, cuda:1 or cpu; auto is the GPU, where there is one."),
]
TrainingDevice = Annotated[
    str, typer.Option("--device", help="Where to compute: cuda or cpu; auto is the GPU, where there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and tables.")]


def numbers(option: str, given: list[str] | None) -> tuple[int, ...]:
    """Numbers of an option that takes commas and may be repeated."""
    from sparsepass.graph import SparsepassError

    found = []
    for word in ",".join(given or ()).split(","):
        if word.strip():
            try:
                found.append(int(word))
            except ValueError:
                raise SparsepassError(f"{option} expects whole numbers such as 1,8,32, got {word.strip()!r}") from None
    return tuple(dict.fromkeys(found))


def command_line() -> str:
    """The command that was typed, for the report."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def no_passes(text: str) -> bool:
    """Whether ``--passes none`` was given."""
    return text.strip().lower() in ("", "none")


def finish(exit_code: int) -> None:
    """End a command with an exit code."""
    if exit_code:
        raise typer.Exit(exit_code)


def code_of(states: "Iterable[State | None]", *, allow_unchecked: bool) -> int:
    """The exit code of what verification came to, None where there was none: 0, 1 or 3."""
    found = set(states)
    if "did_not_hold" in found:
        return FAILED
    return UNCHECKED if "not_checked" in found and not allow_unchecked else HELD


_ADVICE = {
    errno.EACCES: "name a place where you may read and write, or change its permissions",
    errno.EPERM: "name a place where you may read and write, or change its permissions",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: "free some space, or name a place on another disk; nothing half-written was left",
}


_TALK: Final = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
    for name, option in (
        ("quiet", typer.Option("--quiet", "-q", help="Print results and errors only: no news, no progress.")),
        (
            "verbose",
            typer.Option("--verbose", "-v", help="Print what is logged at level DEBUG, too, and warnings of libraries."),
        ),
    )
]
"""Options that every command has."""


def clean(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: settings become options, and what a user can cause one message and an exit code.

    What is a defect keeps its traceback.
    """
    run = with_settings(command)
    own = inspect.signature(run)
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *_TALK])  # type: ignore[attr-defined]
    for parameter in own.parameters.values():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(info, typer.models.ParameterInfo):
                info.readable = False  # what cannot be read is told in our words
    flags = flags_of(run)

    @functools.wraps(run)
    def guarded(**given: Any) -> None:
        quiet, verbose = given.pop("quiet"), given.pop("verbose")
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose were both given; choose one")
        try:
            with _quiet(verbose), talking("quiet" if quiet else "verbose" if verbose else "normal"):
                run(**given)
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
            complain(as_options(str(error), flags))
            raise typer.Exit(UNREADABLE) from None

    return guarded


def quiet_bars() -> None:
    """Keep bars of the libraries underneath out of logs (they show at a terminal only), and their advice off the screen."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


_OF_CHECKSUMS: Final = r"(?s).*sparsepass\.sha256\.json"
"""Warnings of files that are not as they were written. Their class would have to be imported, with torch."""


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(str(message), lead="Warning: ")


class _quiet:  # noqa: N801  # used as a context manager only
    """Keep other libraries' warnings and bars off the screen, unless they are asked for."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose

    def __enter__(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        if not self._verbose and not sys.warnoptions and "PYTEST_CURRENT_TEST" not in os.environ:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", _OF_CHECKSUMS)
            warnings.showwarning = _say_warning

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(*error)  # type: ignore[arg-type]


def show_report(
    command: str, document: Mapping[str, Any], out: Path, *, as_json: bool, exit_code: int = 0, **more: Any
) -> None:
    """Print what a report says, in short; as JSON all of it, beside where it was written."""
    from sparsepass.export.cli.show import summary

    if as_json:
        print_json(command, {"out": str(out), **more, "report": document}, exit_code=exit_code)
    else:
        show(summary(document, str(out)))


def projection(word: str) -> Literal["fixed", "trainable"]:
    """What ``--projection`` says of SLoRB branches."""
    from sparsepass.graph import SparsepassError

    if word == "fixed":
        return "fixed"
    if word == "trainable":
        return "trainable"
    raise SparsepassError(f"--projection expects fixed or trainable, got {word!r}")
