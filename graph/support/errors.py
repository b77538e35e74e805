"""The errors a user can meet. Each message says what was expected, what came, where, and what to do next.

They give `sparsepass` as their module, where users import them from, so a traceback names that.
"""

from collections.abc import Iterable


class SparsepassError(ValueError):
    r"""A user's mistake, or an input that cannot be handled; the base of every error this library raises on purpose.

    Args:
        message: What was wrong and what to do. What a file or a name brought along that would break the line (line breaks,
            control characters, halves of surrogate pairs) is escaped.
        lines: More about it, each a line of its own below.

    Example:
        >>> print(SparsepassError("no layer 'a\nb'", lines=["known: 'c'"]))
        no layer 'a\nb'
        known: 'c'
    """

    __module__ = "sparsepass"

    def __init__(self, message: str = "", *, lines: Iterable[str] = ()) -> None:
        super().__init__(_in_one_line(message))
        self.lines = tuple(map(_in_one_line, lines))

    def __str__(self) -> str:
        """The message, and the lines below it."""
        return "\n".join((super().__str__(), *self.lines))


def _in_one_line(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class CaptureError(SparsepassError):
    """A model that cannot be captured as a graph."""

    __module__ = "sparsepass"


class ProgramFormatError(SparsepassError):
    """A saved program that cannot be read: missing, truncated, of a newer format, or asking to run unknown code."""

    __module__ = "sparsepass"


class EquivalenceError(SparsepassError):
    """Two artifacts that should compute the same function and do not."""

    __module__ = "sparsepass"


class PassError(SparsepassError):
    """A graph or site that breaks a pass's precondition.

    Args:
        pass_name: Text form of the pass, for example ``nm_sparsify{pattern=2:4}``.
        where: Module path or graph node at which it failed.
        reason: What was expected, what came, and what to do next.
    """

    __module__ = "sparsepass"

    def __init__(self, pass_name: str, where: str, reason: str) -> None:
        self.pass_name, self.where, self.reason = pass_name, where, reason
        super().__init__(f"pass {pass_name} failed at {where}: {reason}")

    def __reduce__(self) -> tuple[type["PassError"], tuple[str, str, str]]:
        return PassError, (self.pass_name, self.where, self.reason)
