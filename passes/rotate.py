"""The pass `rotate`: orthogonal transforms that concentrate importance before pruning.

Shape suffixes: O out, I in, C channels of a rotation, N times that they lie in a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from sparsepass.graph import PassError, Program, Site, SparsepassError
from sparsepass.graph.channels import ChannelPlace, RotationGroup, ScaleGroup, channel_flow, rotated, scaled, uneven_gains
from sparsepass.graph.rewrite import shared_copy
from sparsepass.graph.stream import matrices_between, untie_head
from sparsepass.graph.support import item_to_text
from sparsepass.passes.base import Facts, GroupContext, Pass, matches
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import Block, SiteGroup, find_blocks, site_groups
from sparsepass.passes.fold_norms import fold_gain, norm_gain, norms_with_gain
from sparsepass.passes.maths import TurnedLayer, dampings, entropies, learn_rotations

Form = Literal["model", "blocks"]
Salience = Literal["sparsegpt", "wanda"]
_DAMPING: Final = 0.01
_NOT_LOWERED: Final = "no rotation was found that concentrates what its weights count"
_DESTROYS: Final = "mixing channels would destroy the N:M pattern"


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Rotate channels so that fewer weights count more, and pruning the rest costs less, without any effect on the outputs.

    1. Rewrites layers that make or read channels which an orthogonal matrix can mix: channel flow finds the residual stream,
       where its norms are RMS norms (or LayerNorms, whose mean is then kept), and heads of values, one for each key/value head.
       Everything that makes or reads the channels takes the matrix up, embeddings and output heads included.
    2. Folds gains of norms that stand in the way, as `fold_norms` does. Where the last one cannot be folded because the output
       head is tied to the embedding, the head gets a weight of its own.
    3. ``form=model``: one matrix for the residual stream of the whole model, and no operation more. ``form=blocks``: one for
       each block, as in the paper, and a matrix in front of each block but the first that leads from one to the next. The
       model's own class has no place for these; the program has.
    4. Matrices are learned from the identity, on the entropy of the normalised salience of weights: within rows where a layer's
       input is rotated, within columns where its output is, both where both are. The statistics are those of calibration.
    5. Leaves channels alone, and folds and unties nothing for them, where the learned matrix does not lower the entropy, and
       where a layer to be ignored makes or reads them. Experts and convolutions take matrices up, and do not count in the
       entropy.
    6. Refuses programs with masks, whose pattern it would destroy, and layers that it has rotated before.

    Args:
        form: ``model`` or ``blocks``.
        salience: Whose: ``sparsegpt`` (``w^2 / diag(H^-1)``) or ``wanda`` (``w^2 diag(H)``).
        steps: Of Adam, for each set of matrices that depend on each other.
        lr: Learning rate; it falls to 0.
        layers_per_step: Layers that a step looks at, those that share an input counted as one.
        seed: Of the choice of these layers.
        targets: Layers whose salience counts; see `Pass`.
        ignore: Layers that are not to change.

    Raises:
        SparsepassError: If a value is out of range.

    Source: DenoiseRotator, arXiv 2505.23049; methods.md section 7. Its schedule of the learning rate is not known to us.

    Exactness: equal but for rounding: 1e-9 in float64 and 1e-5 in float32, relative, measured on the outputs. Weights of 16
    bits are computed in float64 and rounded once; how far that moves the outputs is in the report.
    """

    name = "rotate"
    promise = "exact"
    needs = "gram"
    prepares = True
    keeps_hidden_states = False

    form: Form = "model"
    salience: Salience = "sparsegpt"
    steps: int = 100
    lr: float = 0.01
    layers_per_step: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in (("form", get_args(Form)), ("salience", get_args(Salience))):
            if getattr(self, field) not in known:
                raise SparsepassError(f"{field} expects one of {', '.join(known)}, got {getattr(self, field)!r}")
        for field in ("steps", "layers_per_step"):
            if getattr(self, field) < 1:
                raise SparsepassError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 < self.lr < 1:
            raise SparsepassError(f"lr must lie between 0 and 1, got {self.lr}")

    @property
    def num_steps(self) -> int:
        """Those of Adam."""
        return self.steps

    @property
    def forbids(self) -> Mapping[Condition, str]:
        """Masks, and zeros that are in the weights already."""
        return {Condition.MASKED: _DESTROYS, Condition.FOLDED: _DESTROYS}

    def check(self, program: Program, before: Sequence[Pass]) -> None:
        """Refuse a model whose blocks are no chain."""
        del before
        if isinstance(reason := _plan(program, self.form), str):
            raise PassError(self.name, "form", reason)

    def refusal(self, site: Site, program: Program) -> str | None:
        """Layers none of whose channels can be mixed."""
        if self.has_run(site, program, _NOT_LOWERED):
            return f"an earlier {self.name} has rotated it"
        plan = _plan(program, self.form)
        if isinstance(plan, str):
            return plan
        reasons = [self._stays(group, plan, program) for group in plan.groups if _places_in(group, site)]
        if None in reasons:
            return None
        unmixed = [why for (tensor, axes), why in plan.unmixed.items() if tensor == site.weight and site.nm_axis in axes]
        return (reasons + unmixed + ["nothing that makes or reads its channels is known"])[0]

    def groups(self, program: Program, sites: Sequence[Site]) -> list[SiteGroup]:
        """All layers together: the residual stream goes through the whole model."""
        return [SiteGroup(sites=tuple(sites))] if sites else []

    def rewrite(self, program: Program, group: SiteGroup, context: GroupContext) -> dict[str, Facts]:
        """Learn the matrices; then untie, fold, and put them in their places, as far as some are better than none."""
        plan = _plan(program, self.form)
        assert isinstance(plan, _RotationPlan)
        turning = [found for found in plan.groups if self._stays(found, plan, program) is None]
        gains: dict[str, tuple[ChannelPlace, Tensor]] = {}
        for tensor in {tensor for found in turning for tensor in uneven_gains(program, found)}:
            norm = plan.foldable[tensor]
            gains |= {place.tensor: (place, norm_gain(program, norm)) for place in norm.places if place.reads}
        layers, names = self._layers(program, group.sites, turning, gains, context)
        found = self._learned(turning, layers, context)
        folding = sorted({tensor for number in found for tensor in uneven_gains(program, turning[number])})
        if plan.unties and folding:
            untie_head(program)
        if any(place.tensor in plan.between for number in found for place in turning[number].places):
            _put_matrices(program, plan.width, program.device)
        for tensor in folding:
            fold_gain(program, plan.foldable[tensor], item_to_text(self.name, self))
        none = {number: torch.eye(its.num_channels) for number, its in enumerate(turning)}
        before, after = entropies(layers, none), entropies(layers, none | found)
        changes: dict[str, list[tuple[ChannelPlace, Tensor]]] = {}
        for number, matrix in found.items():
            for place in turning[number].places:
                changes.setdefault(place.tensor, []).append((place, matrix))
        for tensor, its in changes.items():
            stored = program.tensor(tensor).detach()
            wide = stored.double()
            for place, matrix in its:
                wide = rotated(wide, place, matrix.to(wide.device))
            program.write_tensor(tensor, wide.to(stored.dtype))
        facts: dict[str, Facts] = {}
        for site in group.sites:
            if site.weight not in changes:
                context.unchanged[site.name] = _NOT_LOWERED
        for its_names, old, new in zip(names, before, after, strict=True):
            facts |= {name: {"entropy_before": old, "entropy_after": new} for name in its_names}
        return facts

    def _stays(self, group: RotationGroup, plan: "_RotationPlan", program: Program) -> str | None:
        """Why channels of a group are not mixed."""
        touched = {place.tensor for place in (*group.places, *group.gains)}
        for site in program.sites() if self.ignore else ():
            if site.weight in touched and any(matches(pattern, site) for pattern in self.ignore):
                return f"{site.name} makes or reads the same channels and is to be ignored"
        return plan.held_by_gain(group, program)

    def _layers(
        self,
        program: Program,
        sites: Sequence[Site],
        turning: Sequence[RotationGroup],
        gains: Mapping[str, tuple[ChannelPlace, Tensor]],
        context: GroupContext,
    ) -> tuple[list[TurnedLayer], list[list[str]]]:
        """What is learned from: layers that share an input as one, and their names."""
        stacks: dict[tuple[object, ...], list[Site]] = {}
        for site in sites:
            if site.layout in ("linear", "conv1d_hf") and context.by_weight.get(site.weight):
                read = frozenset(n for n, its in enumerate(turning) for place in _places_in(its, site) if place.reads)
                stacks.setdefault((id(context.by_weight[site.weight]), read), []).append(site)
        layers = []
        for stack in stacks.values():
            statistics = context.by_weight[stack[0].weight][0]
            device, gram_II = statistics.device, statistics.mean_gram()
            weights = [program.tensor(site.weight).detach() for site in stack]
            if stack[0].weight in gains:  # as if the gain were folded; a bias of the norm that would move is left in
                place, gain = gains[stack[0].weight]
                weights = [
                    scaled(weight.double(), replace(gains[site.weight][0], reads=False), gain).to(weight.dtype)
                    for site, weight in zip(stack, weights, strict=True)
                ]
                factors_I = torch.ones(len(gram_II), device=device)
                each = torch.where(gain == 0, 1.0, gain).float().to(device)
                factors_I[torch.from_numpy(place.positions[:, 0]).to(device)] = each
                gram_II = gram_II / factors_I.outer(factors_I)
            reads: dict[int, Tensor] = {}
            makes: dict[int, Tensor] = {}
            start = 0
            for site in stack:
                for number, its in enumerate(turning):
                    for place in _places_in(its, site):
                        positions_CN = torch.from_numpy(place.positions).to(device)
                        if place.reads:
                            reads[number] = positions_CN
                        else:
                            known = [makes[number]] if number in makes else []
                            makes[number] = torch.cat([*known, positions_CN + start], dim=1)
                start += site.out_features
            matrices = [site.to_matrix(each).to(device, torch.float32) for site, each in zip(stack, weights, strict=True)]
            metric_II = _inverse(gram_II) if self.salience == "sparsegpt" else gram_II
            layers.append(
                TurnedLayer(
                    weight_OI=torch.cat(matrices) if len(matrices) > 1 else matrices[0],
                    metric_II=metric_II if reads else metric_II.diagonal().clone(),
                    divides=self.salience == "sparsegpt",
                    reads=reads,
                    makes=makes,
                )
            )
        return layers, [[site.name for site in stack] for stack in stacks.values()]

    def _learned(
        self, turning: Sequence[RotationGroup], layers: Sequence[TurnedLayer], context: GroupContext
    ) -> dict[int, Tensor]:
        """Number -> matrix, of those that are better than none; sets that do not depend on each other one after the other."""
        parts: list[tuple[frozenset[int], list[TurnedLayer]]] = []
        for layer in layers:
            same = [part for part in parts if part[0] & layer.rotations]
            numbers = layer.rotations.union(*(part[0] for part in same))
            parts = [part for part in parts if not part[0] & layer.rotations]
            parts.append((numbers, [*(one for part in same for one in part[1]), layer]))
        done = [0]

        def advance() -> None:
            done[0] += 1
            if done[0] % len(parts) == 0:
                context.advance(f"step {done[0]} of {self.steps * len(parts)}")

        found: dict[int, Tensor] = {}
        for numbers, its in parts:
            sizes = {number: (turning[number].num_channels, turning[number].keeps_mean) for number in sorted(numbers)}
            learned = learn_rotations(
                sizes, its, steps=self.steps, lr=self.lr, layers_per_step=self.layers_per_step, seed=self.seed, advance=advance
            )
            if any(not torch.equal(matrix, torch.eye(len(matrix)).to(matrix)) for matrix in learned.values()):
                found |= learned
        return found


