"""The pass `slorb`: a low-rank branch beside each sparse linear layer.

Shape suffixes: O out, I in, R in/k.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.rewrite import attach_branch
from sparsepass.passes.base import Facts, GroupContext, Needs, Pass, not_sparse
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import fixed_projection, relative_error, slorb_least_squares, slorb_mean_init


@dataclass(frozen=True, kw_only=True)
class SLoRB(Pass):
    """Add a Sparse Low-Rank Boosting branch to each sparse linear layer: ``y = (M .* W) x + S (X x) + b``.

    1. Rewrites linear layers (nn.Linear and GPT-2's Conv1D) whose weight has a mask. X sums every k consecutive features;
       siblings that read the same activation share one such sum in the graph.
    2. Leaves alone convolutions and experts, and layers whose input features k does not divide.
    3. The branch cannot be folded into the weight, which would no longer be N:M. It has the form of a LoRA of rank in/k, and
       leaves as one.

    Args:
        k: Input features summed into one; out*in/k weights are added.
        init: How S starts. ``mean`` is the paper's: the sum of what the mask drops of each k weights, divided by k. ``sum`` is
            that sum itself. ``least_squares`` is the S with the least output error of the layer on the calibration inputs. By
            default least_squares with calibration and mean without.
        projection: ``fixed``, or ``trainable``: then X is a weight of its own, in^2/k more, and starts as the fixed one.
        damping: Of the least squares, as a fraction of the mean diagonal of X H X^T.
        targets: See `Pass`.
        ignore: See `Pass`.

    Raises:
        SparsepassError: If k is below 1.

    Source: AST, arXiv 2407.20584, eqs. 5 and 6; the least squares are ours.
    """

    name = "slorb"
    promise = "approximate"

    k: int = 16
    init: Literal["mean", "sum", "least_squares"] | None = None
    projection: Literal["fixed", "trainable"] = "fixed"
    damping: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise SparsepassError(f"slorb: k expects an integer of at least 1, got {self.k}")
        if not 0 <= self.damping < float("inf"):
            raise SparsepassError(f"slorb: damping expects a fraction of at least 0, got {self.damping}")
        for option, allowed in (
            ("init", (None, "mean", "sum", "least_squares")),
            ("projection", ("fixed", "trainable")),
        ):
            if getattr(self, option) not in allowed:
                raise SparsepassError(f"slorb: {option} expects one of {allowed}, got {getattr(self, option)!r}")

    def resolve(self, *, has_calibration: bool) -> Self:
        """Choose the initialisation."""
        return replace(self, init=self.init or ("least_squares" if has_calibration else "mean"))

    @property
    def needs(self) -> Needs:
        """The Gram matrix for least squares, else nothing."""
        return "gram" if self.init == "least_squares" else "nothing"

    @property
    def requires(self) -> Mapping[Condition, str]:
        """Masks."""
        return {Condition.MASKED: "slorb adds to sparse layers, and there are none"}

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Folded masks, trained blocks, rounded weights, a second branch; for least squares, weights without originals."""
        forbidden = {
            Condition.FOLDED: "slorb needs what the masks drop",
            Condition.TRAINED_NOW: "branches train with their block",
            Condition.QUANTIZED: "a branch is fitted to what masks drop, before weights are rounded",
        }
        if not self.targets:
            forbidden[Condition.BRANCHED] = "slorb gives each layer one branch"
        if self.init == "least_squares":
            forbidden[Condition.CHANGED_BEFORE] = "init=least_squares needs the original weights, and init=mean does not"
        return forbidden

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Branches."""
        return {Condition.BRANCHED: ""}

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers that are not sparse, not linear, have a branch, or whose features k does not divide."""
        state = program.sparse.get(site.weight)
        if state is None:
            return not_sparse(site)
        if state.mask is None:
            return "its mask has been folded, and what it dropped is lost"
        if site.layout not in ("linear", "conv1d_hf"):
            return f"a branch stands beside a linear layer; this is {site.layout}"
        if state.branch is not None:
            return "it has a SLoRB branch already"
        if site.in_features % self.k:
            return f"in_features {site.in_features} is not a multiple of k={self.k}"
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fit S for each layer of a group, and add the branch."""
        facts: dict[str, Facts] = {}
        for site in group.sites:
            weight = program.tensor(site.weight).detach()
            mask_name = program.sparse[site.weight].mask
            assert mask_name is not None
            mask_OI = site.to_matrix(program.tensor(mask_name))
            measured: dict[str, float | int | str] = {}
            if self.init == "least_squares":
                if site.weight not in context.originals:
                    raise SparsepassError(
                        f"init=least_squares needs the original weight, which {program.sparse[site.weight].changed_by} has "
                        "changed; use init=mean"
                    )
                original_OI = site.to_matrix(context.originals[site.weight])
                masked_OI = torch.where(mask_OI, site.to_matrix(weight), 0)
                (statistics,) = context.statistics
                gram_II = statistics.gram_II
                assert gram_II is not None
                fit = slorb_least_squares(original_OI, masked_OI, gram_II, k=self.k, damping=self.damping)
                branch_OR = fit.slorb_weight_OR
                if fit.note:
                    measured["note"] = fit.note
                if context.measure:
                    given_OI = branch_OR.float().repeat_interleave(self.k, dim=1)
                    missing_OI = original_OI.float() - masked_OI.float() - given_OI
                    measured["relative_error"] = relative_error([(missing_OI, original_OI.float())], context.statistics)
            else:
                assert self.init is not None
                branch_OR = slorb_mean_init(site.to_matrix(weight), mask_OI, self.k, self.init)
            projection = None
            if self.projection == "trainable":
                projection = fixed_projection(site.in_features, self.k, dtype=weight.dtype, device=weight.device)
            attach_branch(program, site, branch_OR.to(weight.dtype), self.k, projection)
            facts[site.name] = measured
        return facts
