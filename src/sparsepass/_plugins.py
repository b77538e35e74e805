"""What other packages add to a table of this one, through an entry point: classes, or rows."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

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
    return _extended(own, group, lambda found: isinstance(found, type) and issubclass(found, base), f"{base.__name__} class")


def extended_by_rows(own: Mapping[str, Kind], group: str, base: type[Kind]) -> dict[str, Kind]:
    """A table (name -> row) with the rows that other packages add to it: objects of a class that have a ``name``.

    Args:
        own: The table without them.
        group: Name of the entry point.
        base: Class of the rows.

    Raises:
        SparsepassError: If an entry point cannot be loaded, is no such row, or takes a name that is taken.
    """
    return _extended(own, group, lambda found: isinstance(found, base), base.__name__)


def _extended(own: Mapping[str, Any], group: str, is_fit: Callable[[Any], bool], what: str) -> dict[str, Any]:
    table = dict(own)
    for entry in entry_points(group=group):
        try:
            found = entry.load()
        except (ImportError, AttributeError) as error:
            raise _refusal(f"the entry point {entry.name} ({entry.value}) cannot be loaded ({error})") from error
        if not is_fit(found):
            raise _refusal(f"the entry point {entry.name} ({entry.value}) is no {what}")
        if found.name in table:
            raise _refusal(f"the entry point {entry.value} takes the name {found.name!r}, which is taken")
        table[found.name] = found
    return table


def _refusal(what: str) -> ValueError:
    from sparsepass.graph.support import SparsepassError

    return SparsepassError(f"{what}; mend or remove its package")
