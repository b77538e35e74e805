"""What a command prints when it is done: the report in one screen."""

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsepass.export.report import (
    HTML_FILE,
    accuracy_rows,
    accuracy_setting,
    size,
    skipped_rows,
    summary as answers,
    training_facts,
)

_TONES: Final = {"good": "green", "bad": "bold red", "unknown": "yellow", "plain": ""}


def summary(document: Mapping[str, Any], out: str) -> Group:
    """Tables of a report: layers, accuracy, files, verification."""
    parts: list[Any] = []
    if "passes" in document:
        parts.append(layers_table(document["passes"]))
    if document.get("retraining"):
        parts.append(training_table(document["retraining"]["runs"][-1]))
    if document.get("accuracy", {}).get("measurements"):
        parts += [accuracy_table(document["accuracy"]), Text(accuracy_setting(document["accuracy"]), style="dim")]
    if "verification" in document:
        parts.append(verification_table(document["verification"]))
    if "artifact" in document:
        artifact = document["artifact"]
        written = f"{size(artifact['size_bytes'])} in {len(artifact['files'])} files"
        parts.append(Text(f"{artifact['target']}, {artifact['dtype']}: {written}"))
    parts.append(Text(f"Written to {out}; {HTML_FILE} there tells everything."))
    return Group(*parts)


def answers_text(document: Mapping[str, Any]) -> Text:
    """What the page says at its head: each question with its answer."""
    text = Text()
    for answer in answers(document):
        text.append(f"{answer.question} ").append(f"{answer.short}\n", style=_TONES[answer.tone])
        for sentence in answer.sentences:
            text.append(f"  {sentence}\n", style="dim")
    return text


def layers_table(section: Mapping[str, Any]) -> Table:
    """How many layers are sparse, and why the others are not."""
    table = Table(title="Linear layers", title_justify="left", show_edge=False)
    table.add_column("layers", justify="right")
    table.add_column("", overflow="fold")
    table.add_row(str(section["num_sparse"]), "[green]sparse[/]" if section["num_sparse"] else "sparse")
    for reason, count, example in skipped_rows(section):
        table.add_row(str(count), f"dense: {escape(reason)} [dim]({escape(example)})[/]")
    return table


def training_table(run: Mapping[str, Any]) -> Table:
    """What the last training did."""
    table = Table(title="Training", title_justify="left", show_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for what, value in training_facts(run):
        table.add_row(what, escape(value))
    return table


def accuracy_table(section: Mapping[str, Any]) -> Table:
    """Perplexities side by side."""
    table = Table(title="Perplexity (lower is better)", title_justify="left", show_edge=False)
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column("times dense", justify="right")
    for row in accuracy_rows(section):
        table.add_row(*row)
    return table


def verification_table(section: Mapping[str, Any]) -> Table:
    """What was checked in the written files."""
    table = Table(title="Verification", title_justify="left", show_edge=False)
    for heading in ("check", "result", "what was found"):
        table.add_column(heading, overflow="fold")
    said = {True: "[green]held[/]", False: "[bold red]did NOT hold[/]", None: "[yellow]not checked[/]"}
    if section.get("held") is None:
        table.add_row("", "[yellow]switched off[/]", "nothing is known of the written files")
    for check in section["checks"]:
        table.add_row(check["name"], said[check["held"]], escape(check["summary"]))
    return table
