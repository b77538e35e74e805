"""Names that a program file may hold: torch.fx writes them into the Python text that it compiles."""

import builtins
import keyword
import re
import unicodedata

from torch import fx, nn

from sparsepass.graph.support import ProgramFormatError

_INPUT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Nothing that could end a string may be in them.
_PART = re.compile(r"[^\x00-\x1f\x7f\"'\\{}]+")
_LONGEST = 1000
_OF_A_MODULE = frozenset(dir(nn.Module()))
_OF_A_GRAPH_MODULE = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
# What the compiled text itself uses; the rest of the builtins may be names of inputs (``input``).
_OF_THE_TEXT = {"self", "torch", "operator", "_operator", "math", "device", "inf", "nan", "fx_pytree", "pytree", "NoneType"}
_OF_THE_TEXT |= {"getattr", "slice", "complex", "range"}


def check_tensor_name(name: str) -> str:
    """Return the name of a tensor that was read from a file, if it can be one.

    1. Parts between dots are printable text without quotes, braces and backslashes.
    2. No part is a word of Python, or spelt so that Python takes it for another.
    3. No part is what every module has, such as ``forward``; nor the first what a graph module has.

    Raises:
        ProgramFormatError: If it cannot.
    """
    if not isinstance(name, str) or len(name) > _LONGEST:
        raise ProgramFormatError(f"a saved program may not have a tensor named {name!r:.200}")
    parts = name.split(".")
    for part in parts:
        if not _PART.fullmatch(part) or not part.isprintable() or unicodedata.normalize("NFKC", part) != part:
            raise ProgramFormatError(f"a saved program may not have a tensor named {name!r}")
        if keyword.iskeyword(part) or part in _OF_A_MODULE:
            raise ProgramFormatError(f"a saved program may not have a tensor named {name!r}: {part!r} means something else")
    if parts[0] in _OF_A_GRAPH_MODULE:
        raise ProgramFormatError(f"a saved program may not have a tensor named {name!r}: {parts[0]!r} means something else")
    return name


def check_input_name(name: str) -> str:
    """Return the name of an input that was read from a file, if it can be one.

    Raises:
        ProgramFormatError: If it cannot.
    """
    is_name = isinstance(name, str) and len(name) <= _LONGEST and _INPUT_NAME.fullmatch(name)
    if not is_name or keyword.iskeyword(name) or name in _OF_THE_TEXT:
        raise ProgramFormatError(f"a saved program may not have an input named {name!r:.200}")
    return name


def check_keyword(name: str) -> str:
    """Return the keyword of an argument that was read from a file, if it can be one.

    Raises:
        ProgramFormatError: If it cannot.
    """
    if not _INPUT_NAME.fullmatch(name) or len(name) > _LONGEST or keyword.iskeyword(name):
        raise ProgramFormatError(f"a saved program may not have an argument named {name!r:.200}")
    return name


def check_node_name(name: str) -> str:
    """Return the name of a node that was read from a file, if it can be one.

    Raises:
        ProgramFormatError: If it cannot.
    """
    is_name = len(name) <= _LONGEST and _INPUT_NAME.fullmatch(name)
    if not is_name or keyword.iskeyword(name) or name in _OF_THE_TEXT or hasattr(builtins, name):
        raise ProgramFormatError(f"a saved program may not have a node named {name!r:.200}")
    return name
