"""Name patterns: how a user names layers, weights and parameters. The one place that says what a pattern means."""

import fnmatch
import re
from collections.abc import Iterable

from sparsepass.graph.support.errors import SparsepassError


def name_matches(pattern: str, names: Iterable[str]) -> bool:
    r"""Tell whether a name pattern means one of the names.

    A pattern is one of three things, and each must fit a name from its first to its last character:

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
