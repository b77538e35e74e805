"""The numbers of a step: forward, backward and validation of the student, on one process or many.

Where a loss is not finite, it tells where that began and what to change.

Tensor shape legend: B sequences of one process, T tokens.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsepass.graph import SparsepassError
from sparsepass.graph.perplexity import perplexity_of
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import Batch
from sparsepass.retrain.loss import IGNORED, Distillation, next_token_targets
from sparsepass.retrain.run import total, whole
from sparsepass.retrain.teacher import OnlineParts
from sparsepass.retrain.trainee import Trainee

_GO_ON = "and start anew in another folder, from an earlier checkpoint if one is good (--from-checkpoint)"
"""What to do with other settings, which an interrupted run does not take."""


class NonFiniteLossError(SparsepassError):
    """The loss or a gradient became NaN or infinite; the message says at which step, in which layer, and what to change."""


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The loss of a step over all micro-batches and processes; ``kl`` and ``ce`` are means over the counted tokens."""

    loss: float
    kl: float
    ce: float


@final
@dataclass(frozen=True, kw_only=True)
class Learner:
    """A student beside its teacher. It runs the student; the optimizer and the masks are the loop's affair.

    Attributes:
        trainee: The student, and what a step changes of it.
        guide: The teacher.
        config: The settings.
        accelerator: Process and device.
        share: Sequences of a step that each process takes.
        micro: Sequences that a process runs at once.
    """

    trainee: Trainee
    guide: OnlineParts
    config: RetrainConfig
    accelerator: Accelerator
    share: int
    micro: int

    def rows(self) -> slice:
        """Which sequences of a step are this process's."""
        start = self.accelerator.process_index * self.share
        return slice(start, start + self.share)

    def gradients(self, batch: Batch) -> StepLoss:
        """Run forward and backward over this process's share of a step."""
        batch = batch.to(self.accelerator.device)
        targets_BT = _targets(batch)
        (num_counted,) = total(self.accelerator, float((targets_BT != IGNORED).sum()))
        num_processes = self.accelerator.num_processes
        loss = kl = ce = 0.0
        for start in range(0, len(batch), self.micro):
            rows = slice(start, start + self.micro)
            with self._synchronised(last=start + self.micro >= len(batch)):
                # Processes average their gradients, so each divides by its share of the tokens.
                found = self._forward(batch[rows], targets_BT[rows], num_counted / num_processes)
                found.loss.backward()
            loss += float(found.loss.detach()) / num_processes
            kl += float(found.kl_sum)
            ce += float(found.ce_sum)
        loss, kl, ce = total(self.accelerator, loss, kl, ce)
        if self.config.method == "fixed":
            self.trainee.drop_masked_gradients()
        count = max(num_counted, 1)
        return StepLoss(loss=loss, kl=kl / count, ce=ce / count)

    def clip(self, batch: Batch, found: StepLoss, step: int) -> float:
        """Scale the gradients to the largest norm that is allowed; return their norm.

        Args:
            batch: The sequences of the step.
            found: Its loss.
            step: Steps done before.

        Raises:
            NonFiniteLossError: If the loss or the norm is not finite.
        """
        limit = self.config.clip_grad_norm or math.inf
        norm = float(whole(nn.utils.clip_grad_norm_(list(self.trainee.trained.values()), limit)))
        if not (math.isfinite(found.loss) and math.isfinite(norm)):
            raise self._bad_step(batch[slice(0, self.micro)], found, norm, step + 1)
        return norm

    @torch.no_grad()
    def validate(self, sequences: Batch, step: int) -> dict[str, float | None]:
        """Measure the sparse student on the validation sequences, shared out over the processes.

        Args:
            sequences: All of them.
            step: Steps done, for the message.

        Returns:
            ``nll``, nats per token; ``perplexity``, that of `sparsepass.graph.perplexity.perplexity` over the same windows;
            ``kl`` to the teacher at the training temperature, None where no teacher is in memory; ``num_tokens``.

        Raises:
            SparsepassError: If no token counts.
            NonFiniteLossError: If the loss is not finite.
        """
        guide = self.guide.without_cache()
        num_processes = self.accelerator.num_processes
        kl = ce = counted = 0.0
        with self.trainee.sparse_forward():
            for start in range(0, len(sequences), self.micro * num_processes):
                first = start + self.accelerator.process_index * self.micro
                rows = sequences[slice(first, first + self.micro)]
                # Sharded processes call the model together: one without rows of its own runs some that do not count.
                batch = (rows if len(rows) else sequences[slice(0, 1)]).to(self.accelerator.device)
                targets_BT = _targets(batch) if len(rows) else torch.full_like(batch.input_ids, IGNORED)
                found = self._forward(batch, targets_BT, 1.0, guide)
                kl, ce, counted = kl + float(found.kl_sum), ce + float(found.ce_sum), counted + found.num_counted
        kl, ce, counted = total(self.accelerator, kl, ce, counted)
        if not counted:
            raise SparsepassError("the validation data has no token that counts; check its labels and attention mask")
        nll = ce / counted
        if not math.isfinite(nll):
            raise self._bad_validation(sequences[slice(self.micro)], step)
        known_kl = kl / counted if guide.teacher else None
        return {"nll": nll, "perplexity": perplexity_of(nll), "kl": known_kl, "num_tokens": counted}

    def bad_weights(self, step: int) -> NonFiniteLossError:
        """The error of a step that left weights which have no scale."""
        bad = next((name for name, p in self.trainee.trained.items() if not _is_finite(p)), "a weight")
        return NonFiniteLossError(
            f"after step {step}, {bad} is not finite, so it has no scale. Earlier checkpoints are intact. Lower lr (it is "
            f"{self.config.lr:g}) or make warmup longer, {_GO_ON}"
        )

    def _forward(self, batch: Batch, targets_BT: Tensor, num_tokens: float, guide: OnlineParts | None = None) -> Distillation:
        low = self.config.dtype == "bfloat16"
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=low):
            targets, states = (guide or self.guide).look(batch)
            found: Distillation = self.trainee.model(
                batch.input_ids, batch.attention_mask, targets_BT, targets, states, num_tokens
            )
        return found

    def _synchronised(self, *, last: bool) -> Any:
        """Let DDP exchange gradients with the last micro-batch only.

        Sharded gradients are exchanged each time: to keep them whole in between would take the memory that sharding saves.
        """
        trainee = self.trainee
        return contextlib.nullcontext() if last or trainee.model is trainee.student else self.accelerator.no_sync(trainee.model)

    def _first_not_finite(self, batch: Batch) -> str | None:
        batch = batch.to(self.accelerator.device)
        return first_not_finite(self.trainee.student, lambda: self._forward(batch, _targets(batch), 1.0))

    def _bad_step(self, rows: Batch, found: StepLoss, norm: float, step: int) -> NonFiniteLossError:
        trained, where = self.trainee.trained, self._first_not_finite(rows)
        weight = next((name for name, p in trained.items() if not _is_finite(p)), None)
        gradient = next((name for name, p in trained.items() if p.grad is not None and not _is_finite(p.grad)), None)
        place = f"first in the output of {where}" if where else f"first in the gradient of {gradient or 'an unknown weight'}"
        if weight is not None:
            place += f"; the weight {weight} is not finite itself"
        clip = "" if self.config.clip_grad_norm else ", set clip_grad_norm: 1.0"
        what = f"the norm of the gradients is {norm:.4g}" if math.isfinite(found.loss) else f"the loss is {found.loss:.4g}"
        return NonFiniteLossError(
            f"step {step}: {what}, {place}. The step was not taken, and earlier checkpoints are intact. Lower lr (it is "
            f"{self.config.lr:g}) or make warmup longer{clip}, {_GO_ON}; at the first step, check the model and the data, "
            "and try dtype: float32"
        )

    def _bad_validation(self, rows: Batch, step: int) -> NonFiniteLossError:
        where = self._first_not_finite(rows)
        return NonFiniteLossError(
            f"after step {step} the validation loss is not finite, first in "
            f"{f'the output of {where}' if where else 'later rows'}. Earlier checkpoints are intact. Lower lr (it is "
            f"{self.config.lr:g}) or make warmup longer, {_GO_ON}; at step 0, check the model and the validation data, and try "
            "dtype: float32"
        )


