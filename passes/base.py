"""What a pass is, and which sites it rewrites."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from torch import Tensor

from sparsepass.graph import PassError, Program, Site, SparsepassError
from sparsepass.graph.fusion import layers_of
from sparsepass.graph.support import name_matches, nearest
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import BlockRun, SiteGroup, site_groups
from sparsepass.passes.maths import InputStatistics

Needs = Literal["nothing", "inputs", "norms", "gram"]
"""What a pass must know of each site's input: nothing; the inputs themselves; their norms; their Gram matrix."""
NEEDS_ORDER: tuple[Needs, ...] = ("nothing", "inputs", "norms", "gram")
Facts = Mapping[str, float | int | str]
"""What a pass measured at a site, for the report."""


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """How a pass works that rewrites whole blocks.

    Attributes:
        steps: Number of calls of `BlockRun.advance` for each block.
        batch_size: Sequences to a batch, at most.
    """

    steps: int
    batch_size: int


@dataclass(kw_only=True)
class GroupContext:
    """What a pass is told about a group of sites. It is dropped when the group is done.

    Attributes:
        statistics: Statistics of the group's input: one, or one for each expert; empty without calibration.
        originals: Weight name -> the dense model's weight. It lacks the weights that an earlier run has changed.
        measure: Whether the pass should measure, for the report, what takes time and changes nothing.
        block: The block that the group is, for a pass that rewrites whole blocks.
        by_weight: Weight name -> the statistics of its input, of all chosen sites, for a pass that `prepares`.
        unchanged: Site name -> why it stays as it is after all. A pass adds what it finds out from values alone.
        advance: Says that one of `Pass.num_steps` is done, with a word on it.
    """

    statistics: tuple[InputStatistics, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    measure: bool = True
    block: BlockRun | None = None
    by_weight: Mapping[str, tuple[InputStatistics, ...]] = field(default_factory=dict)
    unchanged: dict[str, str] = field(default_factory=dict)
    advance: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of the sites of a program. Its fields are its whole configuration.

    The author of a pass writes what happens at one group of sites, and states what the pass relies on and what it brings about.
    A pass never names another pass: it names conditions. The manager does the rest:

    1. It checks `requires`, `forbids` and `check` of the whole pipeline before anything runs.
    2. It chooses the sites and walks them, with calibration statistics if the pass needs any.
    3. At each rewritten site it checks that what the pass `provides` is there, and what it `ensures`.
    4. It notes which weights have changed, checks and compiles the graph, and measures how far the outputs moved.

    Args:
        targets: Rewrite only the sites that one of these patterns matches. A pattern is a module path or weight name, a
            glob (``*.mlp.*``), ``re:`` and a regular expression that must match the whole path, the last parts of a path
            (``q_proj``), or the class name of a module (``Linear``). What is left alone by default (output heads, routers)
            is taken only by its exact name.
        ignore: Leave these sites alone. Same patterns; ignore wins over targets.
    """

    name: ClassVar[str]
    promise: ClassVar[Literal["exact", "approximate"]]
    prepares: ClassVar[bool] = False
    """Whether an exact pass leaves the model's function but not its values: outputs are then equal but for rounding. Statistics
    of inputs that it needs are gathered for all sites before it rewrites the first."""
    keeps_hidden_states: ClassVar[bool] = True
    """Whether what flows between blocks stays comparable, channel by channel, with the model before the pass."""

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for which in ("targets", "ignore"):
            value = getattr(self, which)
            patterns = (value,) if isinstance(value, str) else tuple(value)
            for pattern in patterns:
                if not isinstance(pattern, str) or not pattern:
                    raise PassError(self.name, which, f"a pattern is text that is not empty, got {pattern!r}")
                try:
                    name_matches(pattern, ())
                except SparsepassError as error:
                    raise PassError(self.name, which, str(error)) from error
            object.__setattr__(self, which, patterns)

    def resolve(self, *, has_calibration: bool) -> Self:
        """Fill in defaults that depend on whether calibration is given, so that the record says what was really done."""
        del has_calibration
        return self

    def takes(self, site: Site) -> bool:
        """Whether the pass is for a site that others leave alone unless it is named: an embedding, an output head."""
        del site
        return False

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What the pass must know of each site's input."""

    @property
    def num_steps(self) -> int:
        """Number of calls of `GroupContext.advance` for each group, by a pass that `prepares` and takes long for one."""
        return 0

    @property
    def block_work(self) -> BlockWork | None:
        """How the pass works on a block; None if it rewrites groups of sites."""
        return None

    @property
    def requires(self) -> Mapping[Condition, str]:
        """Conditions that some site must meet when the pass runs -> why."""
        return {}

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Conditions that no site may meet when the pass runs -> why."""
        return {}

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Conditions that every rewritten site meets -> what to do where a later pass forbids it.

        The advice may be empty: then the later pass is to be put before this one. `Condition.CHANGED` means that the values of
        weights may change.
        """
        return {}

    def check(self, program: Program, before: Sequence["Pass"]) -> None:
        """Refuse what conditions cannot tell.

        Raises:
            PassError: If the pass cannot run on this program after the passes ``before`` it in the pipeline.
        """
        del program, before

    def ensures(self, site: Site, program: Program) -> str | None:
        """What is wrong with a site that the pass has rewritten, or None if it is as promised."""
        del site, program
        return None

    def groups(self, program: Program, sites: Sequence[Site]) -> list[SiteGroup]:
        """The chosen sites as groups that are rewritten together, by a pass that `prepares`."""
        del program
        return site_groups(sites)

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
            PassError: If a pattern matches no site, or some of the layers that a fused site stands for and not all, or a site
                that is targeted by its exact name cannot be rewritten.
        """
        sites = program.sites()
        for which in ("targets", "ignore"):
            if said := next(filter(None, (_only_a_part(getattr(self, which), site) for site in sites)), None):
                raise PassError(self.name, which, f"{said}; name all of them, or put {self.name} before fuse_siblings")
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
        return self.left_out(site) or self.refusal(site, program)

    def has_run(self, site: Site, program: Program, found_nothing: str) -> bool:
        """Whether the pass has been here before: over this layer, or one of those that it stands for since they were fused.

        Args:
            site: The layer.
            program: Whose history tells.
            found_nothing: How the reason begins where an earlier run left a layer as it was since that was best.
        """
        names = {layer.name for layer in layers_of(program, site)}
        return any(
            outcome.site in names and (outcome.action == "rewritten" or outcome.reason.startswith(found_nothing))
            for record in program.history
            if record.text.partition("{")[0] == self.name
            for outcome in record.outcomes
        )

    def left_out(self, site: Site) -> str | None:
        """Why `targets`, `ignore` or the site itself leave the site alone, or None if they do not."""
        targeted = any(matches(pattern, site) for pattern in self.targets)
        ignored = next((pattern for pattern in self.ignore if matches(pattern, site)), None)
        if ignored is not None:
            return f"ignored by {ignored!r}"
        if self.targets and not targeted:
            return "not among the targets"
        named = site.can_be_named and bool({site.name, site.weight} & set(self.targets))
        return None if named or self.takes(site) else site.left_alone


def not_sparse(site: Site) -> str:
    """Why a pass over masks leaves a site without one alone."""
    return f"not sparse: {site.left_alone or 'no pass has given it a mask'}"


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern means a site.

    It may be what `name_matches` takes for its path, weight name or tied names; the last parts of its path (``q_proj``,
    ``mlp.up_proj``), unless they are a number alone; or the class of its module. A fused site also has the names of its layers.
    """
    own = [site.weight, *site.ties, *(tie.removesuffix(".weight") for tie in site.ties)]
    return pattern == site.module_type or _is_called(pattern, site.name, own) or any(_is_layer(pattern, w) for w in site.parts)


def _is_called(pattern: str, name: str, others: Sequence[str]) -> bool:
    is_end_of_path = not pattern.isdigit() and name.endswith(f".{pattern}")
    return is_end_of_path or name_matches(pattern, [name, *others])


def _is_layer(pattern: str, weight: str) -> bool:
    return _is_called(pattern, weight.removesuffix(".weight"), [weight])


def _only_a_part(patterns: Sequence[str], site: Site) -> str | None:
    """Which layers of a fused site patterns mean, in words, if these are some and not all of them."""
    named = [weight for weight in site.parts if any(_is_layer(pattern, weight) for pattern in patterns)]
    left = [weight for weight in site.parts if weight not in named]
    is_whole = any(p == site.module_type or _is_called(p, site.name, [site.weight]) for p in patterns)
    if not named or not left or is_whole:
        return None
    some, others = (", ".join(weight.removesuffix(".weight") for weight in weights) for weights in (named, left))
    return f"{some} {'is' if len(named) == 1 else 'are'} fused with {others}"
