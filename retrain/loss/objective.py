"""The training loss: forward KL to a teacher mixed with cross-entropy, worked through in chunks of tokens.

The head (the layer that makes logits) runs chunk by chunk, and each chunk's gradient is taken at once, so that logits of more
than one chunk never exist: neither the student's nor the teacher's.

Tensor shape legend: B batch, T tokens, N counted tokens, H hidden features, V vocabulary, X any shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsepass.graph.support import SparsepassError
from sparsepass.retrain.loss.divergence import TeacherTargets, row_losses

IGNORED = -100
# Tokens per chunk: each takes the head's weight gradient once through memory, so few large chunks are fast.
CHUNK_TOKENS = 512


class Distillation(NamedTuple):
    """A batch's loss and what it is made of.

    A tuple, not a dataclass: DDP and FSDP2 look for the tensors in what a module returns, and see through tuples.

    Attributes:
        loss: 0-dim, ``(a T^2 kl_sum + (1 - a) ce_sum) / num_tokens``; differentiable once.
        kl_sum: 0-dim, detached: sum over counted tokens of KL(teacher || student) at the temperature, without T^2, in nats; 0
            without a teacher.
        ce_sum: 0-dim, detached: sum over counted tokens of the cross-entropy, in nats.
        num_counted: Tokens that counted in this batch.
    """

    loss: Tensor
    kl_sum: Tensor
    ce_sum: Tensor
    num_counted: int


def next_token_targets(
    input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, labels_BT: Tensor | None = None
) -> Tensor:
    """The token that each position has to predict.

    Shapes: all [B, T], and so is the result.

    Args:
        input_ids_BT: Tokens.
        attention_mask_BT: 0 at padding. A position counts if both it and its target are no padding.
        labels_BT: As transformers has them: at the same positions as the inputs, -100 where a token is not to be learned. By
            default the inputs.

    Returns:
        int64 targets, -100 where nothing counts; always so at the last position.

    Raises:
        SparsepassError: The shapes differ.

    Example:
        >>> next_token_targets(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])).tolist()
        [[6, 7, -100, -100]]
    """
    for name, tensor in (("attention_mask", attention_mask_BT), ("labels", labels_BT)):
        if tensor is not None and tensor.shape != input_ids_BT.shape:
            raise SparsepassError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of input_ids, {tuple(input_ids_BT.shape)}; labels are "
                "not shifted, this function does it"
            )
    source_BT = input_ids_BT if labels_BT is None else labels_BT
    targets_BT = torch.full_like(source_BT, IGNORED, dtype=torch.int64)
    targets_BT[:, :-1] = source_BT[:, 1:]
    if attention_mask_BT is not None:
        present_BT = attention_mask_BT.bool()
        targets_BT[:, :-1].masked_fill_(~(present_BT[:, :-1] & present_BT[:, 1:]), IGNORED)
    return targets_BT


def distillation_loss(
    hidden_BTH: Tensor,
    head: nn.Module,
    targets_BT: Tensor,
    teacher: TeacherTargets | None,
    *,
    kd_weight: float,
    temperature: float = 2.0,
    num_tokens: float,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Distillation:
    """``a T^2 KL(teacher || student) + (1 - a) CE`` per counted token, summed and divided by ``num_tokens``.

    1. Positions that do not count are dropped before the head.
    2. The head runs once per chunk. In training the chunk's gradients to the hidden states and to the head's parameters are
       taken at once; backward only hands them out, and only once. They run through the autograd graph like any others, so the
       hooks of DDP and FSDP2 fire, and the gradient of a weight that is tied to the embedding adds up.
    3. Logits are upcast to fp32 a few rows at a time. Gradients of the head's parameters add up in fp32, or their own wider
       dtype.

    Memory: one chunk of the student's logits, their gradient and the teacher's logits in the dtype the heads give, a few rows
    in fp32, and the gradients of the head's parameters.

    Shapes: hidden_BTH [B, T, H], targets_BT [B, T]; ``head`` maps [1, N, H] to [1, N, V], each token for itself.

    Args:
        hidden_BTH: What the student's body gives.
        head: What makes logits of it; runs under the autocast that is on.
        targets_BT: The next token of each position, -100 where nothing counts; see `next_token_targets`.
        teacher: What the teacher says about these positions; None if ``kd_weight`` is 0. If there is one, KL is measured
            whatever the weight.
        kd_weight: ``a``, in [0, 1].
        temperature: ``T`` of the divergence.
        num_tokens: Counted tokens of the whole optimizer step, over all micro-batches and processes (divided by the number of
            processes where gradients are averaged over these). So accumulation equals the larger batch.
        chunk_tokens: Tokens that pass through the head at a time.

    Returns:
        The loss and its parts. If no position counts the loss is 0, and so are all gradients.

    Raises:
        SparsepassError: An option is out of range, shapes or vocabularies do not fit, or the head's weights are sharded.

    Source: arXiv 2407.20584, section 3.2.

    Exactness: the gradients are those of the formula; chunking changes only the order of sums. Under torch.compile the loss
    runs as it is, between the compiled parts.

    Example:
        >>> head = nn.Linear(4, 10)
        >>> hidden = torch.randn(1, 3, 4, requires_grad=True)
        >>> targets = next_token_targets(torch.tensor([[1, 2, 3]]))
        >>> found = distillation_loss(hidden, head, targets, None, kd_weight=0.0, num_tokens=2)
        >>> found.loss.backward()
        >>> found.num_counted, head.weight.grad.shape, bool(hidden.grad[0, 2].any())
        (2, torch.Size([10, 4]), False)
    """
    options = _Options(kd_weight, temperature, num_tokens, chunk_tokens)
    found: Distillation = _distillation_loss(hidden_BTH, head, targets_BT, teacher, options)
    return found


def hidden_state_loss(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], valid_BT: Tensor, *, num_tokens: float
) -> Tensor:
    """Squared error of hidden states relative to the teacher's size, summed over tokens and averaged over layers.

    Per layer and token: ``log(1 + e)`` with ``e = mean_h (s - t)^2 / mean_h t^2``. The size is taken for each token, so that
    batches add up; the logarithm, because a few tokens ("attention sinks") have states a thousand times as large as the
    others', and where the student's sinks are elsewhere, their ``e`` alone would make the gradient.

    Shapes: each state [B, T, H]; H may differ between layers, not between student and teacher.

    Args:
        student_states: Hidden states of the student.
        teacher_states: Those of the teacher, in the same order; no gradient reaches them.
        valid_BT: True where a position counts.
        num_tokens: As in `distillation_loss`.

    Returns:
        0-dim, differentiable; 0 if no position counts.

    Raises:
        SparsepassError: The numbers of states or their shapes differ, or ``num_tokens`` is not positive although positions
            count.

    Source: the form is ours; arXiv 2407.20584, table 5, finds that such losses hurt in long runs.

    Exactness: computed in fp32, fp64 for fp64 states.

    Example:
        >>> state = torch.ones(1, 2, 4)
        >>> hidden_state_loss([state * 3], [state], torch.tensor([[True, False]]), num_tokens=1).exp()
        tensor(5.)
    """
    if not student_states or len(student_states) != len(teacher_states):
        raise SparsepassError(
            f"the student gives {len(student_states)} hidden states, the teacher {len(teacher_states)}; name as many layers of "
            "the one as of the other, at least one"
        )
    if not num_tokens > 0 and valid_BT.any():
        raise SparsepassError(f"num_tokens is {num_tokens}, but {int(valid_BT.sum())} positions count in this batch alone")
    total = torch.zeros((), device=valid_BT.device)
    for index, (student_BTH, teacher_BTH) in enumerate(zip(student_states, teacher_states, strict=True)):
        if student_BTH.shape != teacher_BTH.shape or student_BTH.shape[:2] != valid_BT.shape:
            raise SparsepassError(
                f"hidden state {index} is {tuple(student_BTH.shape)} in the student, {tuple(teacher_BTH.shape)} in the "
                f"teacher, for {tuple(valid_BT.shape)} positions; compare layers whose shapes are equal"
            )
        dtype = torch.promote_types(student_BTH.dtype, torch.float32)
        goal_NH = teacher_BTH.detach()[valid_BT].to(dtype)
        error_N = (student_BTH[valid_BT].to(dtype) - goal_NH).square().mean(-1)
        total = total + torch.log1p(error_N / goal_NH.square().mean(-1).clamp_min(torch.finfo(dtype).eps ** 2)).sum()
    return total / (len(student_states) * num_tokens) if num_tokens > 0 else total


@dataclass(frozen=True)
class _Options:
    """The numbers of one call, checked."""

    kd_weight: float
    temperature: float
    num_tokens: float
    chunk_tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.kd_weight <= 1:
            raise SparsepassError(f"kd_weight must be in [0, 1], got {self.kd_weight}")
        if not 0 < self.temperature < float("inf"):
            raise SparsepassError(f"temperature must be positive, got {self.temperature}")
        if self.chunk_tokens < 1:
            raise SparsepassError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")

    def mixed(self, kl: Tensor, ce: Tensor) -> Tensor:
        return (kl * (self.kd_weight * self.temperature**2) + ce * (1 - self.kd_weight)) * self.scale

    @property
    def scale(self) -> float:
        return 1 / self.num_tokens if self.num_tokens > 0 else 0.0


# Dynamo cannot follow a gradient taken inside a forward pass.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _distillation_loss(
    hidden_BTH: Tensor, head: nn.Module, targets_BT: Tensor, teacher: TeacherTargets | None, options: _Options
) -> Distillation:
    if hidden_BTH.shape[:-1] != targets_BT.shape:
        raise SparsepassError(
            f"hidden states are {tuple(hidden_BTH.shape)}, targets {tuple(targets_BT.shape)}; expected [B, T, H] and [B, T]"
        )
    if teacher is None and options.kd_weight > 0:
        raise SparsepassError(f"kd_weight is {options.kd_weight} and there is no teacher; give one, or set kd_weight=0")
    rows_N = (targets_BT.reshape(-1) != IGNORED).nonzero().squeeze(-1)
    targets_N = targets_BT.reshape(-1)[rows_N]
    num_counted = rows_N.numel()
    if num_counted and not options.num_tokens > 0:
        raise SparsepassError(f"num_tokens is {options.num_tokens}, but {num_counted} positions count in this batch alone")
    job = _ChunkedWork(head, rows_N, targets_N, teacher, options)
    hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, rows_N)
    parameters = tuple(job.trained.values())
    if torch.is_grad_enabled() and (hidden_NH.requires_grad or parameters):
        loss, kl, ce = _ChunkedLoss.apply(job, hidden_NH, *parameters)  # type: ignore[no-untyped-call]
    else:
        kl, ce = job.run(hidden_NH)
        loss = options.mixed(kl, ce)
    return Distillation(loss, kl, ce, num_counted)


class _ChunkedWork:
    """One call's work: the head, its trained parameters, and what each chunk is measured against."""

    def __init__(
        self, head: nn.Module, rows_N: Tensor, targets_N: Tensor, teacher: TeacherTargets | None, options: _Options
    ) -> None:
        self._head, self._rows_N, self._targets_N = head, rows_N, targets_N
        self._teacher, self.options = teacher, options
        self.trained: Mapping[str, nn.Parameter] = {n: p for n, p in head.named_parameters() if p.requires_grad}
        if sharded := [n for n, p in head.named_parameters() if isinstance(p, DTensor)]:
            raise SparsepassError(
                f"the head's {sharded[0]} is sharded here; call the loss inside the forward of the module that fully_shard "
                "wraps, and do not wrap the head on its own, so that its weights are whole for all chunks"
            )
        lowest, highest = (int(x) for x in targets_N.aminmax()) if targets_N.numel() else (0, -1)
        if lowest < 0:
            raise SparsepassError(f"targets hold {lowest}; expected a token, or {IGNORED} where nothing counts")
        self._highest = highest
        # Leaves of our own: hooks on the parameters fire in the outer backward, not for each chunk. One set for all chunks:
        # autocast keeps a cast copy of each.
        self._leaves = {name: parameter.detach().requires_grad_() for name, parameter in self.trained.items()}

    def run(self, hidden_NH: Tensor, gradients: "_Gradients | None" = None) -> tuple[Tensor, Tensor]:
        """Work through all chunks; sums of KL and of cross-entropy."""
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        kl, ce = hidden_NH.new_zeros((), dtype=wide), hidden_NH.new_zeros((), dtype=wide)
        for start in range(0, len(hidden_NH), self.options.chunk_tokens):
            chunk = slice(start, start + self.options.chunk_tokens)
            chunk_kl, chunk_ce = self._chunk(hidden_NH, chunk, gradients)
            kl, ce = kl + chunk_kl, ce + chunk_ce
        return kl, ce

    def _chunk(self, hidden_NH: Tensor, chunk: slice, gradients: "_Gradients | None") -> tuple[Tensor, Tensor]:
        hidden_1NH = hidden_NH[chunk].unsqueeze(0)
        with torch.set_grad_enabled(gradients is not None):
            hidden_1NH = hidden_1NH.detach().requires_grad_(gradients is not None and gradients.wants_hidden)
            logits_1NV = torch.func.functional_call(self._head, self._leaves, (hidden_1NH,))
        if logits_1NV.dim() != 3 or logits_1NV.shape[:2] != hidden_1NH.shape[:2]:
            raise SparsepassError(
                f"the head gives {tuple(logits_1NV.shape)} for {tuple(hidden_1NH.shape)}; expected [1, N, V] for [1, N, H]"
            )
        if self._highest >= logits_1NV.shape[-1]:
            raise SparsepassError(f"targets hold token {self._highest}, but the head gives {logits_1NV.shape[-1]} logits")
        found = row_losses(
            logits_1NV.detach()[0],
            self._targets_N[chunk],
            None if self._teacher is None else self._teacher.rows(self._rows_N[chunk]),
            kd_weight=self.options.kd_weight,
            temperature=self.options.temperature,
            gradient=gradients is not None,
        )
        if gradients is not None and found.gradient is not None:
            inputs = [*([hidden_1NH] if gradients.wants_hidden else []), *self._leaves.values()]
            gradients.add(
                chunk, torch.autograd.grad(logits_1NV, inputs, found.gradient.unsqueeze(0), allow_unused=True), self.options
            )
        return found.kl, found.ce


