"""The pass `fold`: masks become zeros of the weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from sparsepass.graph import Program, Site
from sparsepass.graph.rewrite import fold_mask
from sparsepass.passes.base import Facts, GroupContext, Pass, not_sparse
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import NMPattern, num_violations


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Write each mask's zeros into its weight and take the mask out of the graph.

    1. Rewrites every site that has a mask. The operations then read the weight itself, which is strictly N:M.
    2. Leaves branches as they are: folded into the weight they would fill the zeros again.
    3. Leaves sites without a mask alone.

    The dropped weights are lost. A pass that needs them, and training, must come before.

    Exactness: bitwise.
    """

    name = "fold"
    promise = "exact"
    needs = "nothing"

    @property
    def requires(self) -> Mapping[Condition, str]:
        """Masks."""
        return {Condition.MASKED: "there are no masks to fold"}

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """A second time."""
        return {Condition.FOLDED_NOW: "masks are folded once"}

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Zeros in place of masks."""
        return {Condition.FOLDED: ""}

    def refusal(self, site: Site, program: Program) -> str | None:
        """Sites without a mask."""
        state = program.sparse.get(site.weight)
        if state is None:
            return not_sparse(site)
        return "its mask has been folded already" if state.mask is None else None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fold the masks of a group."""
        del context
        for site in group.sites:
            fold_mask(program, site.weight, inplace=True)
        return {}

    def ensures(self, site: Site, program: Program) -> str | None:
        """The weight itself is N:M."""
        state = program.sparse[site.weight]
        broken = num_violations(program.tensor(site.weight), NMPattern.parse(state.pattern), state.axis)
        return f"{broken} groups of the weight are not {state.pattern}" if broken else None
