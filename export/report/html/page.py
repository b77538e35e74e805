"""report.html: the report as one page that needs nothing else.

It loads nothing, and its content security policy says so to the browser. A little script sorts and filters the tables, and
without it the page is whole all the same.
"""

import base64
import hashlib
import re
from importlib import resources
from typing import Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparsepass.export.report.charts import STYLE
from sparsepass.export.report.svg import el, escaped, join, printable
from sparsepass.export.report.view import ReportView

_MARKED: Final = {"yes": "yes", "no": "no", "unknown": "unk", "held": "held", "DID NOT HOLD": "failed", "not checked": "unk"}
"""Cell -> class of the style."""


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
    return resources.files("sparsepass.export.report.html").joinpath(name).read_text(encoding="utf-8")
