"""What views of a report are made of: tables, sentences and drawings. HTML, Markdown and terminal render each kind once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Self, final

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

    @classmethod
    def of_facts(cls, label: str, rows: Iterable[tuple[str, object]], on: tuple[Medium, ...] = PAGES) -> Self:
        """A table of names and what is known; what is empty is left out."""
        known = [row for row in rows if row[1] != ""]
        return cls(label, (Column("what"), Column("value", "sentences")), known, style="facts", on=on)


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


class _OnPages:
    """What the pages show, and the terminal does not."""

    on: ClassVar[tuple[Medium, ...]] = PAGES


@final
@dataclass(frozen=True)
class Subheading(_OnPages):
    """A heading inside a section."""

    text: str


@final
@dataclass(frozen=True)
class Notes(_OnPages):
    """A list of remarks."""

    items: tuple[str, ...]


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
class Drawings(_OnPages):
    """Pictures side by side where there is room; one that may not be scaled stands alone."""

    items: tuple[Drawing, ...]


def drawn(*pictures: Picture) -> Drawings:
    """Pictures of which a reader need not know more."""
    return Drawings(tuple(map(Drawing, pictures)))


@final
@dataclass(frozen=True)
class Steps(_OnPages):
    """The commands that led to a report: stage, time, command, machine of each."""

    items: tuple[tuple[str, str, str, str], ...]


@final
@dataclass(frozen=True)
class Raw(_OnPages):
    """JSON as it is."""

    text: str


Block = Table | Sentence | Subheading | Notes | Drawings | Steps | Raw
