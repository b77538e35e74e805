"""The pass `quantize`: weights are rounded to a grid of integers, or of fp8.

Tensor shapes: E experts, O out, I in, G groups of a row that share a scale.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from sparsepass.graph import PassError, Program, Site, SparsepassError
from sparsepass.graph.program import masked_weight
from sparsepass.graph.rewrite import attach_branch_grid, attach_grid
from sparsepass.graph.rounding import FORMATS, NumberFormat, RoundingGrid, fit_scales, round_to_nearest
from sparsepass.passes.base import Facts, GroupContext, Needs, Pass
from sparsepass.passes.conditions import Condition
from sparsepass.passes.criteria import Clip, CriterionOptions, InverseHessian, RoundedWeight, check_weight, round_jointly
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.maths import InputStatistics, NMPattern, clipped_scales, nm_mask, num_violations, relative_error

_GROUP_SIZES = (0, 16, 32, 64, 128)
_DEFAULTS: Mapping[NumberFormat, tuple[int, int]] = {"int": (4, 64), "fp8": (8, 0)}
"""Bits and group size."""
_BRANCH_GRID = RoundingGrid(bits=8, group_size=0)


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Round weights to integers of 8 or 4 bits, or to fp8, one scale for each group of a row.

    1. Rewrites every linear layer, dense or behind a mask: nn.Linear, GPT-2's Conv1D, convolutions, 3-D expert weights. The
       operations then read ``(q - z) s`` in place of the weight, where ``q = round(w / s) + z``; of fp8 ``q s``, where q is the
       nearest of its numbers.
    2. A weight that a mask drops is 0 when it is rounded, and its number is that of 0 exactly, never -0.0. So N:M stays.
    3. Leaves alone embeddings and weights tied to them; output heads and routers, unless `targets` names them exactly.
    4. The weight itself stays in the program behind the rounding, and the graph rounds it. Numbers are made of it once, when
       they are written. SLoRB branches stay as they are, or are rounded likewise.
    5. By ``joint`` weights change before they are rounded: column by column, the later ones make up for what rounding and
       dropping move. With ``masks=choose`` the same loop prunes anew, from the dense model's weights, by the pattern of the
       mask that is there.
    6. An expert that saw no calibration token is rounded to the nearest.

    Args:
        format: ``int``, or ``fp8``: floating-point numbers of 8 bits (e4m3). Weights alone are rounded, inputs are not.
        bits: 8 or 4; by default 4, and 8 of fp8, which has no others.
        group_size: Input features that share a scale: 16, 32, 64 or 128, or 0 for one scale a row. Features that are left over
            at the end of a row have a scale of their own. By default 64, and 0 for fp8.
        symmetric: Whether integers are signed and 0 is their middle. Otherwise each group has a zero point; fp8 has none.
        clip: Search for each group how much of its range is to be held, from all to 55%, by the error of the ``weights`` or,
            with calibration, of the ``outputs``. By default all of it is.
        method: ``rtn`` rounds each weight to the nearest; ``joint`` is SparseGPT's loop with rounding, and GPTQ where there is
            no mask. It needs calibration.
        masks: Whether ``joint`` is to ``keep`` masks or ``choose`` them anew.
        slorb: Whether SLoRB branches ``keep`` their floating-point numbers, or ``quantize`` rounds S to int8, one scale a row.
            A branch is rounded with the layer that it stands beside, so `targets` and `ignore` hold for it too.
        damping: Of ``joint``: added to the diagonal of the inputs' Gram matrix, as a fraction of its mean.
        targets: See `Pass`.
        ignore: See `Pass`.

    Raises:
        SparsepassError: If a value is out of range.

    Source: methods.md section 4 of the design notes; joint: SparseGPT, arXiv 2301.00774, and GPTQ, arXiv 2210.17323; clipping:
    AWQ, arXiv 2306.00978; fp8: arXiv 2209.05433.
    """

    name = "quantize"
    promise = "approximate"

    format: NumberFormat = "int"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    clip: Clip | None = None
    method: Literal["rtn", "joint"] = "rtn"
    masks: Literal["keep", "choose"] = "keep"
    slorb: str = "keep"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in (None, *_GROUP_SIZES):
            sizes = ", ".join(map(str, _GROUP_SIZES[1:]))
            raise SparsepassError(f"quantize: group_size expects {sizes}, or 0 for one scale a row, got {self.group_size}")
        for option, known in (
            ("format", FORMATS),
            ("clip", (None, *get_args(Clip))),
            ("method", ("rtn", "joint")),
            ("masks", ("keep", "choose")),
        ):
            if getattr(self, option) not in known:
                raise SparsepassError(f"quantize: {option} expects one of {known}, got {getattr(self, option)!r}")
        if self.slorb == "fold":
            raise SparsepassError(
                "quantize: slorb=fold is done where integers are written: export with onnx{form=matmulnbits,fold_slorb=true}, "
                "and leave slorb out"
            )
        if self.slorb not in ("keep", "quantize"):
            raise SparsepassError(f"quantize: slorb expects keep or quantize, got {self.slorb!r}")
        if self.masks == "choose" and self.method != "joint":
            raise SparsepassError("quantize: masks=choose is for method=joint, which prunes and rounds in one loop")
        _ = self.grid, self._options  # complain of values out of range

    def resolve(self, *, has_calibration: bool) -> Self:
        """Choose bits and group size by the format."""
        del has_calibration
        return replace(self, bits=self.grid.bits, group_size=self.grid.group_size)

    @property
    def grid(self) -> RoundingGrid:
        """What weights are rounded to."""
        bits, group_size = _DEFAULTS[self.format]
        return RoundingGrid(
            bits=bits if self.bits is None else self.bits,
            group_size=group_size if self.group_size is None else self.group_size,
            symmetric=self.symmetric,
            format=self.format,
        )

    @property
    def needs(self) -> Needs:
        """The Gram matrix, for `joint` and where clipping goes by the outputs."""
        return "gram" if self.clip == "outputs" or self.method == "joint" else "nothing"

    @property
    def requires(self) -> Mapping[Condition, str]:
        """Masks of the same call, if they are to be chosen anew; branches, if they are to be rounded."""
        required = {}
        if self.masks == "choose":
            why = "masks=choose prunes anew from the dense model's weights, so start from that, in the same call as {makers}"
            required[Condition.MASKED_NOW] = why
        if self.slorb == "quantize":
            required[Condition.BRANCHED] = "slorb=quantize rounds SLoRB branches, and there are none; leave it out"
        return required

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Masks that are being learned, and a second time; if masks are chosen, branches that were fitted to others."""
        forbidden = {Condition.LEARNED: "a mask that is being learned still moves, so train it first"}
        if not self.targets:
            forbidden[Condition.QUANTIZED] = "weights are rounded once"
        if self.masks == "choose":
            forbidden[Condition.BRANCHED] = "a branch fits what the mask drops, and masks=choose makes another mask"
        return forbidden

    @property
    def provides(self) -> Mapping[Condition, str]:
        """Rounded weights; and changed ones, by `joint`."""
        changed = {Condition.CHANGED: ""} if self.method == "joint" else {}
        return {Condition.QUANTIZED: ""} | changed

    @property
    def _options(self) -> CriterionOptions:
        return CriterionOptions(damping=self.damping)

    def check(self, program: Program, before: Sequence[Pass]) -> None:
        """Refuse statistics that would be those of blocks before they are trained."""
        del program
        if self.needs != "nothing" and any(Condition.TRAINED_NOW in item.provides for item in before):
            trained = next(item.name for item in before if Condition.TRAINED_NOW in item.provides)
            raise PassError(self.name, "pipeline", f"it needs the inputs of trained blocks; put it into a call after {trained}")

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers that are quantized, and convolutions in groups where statistics are needed."""
        if site.weight in program.quantized:
            return f"it is quantized already ({program.quantized[site.weight].grid.text})"
        if site.groups > 1 and self.needs != "nothing":
            return f"a convolution in {site.groups} groups has no statistics for each group"
        return None

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Fit the scales of each layer, and round its weight to them in the graph."""
        facts: dict[str, Facts] = {}
        hessians: dict[tuple[int, torch.dtype], InverseHessian] = {}
        for site in group.sites:
            state = program.sparse.get(site.weight)
            weight = site.to_matrix(masked_weight(program, site.weight))
            kept: NMPattern | Tensor = torch.ones_like(weight, dtype=torch.bool)
            if state is not None:
                kept = weight != 0 if state.mask is None else site.to_matrix(program.tensor(state.mask))
            if state is not None and self.masks == "choose":
                weight, kept = _original(site, program, context), NMPattern.parse(state.pattern)
            check_weight(weight)
            found = [
                self._rounded(matrix_OI, kept if isinstance(kept, NMPattern) else mask_OI, known, hessians, index)
                for index, (matrix_OI, mask_OI, known) in enumerate(_matrices(weight, kept, context.statistics))
            ]
            facts[site.name] = self._facts(weight, found, context)
            scales, zeros = _stacked(found, weight.dim(), "scales_OG"), _stacked(found, weight.dim(), "zeros_OG")
            assert scales is not None
            if self.method == "joint":
                self._write(program, site, weight, found)
            attach_grid(program, site, self.grid, scales, None if zeros is None else zeros.to(torch.uint8))
            if self.slorb == "quantize" and state is not None and state.branch is not None:
                facts[site.name] = {**facts[site.name], **_round_branch(program, site, state.branch.weight)}
        return facts

    def ensures(self, site: Site, program: Program) -> str | None:
        """A weight that was N:M is so still."""
        state = program.sparse.get(site.weight)
        if state is None:
            return None
        broken = num_violations(masked_weight(program, site.weight), NMPattern.parse(state.pattern), state.axis)
        return f"{broken} groups of the rounded weight are not {state.pattern}" if broken else None

    def _rounded(
        self,
        weight_OI: Tensor,
        kept: NMPattern | Tensor,
        known: InputStatistics | None,
        hessians: dict[tuple[int, torch.dtype], InverseHessian],
        index: int,
    ) -> RoundedWeight:
        """One matrix with its scales. Rounded to the nearest, it is left to the graph to be rounded."""
        gram_II = None if known is None or not known.num_tokens else known.gram_II
        if self.method == "joint" and known is not None and gram_II is not None:
            key = index, torch.promote_types(weight_OI.dtype, torch.float32)
            if key not in hessians:
                gram_of_its_type_II = gram_II.to(device=weight_OI.device, dtype=key[1])
                hessians[key] = InverseHessian.of(gram_of_its_type_II, known.num_tokens, self._options)
            return round_jointly(weight_OI, hessians[key], self.grid, kept=kept, clip=self.clip, gram_II=gram_II)
        if isinstance(kept, NMPattern):
            kept = nm_mask(weight_OI.abs(), kept)
        weight_OI = weight_OI.masked_fill(~kept, 0)
        if self.clip is None:
            scales_OG, zeros_OG = fit_scales(weight_OI, self.grid)
        else:
            scales_OG, zeros_OG = clipped_scales(weight_OI, self.grid, gram_II if self.clip == "outputs" else None)
        note = "an expert saw no calibration token and was rounded to the nearest" if self.method == "joint" else None
        return RoundedWeight(weight_OI=weight_OI, mask_OI=kept, scales_OG=scales_OG, zeros_OG=zeros_OG, note=note)

    def _facts(self, weight: Tensor, found: Sequence[RoundedWeight], context: GroupContext) -> Facts:
        facts: dict[str, float | int | str] = {}
        if context.measure:
            pairs = []
            for whole_OI, each in zip(weight.float() if weight.dim() == 3 else weight.float()[None], found, strict=True):
                rounded = round_to_nearest(each.weight_OI, self.grid, each.scales_OG, each.zeros_OG)
                pairs.append((rounded.weight_OI - whole_OI, whole_OI))
            facts["relative_error"] = relative_error(pairs, context.statistics)
        if notes := sorted({each.note for each in found if each.note}):
            facts["note"] = "; ".join(notes)
        return facts

    def _write(self, program: Program, site: Site, weight: Tensor, found: Sequence[RoundedWeight]) -> None:
        """Put weights in the place of those that were there, and masks that were chosen; what masks drop stays behind them."""
        new, kept = (_stacked(found, weight.dim(), name) for name in ("weight_OI", "mask_OI"))
        assert new is not None
        assert kept is not None
        behind = weight if self.masks == "choose" else site.to_matrix(program.tensor(site.weight).detach())
        program.write_tensor(site.weight, site.from_matrix(torch.where(kept, new, behind)))
        state = program.sparse.get(site.weight)
        if self.masks == "choose" and state is not None and state.mask is not None:
            program.write_tensor(state.mask, site.from_matrix(kept))


def _round_branch(program: Program, site: Site, name: str) -> Facts:
    """Round S of a branch to int8, and say by how much that moves it."""
    branch_OR = program.tensor(name).detach()
    check_weight(branch_OR)
    rounded = round_to_nearest(branch_OR, _BRANCH_GRID)
    attach_branch_grid(program, site, _BRANCH_GRID, rounded.scales_OG)
    whole_OR = branch_OR.float()
    return {"branch": _BRANCH_GRID.text, "branch_error": relative_error([(rounded.weight_OI - whole_OR, whole_OR)], ())}


def _original(site: Site, program: Program, context: GroupContext) -> Tensor:
    if site.weight not in context.originals:
        raise SparsepassError(
            f"masks=choose needs the original weight, which {program.sparse[site.weight].changed_by} has changed; use "
            "masks=keep"
        )
    return site.to_matrix(context.originals[site.weight])


def _matrices(
    weight: Tensor, kept: NMPattern | Tensor, statistics: Sequence[InputStatistics]
) -> Iterator[tuple[Tensor, Tensor, InputStatistics | None]]:
    """A weight as matrices ``[O, I]``, one for each expert, with the mask (or anything, where there is none) and its inputs."""
    masks = weight if isinstance(kept, NMPattern) else kept
    if weight.dim() == 2:
        weight, masks = weight[None], masks[None]
    for index, (matrix_OI, mask_OI) in enumerate(zip(weight, masks, strict=True)):
        yield matrix_OI, mask_OI, statistics[index] if statistics else None


def _stacked(found: Sequence[RoundedWeight], dims: int, name: str) -> Tensor | None:
    """A tensor of all matrices, with an axis of experts if the weight has one."""
    tensors = [getattr(each, name) for each in found]
    if tensors[0] is None:
        return None
    return torch.stack(tensors) if dims == 3 else tensors[0]
