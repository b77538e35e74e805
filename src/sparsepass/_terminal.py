"""Words from outside at the terminal: names and texts are shown as they are, and are never commands to it.

Everything that is printed goes through `Terminal`. Nothing heavy is imported here.
"""

import re
from collections.abc import Iterable
from typing import Any, Final, final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_COMMANDS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, those that turn the direction of writing, and bytes of a file name that are no UTF-8."""


def for_terminal(text: str) -> str:
    r"""Write as escapes what a terminal would obey, or cannot show. Line breaks and tabs stay.

    Example:
        >>> print(for_terminal("\x1b[2Ja\udcffb"))
        \x1b[2Ja\xffb
    """
    return _COMMANDS.sub(_escape, text)


def one_line(text: str) -> str:
    r"""Do as `for_terminal`, line breaks and tabs included.

    Example:
        >>> print(one_line("a\nb"))
        a\nb
    """
    return for_terminal(text).replace("\n", "\\n").replace("\t", "\\t")


@final
class Terminal(Console):
    r"""A console of rich on which words are words: no markup, no emoji, and nothing that a terminal obeys but rich's own.

    Args:
        options: Of `rich.console.Console`.

    Example:
        >>> import io
        >>> shown = io.StringIO()
        >>> Terminal(file=shown).print("[/b] :smile: \x1b")
        >>> shown.getvalue()
        '[/b] :smile: \\x1b\n'
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text harmless before rich measures it, so that a column is as wide as what it shows."""
        return super().render_str(for_terminal(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does; the text of each piece is made harmless."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else for_terminal(text), style, control)


def _escape(match: "re.Match[str]") -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