@dataclass(frozen=True, kw_only=True)
class _RotationPlan:
    """What can be rotated, once a head has been untied and matrices have been put between blocks.

    Attributes:
        groups: Channels that can be mixed.
        unmixed: Why others cannot.
        foldable: Gains that can be folded.
        unties: Whether the head has to be untied.
        width: Channels of the residual stream that matrices between blocks lead on, 0 for none.
        between: Names of these matrices.
    """

    groups: tuple[RotationGroup, ...]
    unmixed: Mapping[tuple[str, tuple[int, ...]], str]
    foldable: Mapping[str, ScaleGroup]
    unties: bool
    width: int
    between: frozenset[str]

    def held_by_gain(self, group: RotationGroup, program: Program) -> str | None:
        """Which gain keeps the channels of a group from being mixed, in words."""
        uneven = [tensor for tensor in uneven_gains(program, group) if tensor not in self.foldable]
        return f"{uneven[0]} holds another number for each channel, and cannot be folded into what reads it" if uneven else None


_KNOWN: "WeakKeyDictionary[fx.Graph, tuple[object, _RotationPlan | str]]" = WeakKeyDictionary()
"""A pass is asked at each layer, and nothing changes in between."""


def _plan(program: Program, form: Form) -> _RotationPlan | str:
    """What can be rotated, or why the form does not fit the model. The program is not changed."""
    graph = program.graph_module.graph
    key = (form, tuple(node.name for node in graph.nodes))
    known = _KNOWN.get(graph)
    if known is None or known[0] != key:
        known = _KNOWN[graph] = key, _planned(program, form)
    return known[1]


