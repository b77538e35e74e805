"""Docstrings as data. Nothing heavy is imported here: the command line reads the help of its options so."""

import inspect
import re


def attribute_docs(kind: type) -> dict[str, str]:
    """Read the section ``Attributes:`` of a class's docstring (Google style).

    Args:
        kind: The class. What its base classes say counts too, unless the class says it anew.

    Returns:
        Field -> text, with line breaks joined. Empty if there is no such section, as under ``python -OO``.

    Example:
        >>> from sparsepass.graph.records import BranchState
        >>> attribute_docs(BranchState)["k"]
        'Input features summed into one.'
    """
    found = {}
    for each in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(vars(each).get("__doc__") or "").partition("\nAttributes:\n")
        section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found
