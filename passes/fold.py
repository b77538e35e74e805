"""The pass `fold`: masks become zeros of the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsepass.graph import PassError, Program, Site
from sparsepass.graph.rewrite import fold_mask
from sparsepass.passes.base import Facts, GroupContext, Needs, Pass, SiteGroup


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Write each mask's zeros into its weight and take the mask out of the graph.

    1. Rewrites every site that has a mask. The operations then read the weight itself, which is strictly N:M.
    2. Leaves SLoRB branches as they are: folded into the weight they would fill the zeros again.
    3. Leaves sites without a mask alone.

    What stood behind the mask is gone after it, so `slorb` and training come before it.

    Exactness: bitwise.
    """

    name: ClassVar[str] = "fold"
    promise: ClassVar[Literal["exact", "approximate"]] = "exact"

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return "nothing"

    def check(self, program: Program, before: Sequence[Pass]) -> None:
        """There must be masks, or a pass before it that makes some; and not another fold."""
        if any(p.name == self.name for p in before):
            raise PassError(self.name, "pipeline", "fold stands in the pipeline twice; leave the second one out")
        if any(state.mask is not None for state in program.sparse.values()) or any(p.name == "nm_sparsify" for p in before):
            return
        if program.sparse:
            raise PassError(self.name, "program", "the masks have been folded already; leave fold out")
        raise PassError(self.name, "program", "there are no masks to fold; put nm_sparsify before fold")

    def refusal(self, site: Site, program: Program) -> str | None:
        """Sites without a mask."""
        state = program.sparse.get(site.weight)
        if state is None:
            return "not sparse: no mask to fold"
        return "its mask has been folded already" if state.mask is None else None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fold the masks of a group."""
        del context
        for site in group.sites:
            fold_mask(program, site.weight, inplace=True)
        return {}
