"""Optimizers that let masked weights fade: annealed SR-STE inside AdamW and SGD (AST), and CAST's AdamS.

Each takes the masks of its parameters, reads them at every step and never writes them. A parameter without a mask takes
the plain step, and so does one whose mask keeps everything. The decay is a value of the parameter group, like the learning
rate, so that a schedule sets it. Where a group's ``hold`` is true, its masked weights stay as they are.

All arithmetic is element by element: of sharded parameters (DTensor) each process updates its own shard, without
communication. Tensors are worked through in pieces, so that on a processor the temporaries stay in its cache, and on a GPU
their memory is bounded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor

from sparsepass.graph.ops import where_kept
from sparsepass.graph.support import SparsepassError
from sparsepass.retrain.run import local

# Elements per piece. On a processor a piece of each of the six tensors of a step should fit in the second-level cache;
# on a GPU fewer and larger kernels are better.
_CPU_PIECE, _GPU_PIECE = 1 << 18, 1 << 26

Masks = Mapping[Tensor, Tensor]


class MaskedOptimizer(torch.optim.Optimizer):
    """What the optimizers share: options, masks, and the walk over pieces of local tensors."""

    _moments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Any, masks: Masks, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults | {"hold": False})
        for group in self.param_groups:
            _check_options(group)
        mine = {p for group in self.param_groups for p in group["params"]}
        for parameter, mask in masks.items():
            if parameter not in mine:
                raise SparsepassError(f"a mask was given for a {tuple(parameter.shape)} tensor that is not optimized")
            if mask.dtype != torch.bool:
                raise SparsepassError(f"masks are bool, got {mask.dtype}; ~ on an integer mask gives -1 and -2, not 1 and 0")
            if mask.shape != parameter.shape or local(mask).shape != local(parameter).shape:
                raise SparsepassError(
                    f"the mask of a {tuple(parameter.shape)} parameter has shape {tuple(mask.shape)}, or is sharded otherwise"
                )
        self._masks = dict(masks)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Computes the loss again, as for torch's optimizers.

        Returns:
            What the closure returned.

        Raises:
            SparsepassError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise SparsepassError("these optimizers take dense gradients; build the embedding with sparse=False")
                state = self.state[parameter]
                if not state:
                    self._start(parameter, state, group)
                state["step"] += 1
                tensors = [parameter, parameter.grad, *(state[name] for name in self._moments if name in state)]
                mask = self._masks.get(parameter)
                for weight, grad, *rest in _pieces([*tensors, *([] if mask is None else [mask])]):
                    moments, kept = (rest, None) if mask is None else (rest[:-1], rest[-1])
                    before = weight.clone() if kept is not None and group["hold"] else None
                    self._update(weight, grad, moments, kept, int(state["step"].item()), group)
                    if before is not None and kept is not None:
                        torch.where(kept, weight, before, out=weight)
        return loss

    def initialize(self) -> None:
        """Make the moments of all parameters now instead of at their first step, so that a checkpoint can be read into them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self._start(parameter, self.state[parameter], group)

    def _start(self, parameter: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        # A tensor, and on the processor: torch's optimizers keep it so, and sharded checkpoints expect tensors.
        state["step"] = torch.tensor(0.0)
        # Without momentum, SGD has no moment.
        for name in self._moments if group.get("momentum") != 0 else ():
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def _update(
        self, weight: Tensor, grad: Tensor, moments: list[Tensor], mask: Tensor | None, step: int, group: Mapping[str, Any]
    ) -> None:
        """Update one piece in place; ``mask`` is None or its part of the mask."""
        raise NotImplementedError


class AdamOptions(TypedDict, total=False):
    """What both forms of Adam take.

    Attributes:
        lr: Learning rate; 2e-4 if not given.
        betas: Decay rates of the two moments; 0.9 and 0.95 if not given.
        eps: Added to the denominator; 1e-8 if not given.
        weight_decay: Decoupled decay of all weights; none if not given.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class ASTAdamW(MaskedOptimizer):
    """AdamW with annealed SR-STE: decay on masked weights, outside the first moment and inside the second.

    With ``d = decay * (1 - M) .* W``::

        W <- W (1 - lr wd);   m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) (g + d)^2
        W <- W - lr / (1 - b1^t) * (m + d) / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Where the decay dominates, the step saturates near ``lr * sign(W)``: let the learning rate end near zero.

    Args:
        params: Parameters, or groups of them, as for torch's optimizers.
        masks: Parameter -> bool mask of its shape, True where a weight is kept. Read at every step.
        decay: ``lambda``, the decay of masked weights; set it in the groups as the schedule goes.
        adam: See `AdamOptions`.

    Raises:
        SparsepassError: An option is out of range, or a mask is not bool or does not fit its parameter.

    Exactness: with masks that keep everything, bit-equal to ``torch.optim.AdamW(fused=True)``.

    Source: arXiv 2407.20584, section 3 (the exact form is our reading of its prose, see the design notes).

    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = ASTAdamW([weight], {weight: torch.tensor([True, True, False, False])}, lr=0.1, decay=0.5)
    >>> weight.grad = torch.zeros(4)
    >>> optimizer.step()
    >>> (weight.detach() < 0.99).tolist()
    [False, False, True, True]
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Any, masks: Masks, *, decay: float = 0.0, **adam: Unpack[AdamOptions]) -> None:
        super().__init__(params, masks, {**_adam_options(adam), "decay": decay})

    def _update(
        self, weight: Tensor, grad: Tensor, moments: list[Tensor], mask: Tensor | None, step: int, group: Mapping[str, Any]
    ) -> None:
        exp_avg, exp_avg_sq = moments
        average, seen = exp_avg, grad
        fading = mask if group["decay"] != 0 else None
        if fading is not None:
            # With m + d for m and g + d for g, torch's fused AdamW computes (g + d)^2 for v and, since
            # b1 (m + d) + (1 - b1)(g + d) = (b1 m + (1 - b1) g) + d, the step asked for. The moment itself is kept apart.
            behind = where_kept(weight, ~fading)
            decay = group["decay"] * (1 - group["lr"] * group["weight_decay"])
            average, seen = torch.add(exp_avg, behind, alpha=decay), torch.add(grad, behind, alpha=decay)
        _fused_adamw(weight, seen, average, exp_avg_sq, step, group)
        if fading is not None:
            exp_avg.lerp_(grad, 1 - group["betas"][0])


