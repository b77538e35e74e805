"""Words in messages."""

import difflib
from collections.abc import Sequence


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint such as ``; did you mean 'wanda'?``, or the known words if none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(map(repr, sorted(set(known))[:8]))
    return f"; known: {shown}{', ...' if len(set(known)) > 8 else ''}" if shown else ""
