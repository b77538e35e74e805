"""What the readers of files hand to the pattern checker: one candidate for each use of a weight."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

from sparsepass.export.pattern.bits import BitView
from sparsepass.graph.support import is_open, name_matches


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of one stored weight.

    Attributes:
        file: File it stands in, relative to the source; "" for a model in memory.
        node: Operation that uses it; the module path in a safetensors file.
        op: Operation type ("MatMul", "Gemm", ...), or "tensor" in a safetensors file.
        weight: Name under which the tensor is stored.
        parameter: The parameter it was in the model the file was exported from, where the file tells (torch.onnx notes
            it); else "".
        shape: Stored shape (unpacked where the file packs several values into a byte).
        dtype: Stored element type, in lower case.
        axis: Axis of the stored tensor along which K runs, and so along which groups are counted; None if unknown.
    """

    file: str = ""
    node: str = ""
    op: str = ""
    weight: str
    parameter: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    axis: int | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Candidate(Use):
    """A use that was found and is not yet read.

    Attributes:
        aliases: Other names that mean this weight: those it takes on its way to the operation.
        key: Equal for two candidates that read the same bytes the same way.
        read: Reads the bits; None where `problem` says why it cannot.
        problem: Why this use cannot be checked, or None.
        aside: Why this use does not decide unless the caller expects it to be sparse; None if it decides anyway.
        computed: Operations that made the tensor out of what is stored; empty where it is stored itself.
        multiplied: Reads the values that the product really multiplies, and their axis of K. Set only where a cast or a
            quantization lies between: rounding there can turn small stored values into zeros. The call gives None where
            these values cannot be computed.
        remark: What a reader should know of how it is stored.
    """

    aliases: tuple[str, ...] = ()
    key: object = None
    read: Callable[[], BitView] | None = None
    problem: str | None = None
    aside: str | None = None
    computed: tuple[str, ...] = ()
    multiplied: Callable[[], tuple[BitView, int] | None] | None = None
    remark: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which a user may mean this use, module paths (without ".weight") included."""
        named = (self.weight, self.parameter or self.weight, *self.aliases, self.node)
        return tuple(dict.fromkeys((*named, *(name.removesuffix(".weight") for name in named))))


@final
class NamePatterns:
    """Name patterns, to be matched with many weights. Exact names are looked up in a table, so that thousands cost nothing.

    Args:
        patterns: The patterns, as `sparsepass.graph.support.name_matches` takes them.

    >>> NamePatterns(["a", "b.*", "c"]).matching(["b.x", "c"])
    ['b.*', 'c']
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._order = {pattern: i for i, pattern in enumerate(patterns)}
        self._open = [pattern for pattern in self._order if is_open(pattern)]
        self._met: set[str] = set()

    def matching(self, names: Iterable[str]) -> list[str]:
        """The patterns that mean one of the names, in the order given."""
        names = tuple(names)
        found = {name for name in names if name in self._order}
        found.update(pattern for pattern in self._open if pattern not in found and name_matches(pattern, names))
        self._met |= found
        return sorted(found, key=self._order.__getitem__)

    @property
    def unmet(self) -> tuple[str, ...]:
        """The patterns that have meant none of the names asked for so far."""
        return tuple(pattern for pattern in self._order if pattern not in self._met)
