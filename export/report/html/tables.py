"""Tables and figures of the page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from sparsepass.export.report.charts import Picture
from sparsepass.export.report.html.markup import Html, el, escaped, join

_MARKED: Final = {"yes": "yes", "no": "no", "unknown": "unk", "held": "held", "DID NOT HOLD": "failed", "not checked": "unk"}


@final
@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its heading.
        is_number: Whether it holds figures, which stand right.
        is_wide: Whether it holds sentences.
    """

    heading: str
    is_number: bool = False
    is_wide: bool = False


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[object]], *, label: str, is_sortable: bool = False, kind: str = ""
) -> Html:
    """A table in a box of its own that scrolls where it is too wide or too long.

    Args:
        columns: Its columns; the first one names the row.
        rows: Their cells; texts are escaped.
        label: What it holds, for screen readers.
        is_sortable: Whether the script sorts and filters it.
        kind: A class for the style.
    """
    heads = el("tr", (el("th", c.heading, scope="col", class_="n" if c.is_number else None) for c in columns))
    body = []
    for row in rows:
        cells = [el("th", _breakable(row[0]), scope="row", class_="n" if columns[0].is_number else None)]
        for column, cell in zip(columns[1:], row[1:], strict=True):
            kinds = "n" if column.is_number else "why" if column.is_wide else _MARKED.get(str(cell))
            cells.append(el("td", cell, class_=kinds))
        body.append(el("tr", cells))
    named = " ".join(word for word in ("sortable" if is_sortable else "", kind) if word)
    made = el("table", el("thead", heads), el("tbody", body), class_=named or None, aria_label=label)
    return el("div", made, class_="scroll", tabindex="0", role="region", aria_label=label)


def facts(rows: Iterable[tuple[str, object]], *, label: str) -> Html:
    """A table of two columns, names and what is known; what is empty is left out."""
    return table(
        (Column("what"), Column("value", is_wide=True)), [row for row in rows if row[1] != ""], label=label, kind="facts"
    )


def figure_of(picture: Picture, note: str = "", *, is_wide: bool = False) -> Html:
    """A picture with its title and a note. One that may not be scaled scrolls where it is too wide."""
    said = el("figcaption", picture.title, el("span", note) if note else None)
    drawn = picture.svg()
    if not picture.is_fluid:
        drawn = el("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=picture.title)
    return el("figure", said, drawn, class_="wide" if is_wide else None)


def figures(pictures: Iterable[tuple[Picture, str]]) -> Html:
    """Pictures side by side where there is room: picture and note."""
    return el("div", (figure_of(picture, note) for picture, note in pictures), class_="pics")


def _breakable(cell: object) -> object:
    """A name that may be broken behind its dots, and nowhere else."""
    return join(escaped(cell).split("."), Html(".<wbr>")) if isinstance(cell, str) and not isinstance(cell, Html) else cell
