"""The errors a user can meet. Each message says what was expected, what came, where, and what to do next.

They give `sparsepass` as their module, where users import them from, so a traceback names that.
"""


class SparsepassError(ValueError):
    """A user's mistake, or an input that cannot be handled; the base of every error this library raises on purpose."""

    __module__ = "sparsepass"


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
