"""The command `report`, and the option by which other commands add what they found to a report."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import print_json, show

_LOG = logging.getLogger(__name__)
AddTo = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="Add what was found to the report in this folder (report.json, report.html, report.md), or begin one there.",
        show_default=False,
    ),
]


def _print_schema(wanted: bool) -> None:
    if wanted:
        from sparsepass.export.report import json_schema

        typer.echo(json.dumps(json_schema(), indent=1))
        raise typer.Exit


def report_command(
    place: Annotated[
        Path, typer.Argument(metavar="FOLDER_OR_FILE", help="A report.json, or the folder it lies in.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for the pages; by default the one that report.json lies in.", show_default=False
        ),
    ] = None,
    _schema: Annotated[
        bool,
        typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON schema of report.json instead."),
    ] = False,
    as_json: support.AsJson = False,
) -> None:
    """Show a report in the terminal, and render its pages anew from report.json alone: report.html and report.md.

    Exit code: 0 it was rendered, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.cli.show import answers_text, summary
    from sparsepass.export.report import PAGES, changed_report, read_report, write_pages

    folder = out or (place if place.is_dir() else place.parent)
    check_report(folder)
    document = read_report(place)
    with changed_report(folder, PAGES) as pages:
        write_pages(pages, document)
    if as_json:
        print_json("report", {"out": str(folder), "report": document})
        return
    show(answers_text(document))
    show(summary(document, str(folder)))


def check_report(folder: Path | None) -> None:
    """Make sure that a report can be written into the folder that ``--report`` names, if it names one, before any work."""
    from sparsepass.graph.support import check_writable

    if folder is not None:
        check_writable(folder)


def add_to(folder: Path | None, stage: str, sections: Mapping[str, Any], started: float) -> None:
    """Add sections to the report that ``--report`` names, if it names one."""
    from sparsepass.export.report import HTML_FILE, add_to_report

    if folder is not None:
        add_to_report(folder, sections, stage=stage, command=support.command_line(), seconds=time.perf_counter() - started)
        _LOG.info("added to %s", folder / HTML_FILE)
