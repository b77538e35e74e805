"""Elements of pictures as text that is escaped unless it was made here."""

import re
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup, escape

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Replace the characters that neither HTML, XML nor UTF-8 can hold."""
    return _UNPRINTABLE.sub("\ufffd", text)


def escaped(value: object) -> Markup:
    """Make any text safe as content and inside quoted attributes.

    Example:
        >>> escaped("<b>")
        Markup('&lt;b&gt;')
        >>> escaped(escaped("<"))
        Markup('&lt;')
    """
    return value if isinstance(value, Markup) else escape(printable(str(value)))


def join(parts: Iterable[object]) -> Markup:
    """Put parts one after the other; None is left out."""
    return Markup("").join(escaped(part) for part in parts if part is not None)


def el(tag: str, *content: object, **attributes: Any) -> Markup:
    """Make an element.

    Args:
        tag: Its name.
        content: Texts and elements; None is left out.
        attributes: A trailing underscore is dropped and others become hyphens; None leaves one out.

    Example:
        >>> el("text", "1 < 2", x=3, class_="ink", fill_opacity=None)
        Markup('<text x="3" class="ink">1 &lt; 2</text>')
    """
    opened = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped(value)}"' for name, value in attributes.items() if value is not None
    )
    return Markup(f"<{tag}{opened}>{join(content)}</{tag}>")
