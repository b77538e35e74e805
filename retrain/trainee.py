"""Everything that a step of training changes, made ready: the student, its optimizer and its masks, on one process or many.

CAST changes the program too: two learnable scales per row stand beside each masked weight, and are folded into it at the end.

Shape suffixes: a weight as a matrix has O rows and I columns, and its N:M groups lie along a row.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from sparsepass.graph import Program, Site
from sparsepass.graph.program import with_sparse
from sparsepass.graph.rewrite import beside, detach_logits, finish
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.grids import FollowingGrids, check_quantize, grid_tensors, quantized_sites
from sparsepass.retrain.masks import LearnedMasks, LearnedSite, MaskedSite, MovingMasks, check_method
from sparsepass.retrain.optimizers import ASTSGD, AdamS, ASTAdamW, MaskedOptimizer
from sparsepass.retrain.run import checkpoint_activations, local, replicate, shard, whole
from sparsepass.retrain.student import Slots, Student, choose_trained, halves, masked_sites, set_behind

_aten = torch.ops.aten
_MASKED = torch.ops.sparsepass.masked_weight.default


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A program in training. Its tensors live in `slots`; `model` is what is called.

    Attributes:
        program: Gets its tensors back at the end, see `give_back`.
        student: The module that is trained.
        model: What is called: the student as DDP wraps it, or the student itself.
        slots: The program's tensors, where they are now.
        trained: Name -> trained parameter.
        optimizer: Of the trained parameters.
        masks: Moved by `refresh`.
        forward_masks: Weight name -> the mask that the forward pass reads, where that is not the one that moves (CAST).
        scales: Weight name -> name of CAST's scales.
        learned: The masks that are learned; empty where the method learns none.
        grids: The grids of quantized weights, which follow them; empty where nothing is quantized.
    """

    program: Program
    student: Student
    model: nn.Module
    slots: Slots
    trained: Mapping[str, nn.Parameter]
    optimizer: MaskedOptimizer
    masks: MovingMasks
    forward_masks: Mapping[str, Tensor]
    scales: dict[str, str]
    learned: LearnedMasks
    grids: FollowingGrids

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; sharded where the training is."""
        found: dict[str, Tensor] = {f"weights/{name}": parameter for name, parameter in self.trained.items()}
        found |= {f"masks/{name}": known.mask for name, known in self.masks.sites.items()}
        for name, parameter in self.trained.items():
            found |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        return found | grid_tensors(self.grids.sites)

    @contextlib.contextmanager
    def sparse_forward(self) -> Iterator[None]:
        """Run the forward pass behind the masks, whatever the method does in training."""
        with torch.no_grad():
            for name, mask in self.forward_masks.items():
                local(mask).copy_(local(self.masks.sites[name].mask))
        try:
            with self.learned.hard():
                yield
        finally:
            for mask in self.forward_masks.values():
                local(mask).fill_(True)

    def drop_masked_gradients(self) -> None:
        """Set the gradient of what is behind the masks to zero."""
        for known in self.masks.sites.values():
            if known.weight.grad is not None:
                local(known.weight.grad).mul_(local(known.mask))

    @torch.no_grad()
    def give_back(self) -> Program:
        """Put trained weights and masks into the program, whole, on every process; of learned masks the hard ones remain."""
        states = [self.program.sparse[name].learned for name in self.learned.sites]
        left = {name for state in states if state is not None for name in (state.logits, state.control)}
        for name in self.slots:
            if name in left:
                continue
            old, new = self.program.tensor(name), whole(self.slots[name])
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            self.program.set_tensor(name, new)
        for name, known in self.masks.sites.items():
            mask = self.program.sparse[name].mask
            assert mask is not None
            self.program.set_tensor(mask, whole(known.mask).detach().clone())
        for name in self.learned.sites:
            detach_logits(self.program, name)
        finish(self.program)
        if self.scales:
            fold_scales(self.program, self.scales, {name: known.site for name, known in self.masks.sites.items()})
        if not self.learned.sites:
            for name in self.masks.sites:
                with_sparse(self.program, name, changed_by=self.program.sparse[name].changed_by or "retrain")
        return self.program


def make_trainee(program: Program, config: RetrainConfig, accelerator: Accelerator, *, unpadded: int | None = None) -> Trainee:
    """Make a program ready for training.

    Args:
        program: Its tensors are trained in place. Sharded ones come back with `Trainee.give_back`.
        config: The settings.
        accelerator: Process and device.
        unpadded: The length of all sequences, if none has padding.

    Raises:
        SparsepassError: If the program has no masks, is no causal language model, is not float32, or does not fit the method;
            if it is quantized and is not to be trained so, or the other way round.
    """
    check_method(program, config.method)
    check_quantize(bool(program.quantized), config.quantize)
    program.to(accelerator.device)
    for state in program.sparse.values():
        if state.learned is not None:  # read by each forward pass: on one GPU that would be a wait each time
            program.set_tensor(state.learned.control, program.tensor(state.learned.control).cpu())
    set_behind(program, config.behind)
    sites = masked_sites(program)
    scales = attach_scales(program, [site for site, _, _ in sites.values()]) if config.method == "cast" else {}
    learned = {name: state.learned for name, state in program.sparse.items() if state.learned is not None}
    only = {state.logits for state in learned.values()} if config.method == "maskllm" else None
    names = choose_trained(program, config.frozen, only)
    parts = halves(program, unpadded)
    student = Student(parts, config)
    slots = Slots(program, (student,))
    if config.activation_checkpointing:
        checkpoint_activations(parts.blocks)
    model: nn.Module = student
    if config.parallel == "fsdp" and accelerator.num_processes > 1:
        # A buffer would stay whole on every process.
        for name in [mask for _, _, mask in sites.values()] + [n for state in program.quantized.values() for n in state.names]:
            slots.make_parameter(name)
        axes = {id(slots[key]): 1 for name, (site, _, mask) in sites.items() if site.nm_axis == 0 for key in (name, mask)}
        shard(student, parts.blocks, axes, accelerator.device)
    elif accelerator.num_processes > 1:
        model = replicate(student, accelerator)
    if config.compile:
        for block in parts.blocks:
            block.compile()
    trained = {name: slots[name] for name in names if name in slots}
    moving: dict[str, MaskedSite] = {}
    forward_masks: dict[str, Tensor] = {}
    for name, (site, pattern, mask_name) in sites.items():
        moved = slots[mask_name]
        if config.method == "cast":
            forward_masks[name] = moved
            moved = moved.detach().clone()
            local(forward_masks[name]).fill_(True)
        if config.method != "maskllm":
            moves = slots[name].requires_grad  # a weight that is not trained keeps the mask it came with
            moving[name] = MaskedSite(site=site, pattern=pattern, weight=slots[name], mask=moved, moves=moves)
        elif name in learned:
            logits, control = slots[learned[name].logits], slots[learned[name].control]
            moving[name] = LearnedSite(
                site=site, pattern=pattern, weight=slots[name], mask=moved, logits=logits, control=control
            )
    masks = {known.weight: known.mask.detach() for known in moving.values() if known.weight.requires_grad}
    optimizer = _optimizer(config, trained, masks)
    optimizer.initialize()
    return Trainee(
        program=program,
        student=student,
        model=model,
        slots=slots,
        trained=trained,  # type: ignore[arg-type]
        optimizer=optimizer,
        masks=MovingMasks(moving),
        forward_masks=forward_masks,
        scales=scales,
        learned=LearnedMasks({n: known for n, known in moving.items() if isinstance(known, LearnedSite)}, seed=config.seed),
        grids=FollowingGrids(quantized_sites(program, slots.__getitem__)),
    )


def attach_scales(program: Program, sites: Iterable[Site]) -> dict[str, str]:
    """Multiply each masked linear weight by learnable scales: ``W_eff[r, c] = W[r, c] A[r, c // (in/2)]``, A starting at one.

    Other kinds of layers, and layers with an odd number of input features, get no scales.

    Args:
        program: Changed in place.
        sites: Those with masks.

    Returns:
        Weight name -> name of its scales, a parameter ``[out, 2]``.

    Source: CAST, arXiv 2509.25996.
    """
    graph = program.graph_module.graph
    scales: dict[str, str] = {}
    by_weight = {site.weight: site for site in sites}
    for weight, site in by_weight.items():
        if site.layout not in ("linear", "conv1d_hf") or site.in_features % 2:
            continue
        name = beside(site, "cast_scales")
        tensor = program.tensor(weight)
        program.set_tensor(name, nn.Parameter(torch.ones(site.out_features, 2, dtype=tensor.dtype, device=tensor.device)))
        scales[weight] = name
    for node in [n for n in graph.nodes if n.target is _MASKED]:
        source = node.args[0]
        if source.op == "get_attr" and source.target in scales:
            _scale(node, source, by_weight[source.target], scales[source.target])
    finish(program)
    return scales


def fold_scales(program: Program, scales: Mapping[str, str], sites: Mapping[str, Site]) -> None:
    """Write the scales into the weights and take them out of the graph. Exact up to the order of the two products."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is _MASKED and node.args[0].op == "call_function":
            source = _scaled_source(node, scales)
            if source is not None:
                node.replace_input_with(node.args[0], source)
    graph.eliminate_dead_code()
    for weight, name in scales.items():
        tensor = program.tensor(weight)
        with torch.no_grad():
            halves_O2I = torch.unflatten(sites[weight].to_matrix(tensor), -1, (2, -1))
            scaled_OI = (halves_O2I * program.tensor(name).unsqueeze(-1)).flatten(-2)
            tensor.copy_(sites[weight].from_matrix(scaled_OI))
        program.delete_tensor(name)
    finish(program)


def _optimizer(config: RetrainConfig, trained: Mapping[str, Tensor], masks: dict[Tensor, Tensor]) -> MaskedOptimizer:
    matrices = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() <= 1]
    groups: list[dict[str, Any]] = []
    groups += [{"params": matrices, "weight_decay": config.weight_decay, "hold": config.method == "fixed"}] if matrices else []
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    if config.method == "cast":
        return AdamS(groups, masks, lr=config.lr, betas=config.betas, eps=config.eps, decay=config.decay)
    if config.optimizer == "sgd":
        return ASTSGD(groups, masks, lr=config.lr, momentum=config.momentum)
    return ASTAdamW(groups, masks, lr=config.lr, betas=config.betas, eps=config.eps)


def _scale(masked: fx.Node, source: fx.Node, site: Site, name: str) -> None:
    graph = masked.graph
    axis = site.nm_axis
    with graph.inserting_before(masked):
        scales = graph.get_attr(name)
        split = graph.call_function(_aten.unflatten.int, (source, axis, [2, site.in_features // 2]))
        along = scales if axis == 1 else graph.call_function(_aten.transpose.int, (scales, 0, 1))
        wide = graph.call_function(_aten.unsqueeze.default, (along, axis + 1))
        product = graph.call_function(_aten.mul.Tensor, (split, wide))
        result = graph.call_function(_aten.flatten.using_ints, (product, axis, axis + 1))
    node = scales
    while node is not masked:
        if stack := masked.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = dict(stack)
        node = node.next
    masked.replace_input_with(source, result)


def _scaled_source(masked: fx.Node, scales: Mapping[str, str]) -> fx.Node | None:
    """The node above a mask that reads a weight with scales; None if there is none."""
    stack = list(masked.all_input_nodes)
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and node.target in scales:
            return node
        stack.extend(node.all_input_nodes)
    return None
