"""The command `criteria`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsepass._terminal import for_terminal
from sparsepass.export.cli import support
from sparsepass.export.cli.options import Fields
from sparsepass.export.stages import Calibration, Evaluation


def criteria_command(
    model: support.DenseModel,
    *,
    calibration: Annotated[
        Calibration,
        Fields(
            flags={"data": "--calibration"},
            left_out=("batch_size",),
            defaults={"data": ...},
            help=support.DATA,
            repeated=("data",),
        ),
    ],
    evaluation: Annotated[
        Evaluation,
        Fields(
            flags={"text": "--eval-text", "context": "--eval-context", "text_column": "--eval-text-column"},
            left_out=("stride", "bos", "batch_size"),
        ),
    ],
    criteria: Annotated[
        list[str] | None, typer.Option("--criteria", help="Criteria, separated by commas. By default all of them.")
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Measure each criterion with block-wise reconstruction after it, too.")
    ] = False,
    passes: Annotated[
        list[str] | None, typer.Option("--passes", help="One row more: passes in order, as text. May be repeated.")
    ] = None,
    pattern: support.Pattern = "2:4",
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder that keeps each finished row: a run that was interrupted goes on from there."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON to this file.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table as Markdown to this file.")] = None,
) -> None:
    """Compare pruning criteria on MODEL: perplexity, error, time and memory, all on the same calibration.

    Each row is measured in a process of its own, the dense model first. The table is printed as Markdown.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    import json
    import sys

    from sparsepass.export.stages import (
        CRITERIA_TITLE,
        CriteriaSettings,
        criteria_page,
        criteria_table,
        inputs_of,
        is_criteria_file,
        jobs_of,
    )
    from sparsepass.graph.support import check_place, write_text

    for file in (json_file, out):
        if file is not None:
            check_place(file, inputs=inputs_of(model, calibration, evaluation, work), is_ours=is_criteria_file)
    names = [name.strip() for item in criteria or () for name in item.split(",") if name.strip()]
    jobs = jobs_of(names, pattern=pattern, reconstruct=reconstruct, pipelines=passes or ())
    settings = CriteriaSettings(model=model, calibration=calibration, evaluation=evaluation)
    with support.news(work is not None and not sys.stderr.isatty()):
        found = criteria_table(settings, jobs, work=work)
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")
    if out is not None:
        write_text(out, f"{CRITERIA_TITLE}\n{criteria_page(found)}")
    typer.echo(for_terminal(criteria_page(found)))
