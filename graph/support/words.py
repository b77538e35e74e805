"""Words of an error: the known name that is nearest to an unknown one, and what another library's error says in a line."""

import difflib
from collections.abc import Iterable, Sequence


def closest(word: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that is most like another one, or None if none is.

    Args:
        word: What was given.
        known: What there is.
        cutoff: How much alike they have to be, 0 to 1.

    Example:
        >>> closest("wnada", ["magnitude", "wanda"]), closest("x", ["wanda"])
        ('wanda', None)
    """
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)), None)


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text that is not empty; the name of its class if there is none.

    Example:
        >>> first_line(ValueError("\n  no such axis\n  at ...")), first_line(KeyboardInterrupt())
        ('no such axis', 'KeyboardInterrupt')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint such as ``; did you mean 'wanda'?``, or the known words if none is near."""
    if close := closest(word, known, cutoff=0.5):
        return f"; did you mean {close!r}?"
    shown = ", ".join(map(repr, sorted(set(known))[:8]))
    return f"; known: {shown}{', ...' if len(set(known)) > 8 else ''}" if shown else ""
