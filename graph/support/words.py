"""Words of a user, an error or a model: the known name nearest to an unknown one, the first line of an error, name patterns."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from sparsepass.graph.support.errors import SparsepassError


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
    r"""The first line of an error's text that is not empty, and the next if it ends in a colon; the class's name if none is.

    Example:
        >>> first_line(ValueError("\n  no such axis\n  at ...")), first_line(KeyboardInterrupt())
        ('no such axis', 'KeyboardInterrupt')
        >>> first_line(ValueError("the field 'size' is wrong:\n    TypeError: it is a text"))
        "the field 'size' is wrong: TypeError: it is a text"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint such as ``; did you mean 'wanda'?``, or the known words if none is near."""
    if close := closest(word, known, cutoff=0.5):
        return f"; did you mean {close!r}?"
    shown = ", ".join(map(repr, sorted(set(known))[:8]))
    return f"; known: {shown}{', ...' if len(set(known)) > 8 else ''}" if shown else ""


def name_matches(pattern: str, names: Iterable[str]) -> bool:
    r"""Tell whether a name pattern means one of the names.

    This is the one place that says what a name pattern means. It is one of three things, each of which must fit a name from
    its first to its last character:

    - the name itself, even if it holds characters that globs use;
    - a glob: ``*`` is any text (dots too), ``?`` any character, ``[12]`` one of those given; case counts;
    - ``re:`` and a regular expression.

    Args:
        pattern: The name pattern.
        names: All names of one thing.

    Returns:
        Whether one of them is meant.

    Raises:
        SparsepassError: If the regular expression is not valid.

    Example:
        >>> name_matches("*.q_proj", ["layers.0.q_proj"]), name_matches("re:layers\\.[12]\\..*", ["layers.0.q_proj"])
        (True, False)
        >>> name_matches("re:layers", ["layers.0.q_proj"])
        False
    """
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise SparsepassError(
                f"{pattern!r} is not a valid name pattern: after 're:' it is no regular expression ({error})"
            ) from error
        return any(compiled.fullmatch(name) for name in names)
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in names)


def is_open(pattern: str) -> bool:
    """Tell whether a pattern may mean other names than the one that it spells."""
    return pattern.startswith("re:") or any(char in pattern for char in "*?[")