def _planned(program: Program, form: Form) -> _RotationPlan | str:
    unties = _stuck(program)
    if unties:
        other = _copy(program)
        unties = untie_head(other) is not None and not _stuck(other)
    copy = _copy(program)
    if unties:
        untie_head(copy)
    width = _width(copy) if form == "blocks" else 0
    names = _put_matrices(copy, width, torch.device("meta"))
    flow = channel_flow(copy) if names is not None else channel_flow(program)
    between = {(place.tensor, place.axes) for group in flow.rotations for place in group.places}
    if form == "blocks" and not (names and {(name, (axis,)) for name in names for axis in (0, 1)} <= between):
        return "the blocks of this model are no single chain with a residual stream that can be rotated; use form=model"
    plan = _RotationPlan(
        groups=flow.rotations,
        unmixed=flow.unmixed,
        foldable=norms_with_gain(copy),
        unties=unties,
        width=width,
        between=frozenset(names or ()),
    )
    stream = [group for group in plan.groups if {place.tensor for place in group.places} & plan.between]
    held = [reason for group in stream if (reason := plan.held_by_gain(group, copy))]
    return f"its residual stream cannot be rotated: {held[0]}; use form=model" if held else plan


def _copy(program: Program) -> Program:
    """A program whose graph can be changed, with the same tensors."""
    return shared_copy(program, aliases=dict(program.aliases), sparse=dict(program.sparse))


