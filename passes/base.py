"""What a pass is, and the choice of the sites that it rewrites."""

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, Self

from torch import Tensor

from sparsepass.graph import PassError, Program, Site
from sparsepass.graph.support import closest
from sparsepass.passes.maths import InputStatistics

Needs = Literal["nothing", "inputs", "norms", "gram"]
"""What a pass must know of each site's input: nothing; the inputs, from which it computes for itself; their norms; their
Gram matrix."""
NEEDS_ORDER: tuple[Needs, ...] = ("nothing", "inputs", "norms", "gram")
Facts = Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True)
class SiteGroup:
    """Sites that read the same activation, rewritten together.

    Attributes:
        sites: In graph order; a site that is used more than once is alone in its group.
    """

    sites: tuple[Site, ...]


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """How a pass works that rewrites a whole block at a time.

    Attributes:
        steps: How often it calls `BlockRun.advance` for each block.
        batch_size: Sequences to a batch, at most.
    """

    steps: int
    batch_size: int


class BlockRun(Protocol):
    """A block of the graph that a pass can run while it rewrites it; the calibration engine's."""

    @property
    def name(self) -> str:
        """Path of the block's module."""

    @property
    def num_batches(self) -> int:
        """Number of calibration batches."""

    def targets(self, batch: int) -> tuple[Tensor, ...]:
        """What the block gave in the dense model, for one batch."""

    def valid_BT(self, batch: int) -> Tensor | None:  # noqa: N802
        """Which tokens of a batch are no padding; None if all are."""

    def outputs(self, batch: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the block, whose predecessors are rewritten already, with other values for some parameters and buffers."""

    def own_vectors(self) -> tuple[str, ...]:
        """Names of the one-dimensional parameters (norms, biases) that this block alone reads."""

    def advance(self, word: str) -> None:
        """Say that one of the steps of the pass's `BlockWork` is done."""


@dataclass(kw_only=True)
class GroupContext:
    """What is known of a group while it is rewritten, and forgotten right after.

    Attributes:
        statistics: Of the group's input: one, or one for each expert; empty without calibration.
        originals: Weight name -> the weight before the first pass of this run changed it.
        measure: Whether to measure what costs time and changes nothing, for the report.
        block: The block whose sites the group is, for a pass that works block by block.
    """

    statistics: tuple[InputStatistics, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    measure: bool = True
    block: BlockRun | None = None


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of the sites of a program. Its fields are its whole configuration.

    The author of a pass writes what happens at one group of sites. The manager checks the order, chooses the sites, walks
    them (with calibration statistics, where the pass asks for them), checks the graph, and validates the result.

    Args:
        targets: Rewrite only the sites that one of these patterns matches. A pattern is a module path or weight name, a
            glob (``*.mlp.*``), ``re:`` and a regular expression that must match the whole path, or the class name of a
            module (``Linear``). What is left alone by default (output heads, routers) is taken only by its exact name.
        ignore: Leave these sites alone. Same patterns; ignore wins over targets.
    """

    name: ClassVar[str]
    promise: ClassVar[Literal["exact", "approximate"]]

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for which in ("targets", "ignore"):
            value = getattr(self, which)
            patterns = (value,) if isinstance(value, str) else tuple(value)
            for pattern in patterns:
                if not isinstance(pattern, str) or not pattern:
                    raise PassError(self.name, which, f"a pattern is text that is not empty, got {pattern!r}")
                if pattern.startswith("re:"):
                    try:
                        re.compile(pattern[3:])
                    except re.error as error:
                        raise PassError(self.name, which, f"{pattern!r} is no regular expression: {error}") from error
            object.__setattr__(self, which, patterns)

    def resolve(self, *, has_calibration: bool) -> Self:
        """Fill in defaults that depend on whether calibration is given, so that the record says what was really done."""
        del has_calibration
        return self

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the pass must know of each site's input."""

    @property
    def block_work(self) -> BlockWork | None:
        """None for a pass that rewrites groups of sites; else how it works on a block, after the passes before it."""
        return None

    @abstractmethod
    def check(self, program: Program, before: Sequence["Pass"]) -> None:
        """Raise a PassError if the pass cannot run on this program after the passes ``before`` it in the pipeline."""

    @abstractmethod
    def refusal(self, site: Site, program: Program) -> str | None:
        """Why a chosen site cannot be rewritten, or None if it can."""

    @abstractmethod
    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Rewrite the sites of one group. Returns site name -> what was measured there.

        Raises:
            SparsepassError: If the values do not allow it (NaN, a singular Hessian); the manager adds pass and site.
        """

    def choose(self, program: Program) -> tuple[list[Site], dict[str, str]]:
        """Choose the sites to rewrite.

        Returns:
            The chosen sites, and site name -> reason for every other one.

        Raises:
            PassError: If a pattern matches no site, or a site that is targeted by its exact name cannot be rewritten.
        """
        sites = program.sites()
        for which in ("targets", "ignore"):
            for pattern in getattr(self, which):
                if not any(matches(pattern, site) for site in sites):
                    near = nearest(pattern, [site.name for site in sites])
                    raise PassError(self.name, which, f"the pattern {pattern!r} matches no layer of this model{near}")
        chosen, skipped = [], {}
        for site in sites:
            reason = self.reason(site, program)
            if reason is None:
                chosen.append(site)
                continue
            if {site.name, site.weight} & set(self.targets) and not any(matches(p, site) for p in self.ignore):
                raise PassError(self.name, site.name, f"it is among the targets, but cannot be rewritten: {reason}")
            skipped[site.name] = reason
        return chosen, skipped

    def reason(self, site: Site, program: Program) -> str | None:
        """Why this site is not rewritten, or None if it is."""
        targeted = any(matches(pattern, site) for pattern in self.targets)
        ignored = next((pattern for pattern in self.ignore if matches(pattern, site)), None)
        if ignored is not None:
            return f"ignored by {ignored!r}"
        if self.targets and not targeted:
            return "not among the targets"
        named = site.can_be_named and bool({site.name, site.weight} & set(self.targets))
        if site.left_alone is not None and not named:
            return site.left_alone
        return self.refusal(site, program)


def matches(pattern: str, site: Site) -> bool:
    """Whether a name pattern means a site: by path, weight name, tied name, glob, ``re:`` or module class."""
    names = [site.name, site.weight, *site.ties, *(tie.removesuffix(".weight") for tie in site.ties)]
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    if pattern == site.module_type:
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint such as ``; did you mean 'wanda'?``, or the known words if none is near."""
    if close := closest(word, known, cutoff=0.5):
        return f"; did you mean {close!r}?"
    shown = ", ".join(map(repr, sorted(set(known))[:8]))
    return f"; known: {shown}{', ...' if len(set(known)) > 8 else ''}" if shown else ""
