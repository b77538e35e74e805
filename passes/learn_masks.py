"""The pass `learn_masks`: masks that are chosen by training, over weights that stay as they are.

Shape suffixes: R rows (every axis of a weight but the one that N:M runs along), I in, C candidates, G groups of a row.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.graph.rewrite import attach_logits
from sparsepass.graph.soft_masks import noise_key, num_candidates
from sparsepass.passes.base import Facts, GroupContext, Pass, not_sparse
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import NMPattern, add_prior, first_logits


@dataclass(frozen=True, kw_only=True)
class LearnMasks(Pass):
    """Give each group of M weights one trainable logit for each of its C(M, N) candidate masks.

    1. Rewrites every site that has a mask, in every layout. In place of ``M .* W`` the graph reads W behind the mask of the
       largest logit. In training (`sparsepass.retrain`, ``method: maskllm``) it reads W behind a soft mix of the candidates.
    2. The mask that is there is the prior: logits start at ``N(0, init_std^2)``, and those of the candidates that share
       entries with it are raised. It may come from a mask pack.
    3. The weights are frozen, so they must be the original ones: no pass may have changed them.
    4. Leaves alone sites without a mask, and those with a branch, which fits what the mask drops. Patterns with more than 128
       candidates are refused.

    The program computes with hard masks all the time; `fold`, exports and mask packs take these. Training ends with an ordinary
    masked program.

    Args:
        alpha: Strength of the prior; 0 ignores the mask that is there.
        init_std: Standard deviation of the logits at the start, to which the prior is scaled.
        seed: Of the logits at the start.
        targets: See `Pass`.
        ignore: See `Pass`.

    Raises:
        SparsepassError: If a number is out of range.

    Source: MaskLLM, arXiv 2409.17481, sections 3 and 4.
    """

    name = "learn_masks"
    promise = "approximate"
    needs = "nothing"  # the mask that is there comes from other passes

    alpha: float = 3.0
    init_std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise SparsepassError(f"learn_masks: alpha expects a number of at least 0, got {self.alpha}")
        if not 0 < self.init_std < float("inf"):
            raise SparsepassError(
                f"learn_masks: init_std expects a number above 0, got {self.init_std}: the prior is scaled to it, and equal "
                "logits would all choose the first candidate"
            )

    @property
    def requires(self) -> Mapping[Condition, str]:
        """Masks."""
        return {Condition.MASKED: "learn_masks starts from masks, and there are none"}

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Folded masks, changed or rounded weights, branches of the same call; masks that are learned, where none is named."""
        forbidden = {
            Condition.FOLDED: "learn_masks chooses among all weights of a group",
            Condition.CHANGED: "masks are learned over the original weights",
            Condition.QUANTIZED: "masks are learned over the original weights",
            Condition.BRANCHED_NOW: "a branch fits what the masks drop, so learn the masks first",
        }
        if not self.targets:
            forbidden[Condition.LEARNED] = "a mask that is being learned already is not made anew"
        return forbidden

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Masks that can be learned."""
        return {Condition.LEARNED: "leave one of the two out"}

    def refusal(self, site: Site, program: Program) -> str | None:
        """Sites without a mask, with a branch, learned already, or with too many candidates."""
        state = program.sparse.get(site.weight)
        if state is None:
            return not_sparse(site)
        if state.mask is None:
            return "its mask has been folded, and what it dropped is lost"
        if state.changed_by is not None:
            return f"{state.changed_by} has changed its weight, and masks are learned over the original one"
        if state.learned is not None:
            return "its mask is being learned already"
        if state.branch is not None:
            return "it has a SLoRB branch, which fits what its mask drops"
        pattern = NMPattern.parse(state.pattern)
        try:
            num_candidates(pattern.n, pattern.m)
        except SparsepassError as error:
            return str(error)
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Make the logits of each site of a group, and attach them."""
        del context
        facts: dict[str, Facts] = {}
        for site in group.sites:
            state = program.sparse[site.weight]
            assert state.mask is not None
            pattern = NMPattern.parse(state.pattern)
            before = program.tensor(state.mask)
            mask_RI = before.movedim(site.nm_axis, -1)
            # Each site has numbers of its own, whichever sites are learned besides.
            seed = noise_key(self.seed, 0, zlib.crc32(site.weight.encode()))
            *rows, length = mask_RI.shape
            groups = length // pattern.m
            start_RCG = first_logits(tuple(rows), groups, pattern, std=self.init_std, seed=seed, device=before.device)
            dtype = torch.promote_types(program.tensor(site.weight).dtype, torch.float32)
            logits_RCG = add_prior(start_RCG, mask_RI, pattern, self.alpha).to(dtype)
            attach_logits(program, site, logits_RCG, pattern.n, pattern.m)
            moved = int((program.tensor(state.mask) != before).sum())
            facts[site.name] = {"logits": logits_RCG.numel(), "moved_from_prior": moved / before.numel()}
        return facts
