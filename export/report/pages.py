"""report.html and report.md: the report as pages.

report.html needs nothing else. It loads nothing, and its content security policy says so to the browser. A little script sorts
and filters the tables, and without it the page is whole all the same.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparsepass._terminal import for_terminal, one_line
from sparsepass.export.report.blocks import Block, Drawings, Notes, Raw, Sentence, Steps, Subheading, Table
from sparsepass.export.report.charts import STYLE, el, escaped, join, printable
from sparsepass.export.report.view import ReportView

_MARKED: Final = {"yes": "yes", "no": "no", "unknown": "unk", "held": "held", "DID NOT HOLD": "failed", "not checked": "unk"}
"""Cell -> class of the style."""
_TAG: Final = re.compile(r"<(?=[A-Za-z/!?])")


def render_markdown(view: ReportView) -> str:
    """Render a report.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> from sparsepass.export.report.schema import ReportDocument
        >>> from sparsepass.export.report.view import report_view
        >>> render_markdown(report_view(ReportDocument.parse(new_report()))).splitlines()[0]
        '# sparsepass report'
    """
    parts = [f"# {in_markdown(view.title)}", *(in_markdown(line.text) for line in view.lines)]
    for answer in view.answers:
        short, said = in_markdown(answer.short), in_markdown(" ".join(answer.sentences))
        parts.append(f"**{answer.question} {short[:1].upper()}{short[1:]}.** {said}")
    for section in view.sections:
        parts.append(f"## {section.heading}")
        parts += [_block(block) for block in section.blocks if "markdown" in block.on]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def drawn_figures(view: ReportView) -> dict[str, str]:
    """Draw the pictures that the page shows: path beside it -> SVG."""
    groups = [block.items for section in view.sections for block in section.blocks if isinstance(block, Drawings)]
    return {drawing.file: drawing.picture.file() for group in groups for drawing in group if drawing.file}


def markdown_table(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    r"""A table of Markdown.

    Example:
        >>> print(markdown_table(("a", "b"), [(1, "x|y")]))
        | a | b |
        |---|---|
        | 1 | x\|y |
    """
    return _joined(headings, ([in_markdown(cell) for cell in row] for row in rows))


def in_markdown(value: object) -> str:
    r"""Make any text safe in a line of Markdown: no tags, no links, no blocks. Words between backticks stay code.

    Example:
        >>> in_markdown("<script> `a` [x](y)\n# b")
        '&lt;script> `a` [x]\\(y) # b'
    """
    text = one_line(str(value).replace("\n", " "))
    return _TAG.sub("&lt;", text).replace("](", "]\\(").replace("```", "\\`\\`\\`")


def code_in_markdown(value: object) -> str:
    r"""A name as code: backticks in it are enclosed in more of them.

    Example:
        >>> code_in_markdown("a"), code_in_markdown("a`b")
        ('`a`', '`` a`b ``')
    """
    text = one_line(str(value).replace("\n", " "))
    if "`" not in text:
        return f"`{text}`" if text.strip() else ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def _joined(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _table(headings: Sequence[str], rows: Iterable[Iterable[Any]], is_code: Sequence[bool]) -> str:
    """A table of which some columns are code."""
    made = (
        [code_in_markdown(cell) if code else in_markdown(cell) for cell, code in zip(row, is_code, strict=True)] for row in rows
    )
    return _joined(headings, made)


def _block(block: Block) -> str:
    match block:
        case Table():
            is_code = [column.kind == "code" for column in block.columns]
            made = _table([column.heading for column in block.columns], block.rows, is_code)
            folded = block.folded or (block.label if block.is_sortable else "")
            return f"<details><summary>{folded}</summary>\n\n{made}\n\n</details>" if folded else made
        case Sentence():
            text = in_markdown(block.text)
            return f"**{in_markdown(block.lead)}**: {text}" if block.lead else text
        case Subheading():
            return f"### {in_markdown(block.text)}"
        case Notes():
            return "\n".join(f"- {in_markdown(item)}" for item in block.items)
        case Drawings():
            return "\n\n".join(f"![{each.note}]({each.file})\n\n{each.note}" for each in block.items if each.file)
        case Steps():
            return "\n".join(
                f"- **{in_markdown(stage)}**: {code_in_markdown(command)}, {in_markdown(when)}\n  - {in_markdown(place)}"
                for stage, when, command, place in block.items
            )
        case Raw():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}json\n{for_terminal(block.text)}\n{fence}"


def render_html(view: ReportView) -> str:
    """Render a report as a page for browsers.

    Returns:
        A whole HTML document. The same report gives the same text.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> from sparsepass.export.report.schema import ReportDocument
        >>> from sparsepass.export.report.view import report_view
        >>> render_html(report_view(ReportDocument.parse(new_report()))).splitlines()[0]
        '<!doctype html>'
    """
    script = _resource("report.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"with_code": _with_code, "breakable": _breakable, "kind": lambda block: type(block).__name__}
    return environment.from_string(_resource("report.html")).render(
        view=view,
        policy=_policy(script),
        style=Markup(_resource("report.css") + STYLE),
        script=Markup(script),
        marked=_MARKED,
    )


def _finalized(value: object) -> object:
    """Every value that the template shows goes through here before it is escaped."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _with_code(text: str) -> Markup:
    """A sentence in which words between backticks are code."""
    return join(el("code", part) if index % 2 else part for index, part in enumerate(re.split(r"`([^`]*)`", text)))


def _breakable(name: object) -> Markup:
    """A name that may be broken behind its dots, and nowhere else."""
    return Markup(".<wbr>").join(map(escaped, str(name).split(".")))


def _policy(script: str) -> str:
    """Nothing may be loaded, and no script runs but the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _resource(name: str) -> str:
    return (resources.files("sparsepass.export.report") / "html" / name).read_text(encoding="utf-8")