class _Gradients:
    """Gradients as they add up over chunks: to the hidden states unscaled, to parameters divided by ``num_tokens``."""

    def __init__(self, hidden_NH: Tensor, parameters: Sequence[Tensor], *, wants_hidden: bool) -> None:
        self.wants_hidden = wants_hidden
        # Unscaled, since in half precision one token's share of a large batch may underflow.
        self.hidden_NH = torch.zeros_like(hidden_NH) if wants_hidden else None
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, chunk: slice, found: Sequence[Tensor | None], options: _Options) -> None:
        if self.hidden_NH is not None:
            if found[0] is not None:
                self.hidden_NH[chunk] = found[0][0]
            found = found[1:]
        for index, gradient_X in enumerate(found):
            if gradient_X is None:
                continue
            total_X = self._sums[index]
            if total_X is None:
                # A new tensor in any case: autograd may hand out one gradient for two parameters.
                wide = torch.promote_types(gradient_X.dtype, torch.float32)
                self._sums[index] = gradient_X.to(wide) * options.scale
            else:
                total_X.add_(gradient_X, alpha=options.scale)

    def parameters(self, factor: Tensor) -> list[Tensor]:
        """Gradients to the parameters, in their dtype, times a factor; takes the sums with it."""
        out = []
        # On a processor the usual factor of 1 is not worth a pass over a large weight; on a GPU asking costs more.
        unit = factor.device.type == "cpu" and factor.item() == 1
        for parameter, total_X in zip(self._parameters, self._sums, strict=True):
            if total_X is None:
                out.append(torch.zeros_like(parameter))
            else:
                out.append((total_X if unit else total_X.mul_(factor)).to(parameter.dtype))
        self._sums.clear()
        return out


class _ChunkedLoss(torch.autograd.Function):
    """Takes the gradients in forward, hands them out in backward."""

    @staticmethod
    def forward(ctx: Any, job: _ChunkedWork, hidden_NH: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _Gradients(hidden_NH, parameters, wants_hidden=ctx.needs_input_grad[1])
        kl, ce = job.run(hidden_NH, gradients)
        ctx.gradients, ctx.scale = gradients, job.options.scale
        ctx.mark_non_differentiable(kl, ce)
        return job.options.mixed(kl, ce), kl, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise SparsepassError("the distillation loss can go backward only once; compute it again")
        # Let go of them, so that autograd can take over the tensors without a copy.
        ctx.gradients = None
        hidden_NH = gradients.hidden_NH
        to_hidden = None if hidden_NH is None else hidden_NH.mul_(factor * ctx.scale)
        return None, to_hidden, *gradients.parameters(factor)
