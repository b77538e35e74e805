"""What a command prints when it is done: the report in one screen."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from sparsepass.export.report import (
    HTML_FILE,
    Block,
    ReportDocument,
    Sentence,
    SizeSection,
    SpeedSection,
    Table,
    new_report,
    plain_json,
    section_view,
    summary as answers,
)

_TONES: Final = {"good": "green", "bad": "bold red", "unknown": "yellow", "soft": "dim"}
_MARKED: Final = {"sparse": "good", "held": "good", "DID NOT HOLD": "bad", "not checked": "unknown"}
"""Cell -> its tone."""
_SECTIONS: Final = ("passes", "retraining", "accuracy", "verification", "artifact")


def summary(document: Mapping[str, Any], out: str) -> Group:
    """What the report tells of layers, training, accuracy, verification and files, in short.

    Args:
        document: A report.
        out: Where it was written.
    """
    return Group(sections(document, *_SECTIONS), Text(f"Written to {out}; {HTML_FILE} there tells everything."))


def sections(document: Mapping[str, Any], *names: str) -> Group:
    """What the terminal shows of some sections; nothing of those that the report does not have."""
    report = ReportDocument.parse(document)
    blocks = [block for name in names for block in section_view(report, name).blocks if "terminal" in block.on]
    return Group(*(made for block in blocks for made in _rendered(block)))


def speed_tables(found: SpeedSection) -> Group:
    """What the terminal shows of a benchmark."""
    return sections(new_report() | {"speed": plain_json(found)}, "speed")


def size_tables(found: SizeSection) -> Group:
    """What the terminal shows of the sizes of a model."""
    return sections(new_report() | {"size": plain_json(found)}, "size")


def answers_text(document: Mapping[str, Any]) -> Text:
    """What the page says at its head: each question with its answer."""
    text = Text()
    for answer in answers(ReportDocument.parse(document)):
        text.append(f"{answer.question} ").append(f"{answer.short}\n", style=_TONES.get(answer.tone, ""))
        for sentence in answer.sentences:
            text.append(f"  {sentence}\n", style="dim")
    return text


def _rendered(block: Block) -> Iterator[RenderableType]:
    if isinstance(block, Sentence):
        yield Text(block.text, style=_TONES.get(block.tone, ""))
    elif isinstance(block, Table):
        made = RichTable(title=block.label, title_justify="left", show_edge=False, show_header=block.style != "facts")
        for column in block.columns:
            made.add_column(column.heading, justify="right" if column.kind == "figures" else "left", overflow="fold")
        for row in block.rows:
            made.add_row(*(Text(str(cell), style=_TONES.get(_MARKED.get(str(cell), ""), "")) for cell in row))
        yield made
