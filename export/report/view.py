"""A report as a reader sees it: its title, its answers, and one list of blocks for each section.

report.html, report.md and the terminal are renderings of this view, and read nothing else.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Final, final

from sparsepass.export.report.answers import Answer, summary
from sparsepass.export.report.blocks import Block, Column, Drawings, Notes, Raw, Sentence, Steps, Table
from sparsepass.export.report.evidence import sparsity_view
from sparsepass.export.report.layer_view import passes_view
from sparsepass.export.report.layers import layer_facts
from sparsepass.export.report.schema import ReportDocument, RunEntry
from sparsepass.export.report.section_views import (
    accuracy_view,
    artifact_view,
    model_view,
    pattern_view,
    plan_view,
    samples_view,
    verification_view,
)
from sparsepass.export.report.training import training_view
from sparsepass.export.report.words import size

_MAX_UNKNOWN_LETTERS: Final = 4000

SectionViewer = Callable[[Any, ReportDocument], Iterable[Block]]
"""Takes a section and the whole report."""

VIEWS: Final[Mapping[str, tuple[str, SectionViewer]]] = {
    "accuracy": ("Accuracy", accuracy_view),
    "passes": ("Layers", passes_view),
    "retraining": ("Training", training_view),
    "sparsity": ("Was the sparsity used?", sparsity_view),
    "plan": ("Plan", plan_view),
    "artifact": ("Files", artifact_view),
    "verification": ("Verification", verification_view),
    "pattern": ("Stored weights", pattern_view),
    "samples": ("Samples", samples_view),
    "model": ("Model", model_view),
}
"""Section -> its heading and its view, in the order of the page."""


@final
@dataclass(frozen=True)
class SectionView:
    """A section of a report.

    Attributes:
        heading: What stands above it.
        blocks: What it shows, in order.
    """

    heading: str
    blocks: tuple[Block, ...]


@final
@dataclass(frozen=True)
class ReportView:
    """A report.

    Attributes:
        title: The model's name, what was done to it, and its form.
        lines: What stands under the title.
        answers: What a reader wants to know first.
        sections: The rest.
    """

    title: str
    lines: tuple[Sentence, ...]
    answers: tuple[Answer, ...]
    sections: tuple[SectionView, ...]


def report_view(report: ReportDocument) -> ReportView:
    """View a report. Sections that this version does not know are shown as JSON."""
    sections = [section_view(report, name) for name in VIEWS]
    sections += [SectionView(name, (Raw(_cut(section)),)) for name, section in (report.model_extra or {}).items()]
    sections.append(SectionView("How it was made", tuple(_runs(report))))
    return ReportView(
        title=_title(report),
        lines=tuple(_lines(report)),
        answers=tuple(summary(report)),
        sections=tuple(section for section in sections if section.blocks),
    )


def section_view(report: ReportDocument, name: str) -> SectionView:
    """View one section; without blocks if the report does not have it."""
    heading, view = VIEWS[name]
    section = getattr(report, name)
    blocks = () if section is None else view(section, report)
    return SectionView(
        heading, tuple(block for block in blocks if not (isinstance(block, Drawings | Notes) and not block.items))
    )


def _title(report: ReportDocument) -> str:
    name = report.model.source if report.model is not None else report.plan.model if report.plan is not None else ""
    shown = PurePath(name).name or name
    what = list(dict.fromkeys(layer.pattern for layer in layer_facts(report) if layer.pattern))
    what += ["retrained"] if report.retraining is not None and report.retraining.runs else []
    form = f"as {report.artifact.target}" if report.artifact is not None else ""
    named = f"{shown}:" if shown and (what or form) else shown
    return " ".join(part for part in (named, ", ".join(what), form) if part) or "sparsepass report"


def _lines(report: ReportDocument) -> Iterator[Sentence]:
    if report.model is not None and report.model.source:
        yield Sentence(f"Model: `{report.model.source}`")
    if report.recipe:
        yield Sentence(f"Passes: `{report.recipe}`")
    if report.runs:
        last, stages = report.runs[-1], " > ".join(run.stage for run in report.runs)
        yield Sentence(f"{stages}, {last.created}, sparsepass {last.versions.get('sparsepass', '')}")


def _runs(report: ReportDocument) -> Iterator[Block]:
    """Each command with its time and machine, and the versions of all of them."""
    runs = report.runs
    if runs:
        yield Steps(tuple((run.stage, f"{run.created}, {run.seconds} s", run.command, _machine(run)) for run in runs))
        columns = [Column("package"), *(Column(f"{index}. {run.stage}") for index, run in enumerate(runs, 1))]
        names = dict.fromkeys(name for run in runs for name in run.versions)
        rows = [[name, *(str(run.versions.get(name, "")) for run in runs)] for name in names]
        yield Table("Versions", columns, rows, folded="Versions")
        header = json.dumps({"schema": report.schema_, "schema_version": report.schema_version})
        yield Sentence(f"Rendered from report.json (`{header}`) and nothing else.", tone="soft")


def _machine(run: RunEntry) -> str:
    place = run.machine
    cores = "" if place.cores is None else place.cores
    memory = f", {size(place.memory_bytes)} memory" if place.memory_bytes else ""
    return f"{place.processor}, {cores} cores{memory}" + "".join(f", {name}" for name in place.accelerators)


def _cut(section: Any) -> str:
    text = json.dumps(section, indent=1, ensure_ascii=False)
    cut = f"\n... ({len(text):,} characters in report.json)" if len(text) > _MAX_UNKNOWN_LETTERS else ""
    return text[:_MAX_UNKNOWN_LETTERS] + cut
