"""report.html: the report as one page that needs nothing else, rendered from report.json alone.

It loads nothing, and its content security policy says so to the browser. Pictures are SVG drawn here; a little script sorts
and filters the tables, and without it the page is whole all the same.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, Final

from sparsepass.export.report.answers import Answer, summary
from sparsepass.export.report.charts import STYLE
from sparsepass.export.report.document import HEADER
from sparsepass.export.report.html import parts
from sparsepass.export.report.html.layers import layers_part
from sparsepass.export.report.html.markup import Html, el, join

_MAX_UNKNOWN_LETTERS: Final = 4000


def render_html(document: Mapping[str, Any]) -> str:
    """Render a report as a page for browsers.

    Args:
        document: A checked report. Sections that this version does not know are shown as JSON.

    Returns:
        A whole HTML document. The same report gives the same text.

    Example:
        >>> from sparsepass.export.report.document import new_report
        >>> render_html(new_report()).splitlines()[0]
        '<!doctype html>'
    """
    style, script = _resource("report.css") + STYLE, _resource("report.js")
    sections: list[tuple[str, str, Html | None]] = [("summary", "In short", _answers(summary(document)))]
    for name, (heading, render) in _RENDERERS.items():
        if name in document:
            sections.append((name, heading, render(document[name], document)))
    for name, section in document.items():
        if name not in _RENDERERS and name not in HEADER:
            text = json.dumps(section, indent=1, ensure_ascii=False)
            cut = f"\n... ({len(text):,} characters in report.json)" if len(text) > _MAX_UNKNOWN_LETTERS else ""
            sections.append((name, name, el("pre", text[:_MAX_UNKNOWN_LETTERS] + cut)))
    sections.append(("runs", "How it was made", parts.runs_part(document)))
    shown = [(f"part-{index}", heading, body) for index, (_, heading, body) in enumerate(sections) if body is not None]
    title = parts.title(document)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content="sparsepass"),
        el("title", f"sparsepass report: {title}"),
        el("style", Html(style)),
    )
    body = el(
        "body",
        el(
            "div",
            el("header", el("h1", title), parts.subtitle(document)),
            el(
                "nav",
                el("ul", (el("li", el("a", heading, href=f"#{id_}")) for id_, heading, _ in shown)),
                aria_label="Sections",
            ),
            el("main", (_section(*each) for each in shown)),
            class_="page",
        ),
        el("script", Html(script)),
    )
    return f"<!doctype html>\n{el('html', head, chr(10), body, lang='en')}\n"


def _section(id_: str, heading: str, body: Html) -> Html:
    return join(["\n", el("section", el("h2", heading, id=f"{id_}-heading"), body, id=id_, aria_labelledby=f"{id_}-heading")])


def _answers(answers: Sequence[Answer]) -> Html:
    rows = []
    for answer in answers:
        asked = el("dt", answer.question, el("b", answer.short[:1].upper() + answer.short[1:]))
        told = el("dd", (el("p", parts.with_code(sentence)) for sentence in answer.sentences))
        rows.append(el("div", asked, told, class_=answer.tone))
    return el("dl", rows, class_="answers")


def _policy(script: str) -> str:
    """Nothing may be loaded, and no script runs but the page's own."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _resource(name: str) -> str:
    return resources.files("sparsepass.export.report.html").joinpath(name).read_text(encoding="utf-8")


Renderer = Callable[[Mapping[str, Any], Mapping[str, Any]], Html | None]

_RENDERERS: Final[Mapping[str, tuple[str, Renderer]]] = {
    "accuracy": ("Accuracy", parts.accuracy_part),
    "passes": ("Layers", layers_part),
    "retraining": ("Training", parts.retraining_part),
    "sparsity": ("Was the sparsity used?", parts.sparsity_part),
    "plan": ("Plan", parts.plan_part),
    "artifact": ("Files", parts.artifact_part),
    "verification": ("Verification", parts.verification_part),
    "pattern": ("Stored weights", parts.pattern_part),
    "samples": ("Samples", parts.samples_part),
    "model": ("Model", parts.model_part),
}
"""Section -> its heading and what renders it, in the page's order."""
