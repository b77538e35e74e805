"""The pass `quantize_embedding`: the embedding of the tokens and the output head are rounded to bytes.

Tensor shapes: V words, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sparsepass.graph import Program, Site
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rewrite import attach_grid
from sparsepass.graph.rounding import RoundingGrid, fit_scales, round_to_nearest
from sparsepass.passes.base import Facts, GroupContext, Pass
from sparsepass.passes.conditions import Condition
from sparsepass.passes.criteria import check_weight
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import relative_error

GRID = RoundingGrid(bits=8, group_size=0)
"""One scale for each word, which its row has in the embedding and in the head."""


@dataclass(frozen=True, kw_only=True)
class QuantizeEmbedding(Pass):
    """Round the embedding of the tokens and the output head to int8, one scale for each word.

    1. Rewrites the table that the model looks its tokens up in and the layer whose result are the logits: one tensor where the
       two are tied, rounded once for both.
    2. Leaves alone every other layer (the pass `quantize` is for them), and tables of positions and of kinds of tokens.
    3. The weight itself stays in the program behind the rounding, as with `quantize`.

    In a small model these tables are most of the bytes once the layers are 2:4 and of 4 bits.

    Args:
        targets: See `Pass`.
        ignore: See `Pass`.

    Exactness: a row moves by at most half a step, 1/254 of its largest entry.
    """

    name = "quantize_embedding"
    promise = "approximate"
    needs = "nothing"

    @property
    def grid(self) -> RoundingGrid:
        """What they are rounded to."""
        return GRID

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Rounded weights."""
        return {Condition.QUANTIZED: "put quantize in front of it"}

    def takes(self, site: Site) -> bool:
        """Embeddings and heads, which other passes leave alone."""
        return site.role in ("embedding", "head")

    def refusal(self, site: Site, program: Program) -> str | None:
        """Every other layer, and what is quantized already."""
        if site.role == "table":
            return "a table of positions or kinds of tokens: it is small"
        if not self.takes(site):
            return "neither the embedding of the tokens nor the output head"
        if site.layout not in ("embedding", "linear", "conv1d_hf"):
            return f"its weight is stored as {site.layout}, not as a table"
        if site.weight in program.quantized:
            return f"it is quantized already ({program.quantized[site.weight].grid.text})"
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fit a scale to each row, and round the table to them in the graph."""
        facts: dict[str, Facts] = {}
        for site in group.sites:
            weight_VD = site.to_matrix(masked_weight(program, site.weight))
            check_weight(weight_VD)
            scales, zeros = fit_scales(weight_VD, GRID)
            if context.measure:
                moved_VD = round_to_nearest(weight_VD, GRID, scales).weight_OI - weight_VD.float()
                facts[site.name] = {"relative_error": relative_error([(moved_VD, weight_VD.float())], ())}
            attach_grid(program, site, GRID, scales, zeros)
        return facts
