"""The pass `reconstruct`: it trains the kept weights of each block until the block gives what the dense block gave."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsepass.graph import Program, Site, SparsepassError
from sparsepass.passes.base import BlockWork, Facts, GroupContext, Pass, not_sparse
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import NMPattern, Trained, canonical_zeros, fit, nm_mask, token_error


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Pass):
    """Train the kept weights of each block on the calibration data until its outputs are near the dense model's.

    1. Works block by block; a block is a numbered module, such as ``model.layers.0``. The other passes of the same call rewrite
       a block first. Then this pass trains it, before the next block is pruned.
    2. The block's inputs come from the rewritten blocks before it. Its targets are the outputs of the block in the dense model.
    3. Trains, by AdamW, the kept weights of masked layers, their branches, and the norms and biases that belong to the block
       alone. Nothing else changes; what stands behind the masks stays as it was.
    4. Never makes a block worse: a share of the calibration data is held out of training, and where the error there has not
       fallen, the block stays as it was.

    Memory: one block's weights four times in fp32, the activations of one batch, and the outputs of one block for all
    calibration data, of the dense and of the rewritten model.

    Args:
        steps: AdamW steps for each block, one batch each.
        lr: Peak learning rate, as a fraction of the root mean square of each tensor, so that one value serves all models.
        batch_size: Sequences to a step. Calibration runs with at most so many too.
        masks: ``fixed``, or ``moving``: then the mask is made anew of the largest weights every `refresh_steps` steps.
        refresh_steps: Steps between refreshes of moving masks.
        vectors: Whether norms and biases train.
        seed: Of the order of batches.
        targets: See `Pass`.
        ignore: See `Pass`.

    Raises:
        SparsepassError: If a value is out of range.

    Source: block-wise fine-tuning of sparse models, EBFT, arXiv 2402.12419; the error that counts each token the same, the
    steps relative to the weights and the moving masks are ours.
    """

    name = "reconstruct"
    promise = "approximate"
    needs = "inputs"  # of each block

    steps: int = 64
    lr: float = 0.01
    batch_size: int = 2
    masks: Literal["fixed", "moving"] = "fixed"
    refresh_steps: int = 5
    vectors: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("steps", "batch_size", "refresh_steps"):
            if getattr(self, option) < 1:
                raise SparsepassError(f"reconstruct: {option} expects a number of at least 1, got {getattr(self, option)}")
        if not 0 < self.lr < 1:
            raise SparsepassError(f"reconstruct: lr expects a fraction of the weights' size between 0 and 1, got {self.lr}")

    @property
    def block_work(self) -> BlockWork:
        """Its training steps and their size."""
        return BlockWork(steps=self.steps, batch_size=self.batch_size)

    @property
    def requires(self) -> Mapping[Condition, str]:
        """Masks that are made in the same call, which starts from the dense model."""
        return {
            Condition.MASKED_NOW: "reconstruct compares with the dense model, so start from that, in the same call as {makers}"
        }

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Folded masks, rounded weights, masks that are learned over the original weights, and a second time."""
        return {
            Condition.FOLDED_NOW: "reconstruct needs the masks",
            Condition.QUANTIZED: "reconstruct trains weights, which are rounded afterwards",
            Condition.LEARNED: "reconstruct changes weights, and learned masks stand over the original ones",
            Condition.TRAINED_NOW: "each block is trained once",
        }

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Trained weights."""
        return {Condition.TRAINED_NOW: "", Condition.CHANGED: "leave it out"}

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers that are not sparse."""
        state = program.sparse.get(site.weight)
        if state is None or state.mask is None:
            return not_sparse(site)
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Train the sites of one block."""
        run = context.block
        assert run is not None
        mask_names: dict[str, str] = {}
        tensors: dict[str, Trained] = {}
        for site in group.sites:
            state = program.sparse[site.weight]
            assert state.mask is not None
            mask_names[site.weight] = state.mask
            pattern = NMPattern.parse(state.pattern)
            refresh = functools.partial(_largest, site, pattern) if self.masks == "moving" else None
            tensors[site.weight] = Trained(start=program.tensor(site.weight), mask=program.tensor(state.mask), refresh=refresh)
            if state.branch is not None:
                tensors[state.branch.weight] = Trained(start=program.tensor(state.branch.weight))
        if self.vectors:
            tensors |= {name: Trained(start=program.tensor(name)) for name in run.own_vectors()}

        def error(batch: int, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
            known = dict(values) | {mask_names[name]: mask for name, mask in masks.items()}
            pairs = zip(run.outputs(batch, known), run.targets(batch), strict=True)
            errors = [token_error(output, target, run.valid_BT(batch)) for output, target in pairs]
            return torch.stack(errors).mean()

        found = fit(
            error,
            tensors,
            run.num_batches,
            steps=self.steps,
            lr=self.lr,
            refresh_steps=self.refresh_steps,
            seed=self.seed,
            advance=run.advance,
        )
        facts: dict[str, float | int | str] = {"block": run.name, "error_before": found.before, "error_after": found.after}
        if not found.is_better:
            facts["note"] = "training made the block no better on the data held out, so it stays as it was; try a smaller lr"
        else:
            for name, value in found.values.items():
                mask = found.masks.get(name)
                if mask is None:
                    program.write_tensor(name, value)
                    continue
                behind = torch.where(program.tensor(mask_names[name]), context.originals.get(name, value), program.tensor(name))
                program.write_tensor(name, torch.where(mask, canonical_zeros(value), behind.detach()))
                program.write_tensor(mask_names[name], mask)
        return {site.name: facts for site in group.sites}


def _largest(site: Site, pattern: NMPattern, weight: Tensor) -> Tensor:
    """The mask of a site's largest weights."""
    return site.from_matrix(nm_mask(site.to_matrix(weight).abs(), pattern))
