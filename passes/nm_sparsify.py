"""The pass `nm_sparsify`: N:M masks on linear weights.

Shape suffixes: E experts, O out, I in.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sparsepass.graph import PassError, Program, Site, SparsepassError
from sparsepass.graph.rewrite import attach_mask
from sparsepass.graph.support import nearest
from sparsepass.passes.base import Facts, GroupContext, Needs, Pass
from sparsepass.passes.conditions import Condition
from sparsepass.passes.criteria import (
    CRITERIA,
    Criterion,
    CriterionOptions,
    DampingOf,
    GroupOrder,
    Pruned,
    check_weight,
    criteria_table,
    keep_masked,
    refine,
)
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.masks import MaskPack, PackedMask
from sparsepass.passes.maths import InputStatistics, NMPattern, relative_error

_DEFAULT_REFINE = 10


@dataclass(frozen=True, kw_only=True)
class NMSparsify(Pass):
    """Put an N:M mask between each linear weight and the operations that read it.

    1. Rewrites nn.Linear, GPT-2's Conv1D, Conv1d and Conv2d (along input channels), and 3-D expert weights. The operations then
       read ``M .* W`` in place of the weight ``W``. N:M runs along the axis that the layer sums over, whatever the layout.
    2. Leaves alone embeddings and weights tied to them; output heads and routers, unless `targets` names them exactly; and
       weights whose input features are not a multiple of M, because no kernel takes a partial group.
    3. The criterion decides the mask. One that compensates (SparseGPT, ALPS) also changes the kept weights. The dropped weights
       stay as they were behind the mask: the graph does not read them, but later passes and training may.
    4. With ``compensate=false`` such a criterion gives its mask alone, over the original weights.
    5. With ``refine`` the kept weights are moved, all at once, to where they leave less output error. This works after any
       criterion, SparseGPT included, which only moves them column by column.
    6. With calibration, sites are rewritten in the order of the graph. Each one sees inputs that went through the rewritten
       ones before it.

    Args:
        pattern: N:M, at most N nonzeros in M consecutive weights.
        criterion: A name from the table of criteria; by default refined ``sparsegpt`` with calibration and ``magnitude``
            without.
        damping: What SparseGPT, ALPS, ProxSparse and refine add to the diagonal of the Gram matrix, as a fraction.
        damping_of: What it is a fraction of: the ``mean`` of the diagonal, as in the papers, or each entry's ``own`` value, so
            that columns with small inputs are damped no more than others. By default the mean.
        order: In which order SparseGPT visits groups: as ``given``, as in its paper, or by ``energy``: first those whose
            weights move the output most. By default as given.
        block_size: SparseGPT's columns per block. Speed only.
        compensate: Whether the kept weights may change. It has no effect on criteria that only choose.
        refine: Steps of conjugate gradients on the kept weights; needs calibration. By default 10 if the criterion is left
            open too. A named criterion does what its paper says, so that the default is then none.
        masks: Path of a mask pack (`sparsepass.passes.masks.pack`) instead of a criterion; pattern and layers are the pack's.
        any_model: Whether a pack is applied to weights that it was not made with.
        targets: See `Pass`.
        ignore: See `Pass`.

    Raises:
        SparsepassError: If the pattern cannot be, or the criterion is unknown.

    Source: methods.md section 1 of the design notes; magnitude; Wanda, arXiv 2306.11695; RIA (ICLR 2024); SparseGPT, arXiv
    2301.00774; ALPS, arXiv 2406.07831; ProxSparse, arXiv 2502.00258.
    """

    name = "nm_sparsify"
    promise = "approximate"

    pattern: str = "2:4"
    criterion: str | None = None
    damping: float = 0.01
    damping_of: DampingOf | None = None
    order: GroupOrder | None = None
    block_size: int = 128
    compensate: bool = True
    refine: int | None = None
    masks: str | None = None
    any_model: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        NMPattern.parse(self.pattern)
        _ = self._options  # complains of values out of range
        if self.criterion is not None and self.criterion not in CRITERIA and self.criterion not in (known := criteria_table()):
            raise SparsepassError(f"unknown criterion {self.criterion!r}{nearest(self.criterion, list(known))}")
        if self.masks is not None and self.criterion is not None:
            raise SparsepassError(f"masks come from {self.masks} or from the criterion {self.criterion}; give one of the two")
        if self.refine is not None and self.refine < 0:
            raise SparsepassError(f"refine must be a number of steps, 0 or more, got {self.refine}")
        if self.refine and (self.masks is not None or not self.compensate):
            other = "masks" if self.masks is not None else "compensate=false"
            raise SparsepassError(
                f"refine changes the weights that are kept, and {other} leaves them; leave one of the two out"
            )
        if self.any_model and self.masks is None:
            raise SparsepassError("any_model speaks of a mask pack; name it with masks=PATH, or leave any_model out")

    def resolve(self, *, has_calibration: bool) -> Self:
        """Choose the criterion: refined SparseGPT with calibration, magnitude without; none for a mask pack."""
        if self.masks is not None:
            patterns = {known.pattern for known in self._pack.masks.values()}
            return replace(self, pattern=patterns.pop()) if len(patterns) == 1 else self
        is_open = self.criterion is None and has_calibration and self.compensate
        return replace(
            self,
            criterion=self.criterion or ("sparsegpt" if has_calibration else "magnitude"),
            refine=self.refine if self.refine is not None else _DEFAULT_REFINE * is_open,
        )

    @property
    def needs(self) -> Needs:
        """What the criterion needs."""
        if self.masks is not None:
            return "nothing"
        return "gram" if self.refine else self._criterion.needs

    @property
    def changes_weights(self) -> bool:
        """Whether the kept weights change."""
        return self.criterion is not None and self.compensate and (self._criterion.compensates or bool(self.refine))

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Masks; and changed weights, where the criterion compensates or the weights are refined."""
        instead = f"write {self.name}{{criterion={self.criterion},compensate=false}}"
        return {Condition.MASKED: ""} | ({Condition.CHANGED: instead} if self.changes_weights else {})

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Weights that are rounded."""
        return {Condition.QUANTIZED: "weights are pruned before they are rounded"}

    @property
    def _criterion(self) -> Criterion:
        assert self.criterion is not None, "resolve() runs before anything else"
        return CRITERIA.get(self.criterion) or criteria_table()[self.criterion]

    @property
    def _options(self) -> CriterionOptions:
        return CriterionOptions(
            damping=self.damping,
            damping_of=self.damping_of or "mean",
            order=self.order or "given",
            block_size=self.block_size,
        )

    @property
    def _pack(self) -> MaskPack:
        assert self.masks is not None
        return _read_pack(self.masks, os.stat(self.masks).st_mtime_ns if os.path.exists(self.masks) else None)

    def check(self, program: Program, before: Sequence[Pass]) -> None:
        """Refuse sites that have a mask already, or that an earlier pass will give one; and a pack of another model."""
        if self.masks is not None:
            self._pack.check_model(program, values=not self.any_model)
        earlier = [item for item in before if Condition.MASKED in item.provides]
        mine = {site.weight for site in self.choose(program)[0]}
        done = mine & program.sparse.keys()
        for other in earlier:
            done |= mine & {site.weight for site in other.choose(program)[0]}
        if done:
            raise PassError(
                self.name,
                sorted(done)[0],
                f"{len(done)} of its layers have been made sparse already; to prune other layers with other options, name them "
                "in targets; to prune these anew, start from the dense model",
            )

    def refusal(self, site: Site, program: Program) -> str | None:
        """Features that M does not divide, and convolutions in groups where statistics are needed."""
        if self.masks is not None:
            return None if site.weight in self._pack.masks else f"not in the mask pack {self.masks}"
        m = NMPattern.parse(self.pattern).m
        if site.in_features % m:
            what = "input channels of a group" if site.layout in ("conv1d", "conv2d") else "in_features"
            return f"{what} {site.in_features} is not a multiple of {m}"
        if site.groups > 1 and self.criterion is not None and self.needs != "nothing":
            what = "refine" if self._criterion.needs == "nothing" else self.criterion
            return f"a convolution in {site.groups} groups: {what} has no statistics for each group; use magnitude, not refined"
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Prune the weights of a group. Where rows do not depend on each other, siblings are stacked, to share one inverse."""
        weights = [program.tensor(site.weight).detach() for site in group.sites]
        matrices = [site.to_matrix(w) for site, w in zip(group.sites, weights, strict=True)]
        if self.masks is not None:
            pruned = [self._take(self._pack.masks[site.weight], m) for site, m in zip(group.sites, matrices, strict=True)]
        elif matrices[0].dim() == 3:
            pruned = [self._prune_experts(matrices[0], context.statistics)]
        elif not self._criterion.rows_are_independent:
            pruned = [self._prune(matrix, context.statistics) for matrix in matrices]
        else:
            stacked = self._prune(torch.cat(matrices) if len(matrices) > 1 else matrices[0], context.statistics)
            parts = (t.split([len(matrix) for matrix in matrices]) for t in (stacked.weight_OI, stacked.mask_OI))
            pruned = [Pruned(weight_OI=w, mask_OI=mask, note=stacked.note) for w, mask in zip(*parts, strict=True)]
        if not self.compensate:
            kept = [keep_masked(matrix, found.mask_OI) for matrix, found in zip(matrices, pruned, strict=True)]
            pruned = [replace(masked, note=found.note) for masked, found in zip(kept, pruned, strict=True)]
        facts: dict[str, Facts] = {}
        for site, weight, matrix, result in zip(group.sites, weights, matrices, pruned, strict=True):
            facts[site.name] = self._facts(matrix, result, context)  # before the matrix, a view of the weight, changes
            mask = site.from_matrix(result.mask_OI)
            new = site.from_matrix(result.weight_OI)
            is_same = torch.equal(new, torch.ops.sparsepass.masked_weight(weight, mask))
            if not is_same or bool(((weight == 0) & weight.signbit()).any()):  # -0.0 becomes +0.0
                program.write_tensor(site.weight, torch.where(mask, new, weight))
            pattern = self.pattern if self.masks is None else self._pack.masks[site.weight].pattern
            attach_mask(program, site, mask, pattern)
        return facts

    @staticmethod
    def _take(known: PackedMask, weight_OI: Tensor) -> Pruned:
        check_weight(weight_OI)
        return keep_masked(weight_OI, known.mask().to(weight_OI.device))

    def _prune(self, weight_OI: Tensor, statistics: Sequence[InputStatistics]) -> Pruned:
        known = statistics[0] if statistics else None
        pruned = self._criterion.function(weight_OI, known, NMPattern.parse(self.pattern), self._options)
        if not self.refine:
            return pruned
        return refine(
            weight_OI, pruned, known, damping=self.damping, damping_of=self._options.damping_of, num_steps=self.refine
        )

    def _prune_experts(self, weight_EOI: Tensor, statistics: Sequence[InputStatistics]) -> Pruned:
        """Each expert by the tokens that were routed to it; by magnitude where there were none."""
        if not statistics:
            return self._prune(weight_EOI, ())
        results, unseen = [], []
        for index, (weight_OI, known) in enumerate(zip(weight_EOI, statistics, strict=True)):
            if known.num_tokens == 0:
                unseen.append(index)
                results.append(CRITERIA["magnitude"].function(weight_OI, None, NMPattern.parse(self.pattern), self._options))
            else:
                results.append(self._prune(weight_OI, (known,)))
        notes = {r.note for r in results if r.note}
        if unseen:
            notes.add(f"experts {unseen} saw no calibration token and were pruned by magnitude")
        return Pruned(
            weight_OI=torch.stack([r.weight_OI for r in results]),
            mask_OI=torch.stack([r.mask_OI for r in results]),
            note="; ".join(sorted(notes)) or None,
        )

    def _facts(self, matrix: Tensor, result: Pruned, context: GroupContext) -> Facts:
        facts: dict[str, float | int | str] = {}
        if context.measure:
            pairs = zip(matrix, result.weight_OI, strict=True) if matrix.dim() == 3 else [(matrix, result.weight_OI)]
            parts = ((dense_OI.float() - kept_OI.float(), dense_OI.float()) for dense_OI, kept_OI in pairs)
            facts["relative_error"] = relative_error(parts, context.statistics)
        if context.statistics:
            facts["tokens"] = sum(known.num_tokens for known in context.statistics)
        if result.note:
            facts["note"] = result.note
        return facts


@functools.lru_cache(maxsize=4)
def _read_pack(path: str, modified_ns: int | None) -> MaskPack:
    """Read a pack once for all its layers, and anew if the file has changed."""
    del modified_ns
    return MaskPack.load(path)
