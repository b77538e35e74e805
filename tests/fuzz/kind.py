"""One kind of file that is fuzzed: how a sound one is made, how it is damaged, who reads it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypothesis.strategies import SearchStrategy

Files = Mapping[str, bytes | None]
"""File name within the folder -> its content; None for a file that is taken away."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a module in `tests.fuzz.kinds` has as ``KIND``.

    Attributes:
        name: Short, and usable in the name of a file.
        sound: Writes a sound folder into an empty one. Called once in a process.
        damaged: From a sound folder, a strategy of files that replace its own.
        read: Reads a folder by the public reader, and uses what it gives. It may return or raise SparsepassError; anything
            else is a failure.
    """

    name: str
    sound: Callable[[Path], None]
    damaged: Callable[[Path], SearchStrategy[Files]]
    read: Callable[[Path], object]
