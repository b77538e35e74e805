"""Pipelines as text, and back: ``nm_sparsify{criterion=wanda,pattern=2:4},slorb{k=16}``."""

from collections.abc import Iterable

from sparsepass.graph import SparsepassError
from sparsepass.graph.support import build, item_to_text, parse_items
from sparsepass.passes.base import Pass
from sparsepass.passes.table import passes_table


def parse_pipeline(passes: str | Pass | Iterable[str | Pass]) -> tuple[Pass, ...]:
    """Turn names, pass objects and text into a tuple of passes.

    Args:
        passes: A pass, text with any number of passes, or an iterable of both.

    Raises:
        SparsepassError: If a pass or option is unknown (the nearest known name is given), a value has the wrong type, or
            the text cannot be read.

    Example:
        >>> parse_pipeline("nm_sparsify{criterion=wanda},slorb")[1].name
        'slorb'
    """
    if isinstance(passes, str):
        items = parse_items(passes, "pass")
        if not items:
            raise SparsepassError("the pipeline is empty; name at least one pass, such as nm_sparsify")
        table = passes_table()
        return tuple(build(table, "pass", name, options) for name, options in items)
    if isinstance(passes, Pass):
        return (passes,)
    found: list[Pass] = []
    for item in passes:
        if not isinstance(item, str | Pass):
            raise SparsepassError(f"a pass is a name, text or a Pass object, got {type(item).__name__} ({item!r})")
        found.extend(parse_pipeline(item))
    return tuple(found)


def pipeline_to_text(passes: Iterable[Pass]) -> str:
    """Turn passes into text that `parse_pipeline` reads back as equal passes."""
    return ",".join(pass_to_text(item) for item in passes)


def pass_to_text(item: Pass) -> str:
    """Turn one pass into text with all options that are set to something."""
    return item_to_text(item.name, item)