def _stuck(program: Program) -> bool:
    """Whether gains that cannot be folded keep channels from being mixed."""
    foldable = norms_with_gain(program)
    uneven = [uneven_gains(program, group) for group in channel_flow(program).rotations]
    return any(tensor not in foldable for tensors in uneven for tensor in tensors)


def _chain(program: Program) -> list[Block]:
    """The repeated blocks of a model, in order."""
    return [block for block in find_blocks(program, site_groups(program.sites()))[0] if block.name.rpartition(".")[2].isdigit()]


def _width(program: Program) -> int:
    """Channels of the residual stream that goes through all blocks; 0 if there is none that can be rotated."""
    members = [{site.weight for site in block.sites} for block in _chain(program)]
    for group in channel_flow(program).rotations:
        touched = {place.tensor for place in group.places}
        if len(members) > 1 and all(weights & touched for weights in members):
            return group.num_channels
    return 0


def _put_matrices(program: Program, width: int, device: torch.device) -> list[str] | None:
    """Put identities between blocks. Returns their names, or None if the blocks are no chain."""
    if not width:
        return []
    dtype = next(t.dtype for t in program.tensors().values() if isinstance(t, nn.Parameter) and t.is_floating_point())
    starts = [(block.name, block.before.next) for block in _chain(program)[1:]]
    return matrices_between(program, starts, torch.eye(width, dtype=dtype, device=device))


def _places_in(group: RotationGroup, site: Site) -> list[ChannelPlace]:
    return [place for place in group.places if place.tensor == site.weight]


def _inverse(gram_II: Tensor) -> Tensor:
    """The inverse of a damped Gram matrix; channels without inputs count as one."""
    gram_II = gram_II.double()
    dead_I = gram_II.diagonal() == 0
    gram_II = gram_II + torch.diag(dead_I.to(gram_II))
    mean = gram_II.diagonal().mean()
    for damping in dampings(_DAMPING, retry=_DAMPING):
        lower_II, info = torch.linalg.cholesky_ex(gram_II + damping * mean * torch.eye(len(gram_II)).to(gram_II))
        if int(info) == 0:
            return torch.cholesky_inverse(lower_II).float()
    raise SparsepassError("the inputs' Gram matrix is not positive definite; use more calibration tokens, or salience=wanda")
