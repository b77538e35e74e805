"""report.md: the report as a page of Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from sparsepass.export.report.blocks import Block, Drawings, Notes, Raw, Sentence, Steps, Subheading, Table
from sparsepass.export.report.view import ReportView


def render_markdown(view: ReportView) -> str:
    """Render a report.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> from sparsepass.export.report.schema import ReportDocument
        >>> from sparsepass.export.report.view import report_view
        >>> render_markdown(report_view(ReportDocument.parse(new_report()))).splitlines()[0]
        '# sparsepass report'
    """
    parts = [f"# {view.title}", *(line.text for line in view.lines)]
    for answer in view.answers:
        parts.append(f"**{answer.question} {answer.short[:1].upper()}{answer.short[1:]}.** {' '.join(answer.sentences)}")
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
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _block(block: Block) -> str:
    match block:
        case Table():
            is_code = [column.kind == "code" for column in block.columns]
            rows = ([f"`{cell}`" if code else cell for cell, code in zip(row, is_code, strict=True)] for row in block.rows)
            made = markdown_table([column.heading for column in block.columns], rows)
            folded = block.folded or (block.label if block.is_sortable else "")
            return f"<details><summary>{folded}</summary>\n\n{made}\n\n</details>" if folded else made
        case Sentence():
            return f"**{block.lead}**: {block.text}" if block.lead else block.text
        case Subheading():
            return f"### {block.text}"
        case Notes():
            return "\n".join(f"- {item}" for item in block.items)
        case Drawings():
            return "\n\n".join(f"![{each.note}]({each.file})\n\n{each.note}" for each in block.items if each.file)
        case Steps():
            return "\n".join(f"- **{stage}**: `{command}`, {when}\n  - {place}" for stage, when, command, place in block.items)
        case Raw():
            return f"```json\n{block.text}\n```"
