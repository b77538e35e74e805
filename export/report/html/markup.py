"""HTML and SVG as text that is escaped unless it was made here."""

import html
import re
from collections.abc import Iterable
from typing import Any, final

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "br"})


@final
class Html(str):
    """Text that is HTML already, and is not escaped again. Made by `el`, `join` and `escaped`."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """Make any text safe as content and inside quoted attributes; characters that HTML and XML do not allow are replaced.

    Example:
        >>> escaped('<b title="x">')
        '&lt;b title=&quot;x&quot;&gt;'
        >>> escaped(escaped("<"))
        '&lt;'
    """
    if isinstance(text, Html):
        return text
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(text))))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Put parts one after the other; what is no `Html` is escaped, None is left out."""
    return Html(escaped(between).join(escaped(part) for part in parts if part is not None))


def el(tag: str, *content: object, **attributes: Any) -> Html:
    """Make an element.

    Args:
        tag: Its name.
        content: Texts, elements, and iterables of them; None is left out.
        attributes: A trailing underscore is dropped and others become hyphens; None and False leave one out, True
            gives it no value.

    Example:
        >>> el("a", "1 < 2", href="#x", class_="big", hidden=False)
        '<a href="#x" class="big">1 &lt; 2</a>'
    """
    opened = tag
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        plain = name.rstrip("_").replace("_", "-")
        opened += f" {plain}" if value is True else f' {plain}="{escaped(value)}"'
    if tag in _VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{_inside(content)}</{tag}>")


def _inside(content: Iterable[object]) -> str:
    found = []
    for part in content:
        if part is None:
            continue
        found.append(_inside(part) if isinstance(part, Iterable) and not isinstance(part, str) else escaped(part))
    return "".join(found)
