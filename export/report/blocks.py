"""What views of a report are made of: tables, sentences and drawings. HTML, Markdown and terminal render each kind once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

from sparsepass.export.report.charts import Picture

Medium = Literal["html", "markdown", "terminal"]
PAGES: Final[tuple[Medium, ...]] = ("html", "markdown")
EVERYWHERE: Final[tuple[Medium, ...]] = (*PAGES, "terminal")


@final
@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its heading.
        kind: What it holds: ``figures``, which stand right; ``sentences``; ``code``; or else ``words``.
    """

    heading: str
    kind: Literal["words", "figures", "sentences", "code"] = "words"


def figures(*headings: str) -> tuple[Column, ...]:
    """Columns of figures."""
    return tuple(Column(heading, "figures") for heading in headings)


def words(*headings: str) -> tuple[Column, ...]:
    """Columns of words."""
    return tuple(map(Column, headings))


def sentences(heading: str) -> Column:
    """A column of sentences."""
    return Column(heading, "sentences")


@final
@dataclass(frozen=True)
class Table:
    """A table. Its first column names the rows.

    Attributes:
        label: What it holds.
        columns: Its columns.
        rows: Their cells.
        folded: What stands in its place until a reader opens it; empty if it is always open.
        is_sortable: Whether a reader may sort and filter it.
        style: A class of the page's style.
        on: Where it is shown.
    """

    label: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[object]]
    folded: str = ""
    is_sortable: bool = False
    style: str = ""
    on: tuple[Medium, ...] = PAGES


def facts(label: str, rows: Iterable[tuple[str, object]], on: tuple[Medium, ...] = PAGES) -> Table:
    """A table of names and what is known; what is empty is left out."""
    known = [row for row in rows if row[1] != ""]
    return Table(label, (Column("what"), sentences("value")), known, style="facts", on=on)


@final
@dataclass(frozen=True)
class Sentence:
    """A paragraph.

    Attributes:
        text: Words between backticks are code.
        lead: What stands before it in bold; empty for nothing.
        tone: A class of the page's style.
        on: Where it is shown.
    """

    text: str
    lead: str = ""
    tone: str = ""
    on: tuple[Medium, ...] = PAGES


@final
@dataclass(frozen=True)
class Subheading:
    """A heading inside a section."""

    text: str
    on: tuple[Medium, ...] = PAGES


@final
@dataclass(frozen=True)
class Notes:
    """A list of remarks."""

    items: tuple[str, ...]
    on: tuple[Medium, ...] = PAGES


@final
@dataclass(frozen=True)
class Drawing:
    """A picture.

    Attributes:
        picture: What is drawn.
        note: What a reader should know of it.
        file: Path beside report.md, which shows the picture from there; empty if only report.html shows it.
    """

    picture: Picture
    note: str = ""
    file: str = ""


@final
@dataclass(frozen=True)
class Drawings:
    """Pictures side by side where there is room; one that may not be scaled stands alone."""

    items: tuple[Drawing, ...]
    on: tuple[Medium, ...] = PAGES


@final
@dataclass(frozen=True)
class Steps:
    """The commands that led to a report: stage, time, command, machine of each."""

    items: tuple[tuple[str, str, str, str], ...]
    on: tuple[Medium, ...] = PAGES


@final
@dataclass(frozen=True)
class Raw:
    """JSON as it is."""

    text: str
    on: tuple[Medium, ...] = PAGES


Block = Table | Sentence | Subheading | Notes | Drawings | Steps | Raw
