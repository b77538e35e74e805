"""The command `bench`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.options import Fields
from sparsepass.export.cli.output import print_json, show
from sparsepass.export.cli.report import AddTo, add_to, check_report
from sparsepass.export.stages import BenchSettings, ModelSource

_FOLDER = "Packed or plain folder, hub id or .gguf file of a model."


def bench_command(
    model: Annotated[ModelSource, Fields(flags={"source": "FOLDER"}, left_out=("task",), help={"source": _FOLDER})],
    *,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Another model to measure beside it, such as the dense one; they take turns.", show_default=False
        ),
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option("--batch", help="Sequences at once: 1, or 1,4,16. May be repeated. By default 1,4,16.")
    ] = None,
    settings: Annotated[BenchSettings, Fields(left_out=("batches",))],
    report: AddTo = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Leave the report in FOLDER as it is.")] = False,
    as_json: support.AsJson = False,
) -> None:
    """Measure how fast FOLDER decodes and reads a prompt, and what it takes of memory and disk.

    What was found goes into the report in FOLDER, if it has one. Run it while the machine does nothing else.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    import time
    from dataclasses import replace

    from sparsepass.export.cli.show import speed_tables
    from sparsepass.export.report import find_report, plain_json
    from sparsepass.export.stages import bench

    started = time.perf_counter()
    own = Path(model.source).expanduser()
    keeps = not no_report and own.is_dir() and find_report(own) is not None
    check_report(report or (own if keeps else None))
    if batch:
        settings = replace(settings, batches=support.numbers("--batch", batch))
    other = None if against is None else replace(model, source=against, gguf_file=None, revision=None)
    found = bench(model, other, settings=settings)
    if as_json:
        print_json("bench", plain_json(found))
    else:
        show(speed_tables(found))
    add_to(report or (own if keeps else None), "bench", {"speed": found}, started)
