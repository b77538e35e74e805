"""Faces of packages whose names are imported when they are first used."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def face(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Make the names that a package's ``if TYPE_CHECKING:`` block imports its own, each loaded at its first use.

    The block is the only list of them: type checkers read it, and so does this function. A function must not bear the
    name of a module of its package: whichever was imported last would win.

    Args:
        package: The package's ``__name__``.
        file: Its ``__file__``.

    Returns:
        The package's ``__getattr__``, ``__dir__`` and ``__all__``.
    """
    homes: dict[str, str] = {}
    for statement in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING":
            for imported in statement.body:
                if isinstance(imported, ast.ImportFrom) and imported.module:
                    homes |= {alias.name: imported.module for alias in imported.names}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(import_module(package), name, value)
        return value

    def names() -> list[str]:
        return sorted(homes)

    return get, names, names()
