"""Classes that other packages add to a table of this one, through an entry point."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TypeVar

Kind = TypeVar("Kind")


def extended(own: Mapping[str, type[Kind]], group: str, base: type[Kind]) -> dict[str, type[Kind]]:
    """A table (name -> class) with the classes that other packages add to it.

    Nothing heavy is imported here, because the command line reads the table of targets before it knows what to do.

    Args:
        own: The table without them.
        group: Name of the entry point.
        base: Class that each of them has to come from. It has a ``name``.

    Raises:
        SparsepassError: If an entry point cannot be loaded, is no such class, or takes a name that is taken.
    """
    table = dict(own)
    for entry in entry_points(group=group):
        try:
            kind = entry.load()
        except (ImportError, AttributeError) as error:
            raise _refusal(f"the entry point {entry.name} ({entry.value}) cannot be loaded ({error})") from error
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise _refusal(f"the entry point {entry.name} ({entry.value}) is no {base.__name__} class")
        name: str = kind.name  # type: ignore[attr-defined]
        if name in table:
            raise _refusal(f"the entry point {entry.value} takes the name {name!r}, which is taken")
        table[name] = kind
    return table


def _refusal(what: str) -> ValueError:
    from sparsepass.graph.support import SparsepassError

    return SparsepassError(f"{what}; mend or remove its package")
