"""The command `criteria`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sparsepass.export.cli import support
from sparsepass.export.cli.options import Fields
from sparsepass.export.cli.output import print_json, print_text, show
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
            help={"text": f"{support.DATA['data']}"},
            repeated=("text",),
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
    device: support.Device = "auto",
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder that keeps each finished row: a run that was interrupted goes on from there."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the table as JSON to this file, too.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table as Markdown to this file, too.")] = None,
    as_json: support.AsJson = False,
) -> None:
    """Compare pruning criteria on MODEL: perplexity, error, time and memory, all on the same calibration.

    Each row is measured in a process of its own, the dense model first.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    import json

    from sparsepass.export.stages import (
        CRITERIA_TITLE,
        CriteriaSettings,
        criteria_page,
        criteria_table,
        inputs_of,
        is_criteria_file,
        jobs_of,
    )
    from sparsepass.graph.support import check_place, check_writable, write_text

    for file in (json_file, out):
        if file is not None:
            check_place(file, inputs=inputs_of(model, calibration, evaluation, work), is_ours=is_criteria_file)
    if work is not None:
        check_writable(work)
    names = [name.strip() for item in criteria or () for name in item.split(",") if name.strip()]
    jobs = jobs_of(names, pattern=pattern, reconstruct=reconstruct, pipelines=passes or ())
    settings = CriteriaSettings(model=model, calibration=calibration, evaluation=evaluation, device=device)
    found = criteria_table(settings, jobs, work=work)
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=1) + "\n")
    if out is not None:
        write_text(out, f"{CRITERIA_TITLE}\n{criteria_page(found)}")
    if as_json:
        print_json("criteria", found)
    else:
        _show(found)


def _show(found: "dict[str, Any]") -> None:
    from rich.table import Table

    from sparsepass.export.stages import criteria_rows

    facts, headings, rows = criteria_rows(found)
    table = Table(title="Criteria", title_justify="left", show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    show(table)
    for fact in facts:
        print_text(fact)


class OldJson(TyperCommand):
    """``--json FILE`` is ``--json-file FILE``: it wrote a file once, where other commands print."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        pairs = zip(args, [*args[1:], ""], strict=True)
        return super().parse_args(ctx, ["--json-file" if a == "--json" and b.endswith(".json") else a for a, b in pairs])