class ASTSGD(MaskedOptimizer):
    """SGD with annealed SR-STE: ``W <- W - lr (g + decay (1 - M) .* W)``, the decay outside the momentum.

    Args:
        params: Parameters, or groups of them, as for torch's optimizers.
        masks: Parameter -> bool mask of its shape, True where a weight is kept. Read at every step.
        lr: Learning rate.
        momentum: Factor of the momentum buffer; 0 keeps none.
        weight_decay: Added to the gradient times the weight, as in torch's SGD.
        decay: ``lambda``, the decay of masked weights; set it in the groups as the schedule goes.

    Raises:
        SparsepassError: An option is out of range, or a mask is not bool or does not fit its parameter.

    Exactness: with masks that keep everything, bit-equal to ``torch.optim.SGD(foreach=False, fused=False)``.

    Source: arXiv 2407.20584, equation 3; SR-STE, arXiv 2102.04010.

    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = ASTSGD([weight], {weight: torch.tensor([True, True, False, False])}, lr=0.5, decay=0.5)
    >>> weight.grad = torch.zeros(4)
    >>> optimizer.step()
    >>> weight.tolist()
    [1.0, 1.0, 0.75, 0.75]
    """

    _moments = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        masks: Masks,
        *,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        super().__init__(params, masks, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "decay": decay})

    def _update(
        self, weight: Tensor, grad: Tensor, moments: list[Tensor], mask: Tensor | None, step: int, group: Mapping[str, Any]
    ) -> None:
        if group["weight_decay"] != 0:
            grad = grad.add(weight, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            grad = moments[0].mul_(group["momentum"]).add_(grad)
        if mask is not None and group["decay"] != 0:
            grad = where_kept(weight, ~mask).mul_(group["decay"]).add_(grad)
        weight.add_(grad, alpha=-group["lr"])


class AdamS(MaskedOptimizer):
    """CAST's optimizer: masked weights are driven to zero by an L1 term that takes over from the gradient.

    With ``a = progress`` from 0 to 1 over the run::

        m = b1 m + (1 - b1) g;   m~ = (1 - a) m + a decay sign(W) where masked, m elsewhere
        v = b2 v + (1 - b2) m~^2;   W <- W (1 - lr wd) - lr / (1 - b1^t) * m~ / (sqrt(v / (1 - b2^t)) + eps)

    ``m~`` is never stored. The parameters must be fp32: a decay of 4e-7 vanishes in bf16.

    Args:
        params: Parameters, or groups of them, as for torch's optimizers.
        masks: Parameter -> bool mask of its shape, True where a weight is kept. Read at every step.
        decay: ``lambda``, the size of the L1 term.
        progress: Share of the run that is over, 0 to 1; set it in the groups as the schedule goes.
        adam: See `AdamOptions`.

    Raises:
        SparsepassError: An option is out of range, a mask is not bool or does not fit, or a masked parameter is not fp32
            or wider.

    Source: CAST, arXiv 2509.25996. The bias corrections are Adam's.

    >>> weight = torch.nn.Parameter(torch.ones(4))
    >>> mask = torch.tensor([True, True, False, False])
    >>> optimizer = AdamS([weight], {weight: mask}, lr=0.1, decay=0.5, progress=1.0)
    >>> weight.grad = torch.zeros(4)
    >>> optimizer.step()
    >>> (weight.detach() < 0.99).tolist()
    [False, False, True, True]
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Any, masks: Masks, *, decay: float = 4e-7, progress: float = 0.0, **adam: Unpack[AdamOptions]
    ) -> None:
        super().__init__(params, masks, {**_adam_options(adam), "decay": decay, "progress": progress})
        if low := {p.dtype for p in masks if p.dtype not in (torch.float32, torch.float64)}:
            raise SparsepassError(f"AdamS needs fp32 master weights, got {sorted(map(str, low))}; its decay vanishes in them")

    def _update(
        self, weight: Tensor, grad: Tensor, moments: list[Tensor], mask: Tensor | None, step: int, group: Mapping[str, Any]
    ) -> None:
        exp_avg, exp_avg_sq = moments
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1**step)
        exp_avg.lerp_(grad, 1 - beta1)
        numerator = exp_avg
        if mask is not None:
            share = group["progress"]
            driven = weight.sign().mul_(share * group["decay"]).add_(exp_avg, alpha=1 - share)
            numerator = torch.where(mask, exp_avg, driven)
        if group["weight_decay"] != 0:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        exp_avg_sq.mul_(beta2).addcmul_(numerator, numerator, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        weight.addcdiv_(numerator, denominator, value=-step_size)


def _fused_adamw(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: Mapping[str, Any]
) -> None:
    """Let torch's fused kernel take a step of AdamW in place: one pass over memory instead of ten."""
    given = [weight, grad, exp_avg, exp_avg_sq]
    whole = [tensor.contiguous() for tensor in given]  # the kernel walks memory, and their layouts may differ
    torch._fused_adamw_(
        whole[:1], whole[1:2], whole[2:3], whole[3:], [], [torch.full((), float(step), device=weight.device)],
        lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
    for tensor, copy in zip(given, whole, strict=True):
        if copy is not tensor and tensor is not grad:
            tensor.copy_(copy)


def _adam_options(given: AdamOptions) -> AdamOptions:
    defaults: AdamOptions = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    if unknown := given.keys() - defaults.keys():
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}; expected {', '.join(defaults)}")
    return {**defaults, **given}


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay", "decay"):
        if name in options and not options[name] >= 0:
            raise SparsepassError(f"{name} must be at least 0, got {options[name]}")
    for beta in options.get("betas", ()):
        if not 0 <= beta < 1:
            raise SparsepassError(f"betas must be in [0, 1), got {tuple(options['betas'])}")
    if not 0 <= options.get("momentum", 0) < 1:
        raise SparsepassError(f"momentum must be in [0, 1), got {options['momentum']}")
    if not 0 <= options.get("progress", 0) <= 1:
        raise SparsepassError(f"progress must be in [0, 1], got {options['progress']}")


def _pieces(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matching flat pieces of tensors of one shape, as views; whole where one is not contiguous."""
    shards = [local(tensor.detach()) for tensor in tensors]
    piece = _GPU_PIECE if shards[0].is_cuda else _CPU_PIECE
    size = shards[0].numel()
    if size <= piece or not all(tensor.is_contiguous() for tensor in shards):
        yield shards
        return
    flat = [tensor.view(-1) for tensor in shards]
    for start in range(0, size, piece):
        yield [tensor[start : start + piece] for tensor in flat]