def shares(config: RetrainConfig, num_processes: int) -> tuple[int, int]:
    """The sequences of a step that a process takes, and how many it runs at once.

    Raises:
        SparsepassError: If the batch does not divide evenly.
    """
    if config.batch_size % num_processes:
        raise SparsepassError(
            f"batch_size {config.batch_size} is not a multiple of {num_processes} processes; choose one that is"
        )
    share = config.batch_size // num_processes
    micro = config.micro_batch_size or share
    if share % micro:
        raise SparsepassError(
            f"micro_batch_size {micro} does not divide the {share} sequences of each process (batch_size {config.batch_size} "
            f"over {num_processes} processes)"
        )
    return share, micro


def _targets(batch: Batch) -> Tensor:
    return next_token_targets(batch.input_ids, batch.attention_mask, batch.labels)


@torch.no_grad()
def first_not_finite(module: nn.Module, run: Callable[[], Any]) -> str | None:
    """Run a forward pass and name the first module whose output holds NaN or infinity.

    Args:
        module: Its submodules are watched.
        run: Runs it.

    Returns:
        The module's path in the model; None if every output is finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.constant_(net[0].weight, float("inf"))
        >>> first_not_finite(net, lambda: net(torch.ones(1, 2)))
        '0'
    """
    found: list[str] = []
    handles = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(watched: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else [t for t in output or () if isinstance(t, Tensor)]
            if not found and any(t.is_floating_point() and not _is_finite(t) for t in tensors):
                found.append(name)

        return look

    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_hook(watch(name.removeprefix("body.hierarchy.tree."))))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
