"""The training loop: a rewritten program, its dense teacher, data, and settings in; the retrained program out.

Tensor shape legend: B sequences of one process, T tokens.
"""

import contextlib
import copy
import gc
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.support import give_back_freed_memory
from sparsepass.retrain.config import RetrainConfig, steps_of
from sparsepass.retrain.data import Batch, TrainingData
from sparsepass.retrain.loss import IGNORED, Distillation, next_token_targets
from sparsepass.retrain.run import (
    CHECKPOINTS,
    GO_ON,
    METRICS,
    Checkpoints,
    MetricsFile,
    NonFiniteLossError,
    ProgressLine,
    StopSignals,
    any_process,
    first_not_finite,
    memory_bytes,
    parallel,
    random_states,
    set_random_states,
    together,
    tracking,
)
from sparsepass.retrain.schedule import annealed_decay, learning_rate, straight
from sparsepass.retrain.teacher import OnlineParts, Teacher, online_teacher
from sparsepass.retrain.trainee import Trainee, make_trainee

FREE_SETTINGS = ("keep_checkpoints", "log_every", "trackers", "validate_every", "checkpoint_every", "compile")
"""Settings that a resumed run may change: they say how a run is watched, not what it computes."""


class TrainingStoppedError(SparsepassError):
    """A signal asked the run to stop; its state has been saved."""


def retrain(
    program: Program,
    teacher: nn.Module | Teacher | None,
    data: TrainingData,
    config: RetrainConfig,
    *,
    run_folder: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    inplace: bool = False,
    progress: bool = True,
) -> Program:
    """Train a sparse program against its dense teacher: its weights (AST and its relatives) or its masks (MaskLLM).

    Run it in one process, or in several that `accelerate launch` or torchrun started: the numbers are the same.

    Args:
        program: With masks from nm_sparsify, with or without SLoRB branches; float32; a causal language model. Never changed
            unless ``inplace``.
        teacher: The dense model or its program, of any size with the same vocabulary; or a `CachedTeacher`; or None with
            ``kd_weight=0``. It is not changed.
        data: From `open_data`.
        config: The settings.
        run_folder: Where checkpoints and ``metrics.jsonl`` go; None keeps nothing, so that only the last weights can be
            returned.
        resume: ``auto`` goes on from the newest checkpoint of the folder, if it has one; ``never`` refuses a folder that has.
        inplace: Whether the program itself is trained. One that was interrupted is half trained: to go on, load it anew.
        progress: Whether a line shows loss, KL, flip rate, speed, memory and the time left.

    Returns:
        The retrained program: of its checkpoints the one with the best validation, or else the last weights (without
        validation data, or without a run folder). Its masks are N:M, and its `retraining` tells what was done.

    Raises:
        SparsepassError: If something does not fit: no masks, another vocabulary, a batch that the processes do not divide, a
            run folder of another run.
        NonFiniteLossError: If the loss or a gradient is not finite; the checkpoints before are intact.
        TrainingStoppedError: If SIGTERM or Ctrl-C came; the run was saved and goes on when it is started again.

    Source: AST, arXiv 2407.20584; CAST, arXiv 2509.25996; MaskLLM, arXiv 2409.17481.

    Exactness: a run that was interrupted and resumed is bit-equal to one that was not, on the same number of processes.
    """
    folder = None if run_folder is None else Path(run_folder)
    accelerator = parallel.make_accelerator(config.trackers, None if folder is None else str(folder))
    config = config.resolve(accelerator.device)
    num_steps = config.num_steps(data.train.shape.context)
    plan = _plan(config, accelerator.num_processes, num_steps)
    program = program if inplace else copy.deepcopy(program)
    torch.manual_seed(config.seed)
    this_run = _this_run(program, config, num_steps)
    trainee = make_trainee(program, config, accelerator, unpadded=data.unpadded)
    guide = online_teacher(teacher, config, accelerator, unpadded=data.unpadded)
    guide.check(trainee.student)
    this_run["teacher"] = guide.about.get("fingerprint")
    checkpoints = _checkpoints(folder, config)
    state = _State(started=time.time())
    gc.collect()  # what capture left behind lies in cycles
    give_back_freed_memory()
    notes = _resume(checkpoints, resume, trainee, data, state, this_run)
    show = progress and accelerator.is_main_process
    main = accelerator.is_main_process and folder is not None

    def metrics_file() -> Any:
        if folder is None:
            return contextlib.nullcontext()
        return MetricsFile(folder / METRICS, resumed_at=state.step or None, enabled=accelerator.is_main_process)

    with (
        StopSignals() as stop,
        ProgressLine(num_steps, start=state.step, enabled=show) as line,
        tracking(accelerator, "retrain", asdict(config), resumed_at=state.step or None) as track,
        metrics_file() as metrics,
    ):
        for note in (*data.notes, *config.notes(num_steps), *notes):
            line.print(note)

        def write(values: dict[str, Any]) -> None:
            if main:
                metrics.write(values)
            track(values)

        def save() -> None:
            if checkpoints is not None:
                together(trainee.masks.check)
                states, tensors = random_states()
                saved = {**this_run, **state.to_json(), "data": data.train.state()}
                checkpoints.save(
                    state.step,
                    trainee.tensors(),
                    saved,
                    metric=state.last_validation,
                    local_tensors=tensors,
                    local_state=states,
                )

        def due() -> bool:
            known = bool(state.validations) and state.validations[-1]["step"] == state.step
            return (
                data.validation is not None and not known and (state.step == num_steps or state.step % plan.validate_every == 0)
            )

        def measure() -> None:
            assert data.validation is not None
            with line.pause("validating"):
                found = validate(trainee, guide, data.validation, config, accelerator)
                if not math.isfinite(found["nll"] or 0.0):
                    raise _bad_validation(trainee, guide, data.validation[slice(plan.micro)], state.step, config, accelerator)
            state.validations.append({"step": state.step, **found})
            state.last_validation = found["nll"]
            write({"step": state.step, "validation": found, "flips_by_layer": state.flips_by_layer})
            line.print(f"step {state.step}: validation perplexity {found['perplexity']:.3f}")

        if due():  # before the first step, and where a signal came before a validation that was due
            measure()
            if state.step:
                save()
        while state.step < num_steps:
            step = state.step
            began = time.perf_counter()
            lr = _set_schedule(trainee, config, step, num_steps)
            if config.method == "cast" and step % config.mask_interval == 0 and step:
                _refresh(trainee, state, accelerator, config, num_steps)
            batch = data.train.take(config.batch_size, rows=plan.rows(accelerator.process_index))
            sums = _gradients(trainee, guide, batch, plan, config, accelerator)
            trainee.learned.reward_norm(straight(step, num_steps=num_steps, start=config.mask_norm, end=0.0))
            norm = _check(trainee, guide, batch, sums, step, config, accelerator)
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.num_tokens += plan.num_tokens(data.train.shape.context)
            moves = config.method == "ast" and state.step % config.mask_interval == 0
            if moves or (config.method == "maskllm" and plan.looks(state.step, num_steps, config)):
                _refresh(trainee, state, accelerator, config, num_steps)
            seconds = time.perf_counter() - began
            state.seconds += seconds
            values = {
                "step": state.step, "tokens": state.num_tokens, **sums.means(), "grad_norm": norm, "lr": lr,
                "decay": trainee.optimizer.param_groups[0].get("decay", 0.0), "flip_rate": state.flip_rate,
                "flips_since_first": state.flips_since_first, **state.settled(), "seconds": seconds,
                "tokens_per_second": plan.num_tokens(data.train.shape.context) / seconds, "memory_bytes": memory_bytes(),
            }  # fmt: skip
            if state.step % config.log_every == 0 or state.step == num_steps:
                write(values)
            line.update(
                state.step,
                tokens=plan.num_tokens(data.train.shape.context),
                loss=values["loss"],
                kl=values["kl"],
                flip_rate=state.flip_rate,
                lr=lr,
            )
            stopping = any_process(stop.requested, accelerator.device)
            last = state.step == num_steps
            state.last_validation = None
            if due() and (last or not stopping):
                measure()
            if last or stopping or state.step % plan.checkpoint_every == 0 or state.is_best:
                with line.pause("saving"):
                    save()
            if stopping and not last:
                kept = "nothing was saved: no checkpoints were asked for" if checkpoints is None else f"saved in {folder}"
                raise TrainingStoppedError(
                    f"stopped after step {state.step} of {num_steps} by {stop.name or 'a signal to another process'}; {kept}. "
                    "Start the same command again to go on"
                )
        best, passed_over = _best(checkpoints, trainee, state)
        for note in passed_over:
            line.print(note)
        together(trainee.masks.check)
    trained = trainee.give_back()
    trained.retraining = (*trained.retraining, _record(config, data, guide, state, best, num_steps))
    return trained


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a step is shared out: over processes, then over micro-batches."""

    batch_size: int
    share: int
    micro: int
    validate_every: int
    checkpoint_every: int

    def looks(self, step: int, num_steps: int, config: RetrainConfig) -> bool:
        """Whether learned masks are refreshed after this step: nothing in training reads them."""
        return step % config.mask_interval == 0 or step % self.validate_every == 0 or step == num_steps

    def rows(self, rank: int) -> slice:
        return slice(rank * self.share, (rank + 1) * self.share)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        return [batch[slice(start, start + self.micro)] for start in range(0, len(batch), self.micro)]

    def num_tokens(self, context: int) -> int:
        return self.batch_size * context


def _plan(config: RetrainConfig, num_processes: int, num_steps: int) -> _Plan:
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
    validate_every = config.validate_every or max(1, num_steps // 10)
    return _Plan(
        batch_size=config.batch_size,
        share=share,
        micro=micro,
        validate_every=validate_every,
        checkpoint_every=config.checkpoint_every or validate_every,
    )


@dataclass(kw_only=True)
class _State:
    """Where a run stands."""

    started: float
    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    flip_rate: float = 0.0
    flips_since_first: float = 0.0
    last_validation: float | None = None
    decided: float | None = None
    kept_norm: float | None = None

    def __post_init__(self) -> None:
        self.flips_by_layer: dict[str, float] = {}
        self.since_first_by_layer: dict[str, float] = {}
        self.validations: list[dict[str, float | None]] = []

    _SAVED = ("step", "num_tokens", "seconds", "flip_rate", "flips_since_first", "flips_by_layer", "since_first_by_layer",
              "validations", "decided", "kept_norm")  # fmt: skip

    @property
    def is_best(self) -> bool:
        """Whether this step was validated and no earlier one was better."""
        known = [found["nll"] for found in self.validations if found["step"] and found["nll"] is not None]
        return self.last_validation is not None and self.last_validation < min(known[:-1], default=math.inf)

    def settled(self) -> dict[str, float]:
        """What is known of learned masks."""
        known = {"decided": self.decided, "kept_norm": self.kept_norm}
        return {name: value for name, value in known.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        return {"state": {name: getattr(self, name) for name in self._SAVED}}

    def read(self, saved: Mapping[str, Any]) -> None:
        for name in self._SAVED:
            setattr(self, name, saved["state"].get(name, getattr(self, name)))


@dataclass(kw_only=True)
class _Sums:
    """Sums of a step over all micro-batches and processes, per counted token once they are means."""

    loss: float
    kl: float
    ce: float
    num_counted: float

    def means(self) -> dict[str, float]:
        count = max(self.num_counted, 1)
        return {"loss": self.loss, "kl": self.kl / count, "ce": self.ce / count}


def _set_schedule(trainee: Trainee, config: RetrainConfig, step: int, num_steps: int) -> float:
    lr = learning_rate(
        step,
        num_steps=num_steps,
        peak=config.lr,
        floor=config.min_lr,
        warmup_steps=steps_of(config.warmup, num_steps),
        final_steps=steps_of(config.final_linear, num_steps) if config.final_linear < 1 else num_steps,
        shape=config.lr_shape,
    )
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
        if config.method == "ast":
            group["decay"] = annealed_decay(step, decay=config.decay, decay_steps=steps_of(config.decay_warmup, num_steps))
        if config.method == "cast":
            group["progress"] = step / num_steps
    trainee.learned.draw(
        step,
        scale=straight(step, num_steps=num_steps, start=config.mask_scale[0], end=config.mask_scale[1]),
        temperature=straight(step, num_steps=num_steps, start=config.mask_temperature[0], end=config.mask_temperature[1]),
    )
    return lr


def _gradients(
    trainee: Trainee, guide: OnlineParts, batch: Batch, plan: _Plan, config: RetrainConfig, accelerator: Accelerator
) -> _Sums:
    """Run forward and backward over this process's share of a step."""
    batch = batch.to(accelerator.device)
    targets_BT = _targets(batch)
    (num_counted,) = parallel.total(accelerator, float((targets_BT != IGNORED).sum()))
    loss = kl = ce = 0.0
    micros = plan.micro_batches(batch)
    for index, micro in enumerate(micros):
        rows = slice(index * plan.micro, (index + 1) * plan.micro)
        with _synchronised(trainee, accelerator, last=index == len(micros) - 1):
            # Processes average their gradients, so each divides by its share of the tokens.
            found = _forward(trainee, guide, micro, targets_BT[rows], num_counted / accelerator.num_processes, config)
            found.loss.backward()
        loss += float(found.loss.detach()) / accelerator.num_processes
        kl += float(found.kl_sum)
        ce += float(found.ce_sum)
    loss, kl, ce = parallel.total(accelerator, loss, kl, ce)
    if config.method == "fixed":
        trainee.drop_masked_gradients()
    return _Sums(loss=loss, kl=kl, ce=ce, num_counted=num_counted)


def _forward(
    trainee: Trainee, guide: OnlineParts, batch: Batch, targets_BT: Tensor, num_tokens: float, config: RetrainConfig
) -> Distillation:
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        targets, states = guide.look(batch)
        found: Distillation = trainee.model(batch.input_ids, batch.attention_mask, targets_BT, targets, states, num_tokens)
    return found


def _synchronised(trainee: Trainee, accelerator: Accelerator, *, last: bool) -> Any:
    """Let DDP exchange gradients with the last micro-batch only.

    Sharded gradients are exchanged each time: to keep them whole in between would take the memory that sharding saves.
    """
    return contextlib.nullcontext() if last or trainee.model is trainee.student else accelerator.no_sync(trainee.model)


def _targets(batch: Batch) -> Tensor:
    return next_token_targets(batch.input_ids, batch.attention_mask, batch.labels)


def _check(
    trainee: Trainee,
    guide: OnlineParts,
    batch: Batch,
    sums: _Sums,
    step: int,
    config: RetrainConfig,
    accelerator: Accelerator,
) -> float:
    """Scale the gradients to the largest norm that is allowed, and make sure that all is finite; return their norm."""
    limit = config.clip_grad_norm or math.inf
    norm = float(parallel.whole(nn.utils.clip_grad_norm_(list(trainee.trained.values()), limit)))
    if math.isfinite(sums.loss) and math.isfinite(norm):
        return norm
    micro = batch.to(accelerator.device)[slice(0, config.micro_batch_size or len(batch))]
    where = first_not_finite(trainee.student, lambda: _forward(trainee, guide, micro, _targets(micro), 1.0, config))
    raise NonFiniteLossError.at(step + 1, sums.loss, norm, where, trainee.trained, config)


def _bad_validation(
    trainee: Trainee, guide: OnlineParts, rows: Batch, step: int, config: RetrainConfig, accelerator: Accelerator
) -> NonFiniteLossError:
    rows = rows.to(accelerator.device)
    where = first_not_finite(trainee.student, lambda: _forward(trainee, guide, rows, _targets(rows), 1.0, config))
    return NonFiniteLossError(
        f"after step {step} the validation loss is not finite, first in {f'the output of {where}' if where else 'later rows'}. "
        f"Earlier checkpoints are intact. Lower lr (it is {config.lr:g}) or make warmup longer, {GO_ON}; at step 0, check the "
        "model and the validation data, and try dtype: float32"
    )


def _refresh(trainee: Trainee, state: _State, accelerator: Accelerator, config: RetrainConfig, num_steps: int) -> None:
    if state.step > config.freeze_masks_after * num_steps:
        state.flip_rate = 0.0
        return
    flips = trainee.masks.refresh()
    numbers = [float(n) for known in flips.values() for n in (known.since_last, known.since_first, known.num_entries)]
    sums = iter(parallel.total(accelerator, *numbers)) if not _replicated(trainee) else iter(numbers)
    last = first = entries = 0.0
    for name in flips:
        of_last, of_first, of_all = next(sums), next(sums), next(sums)
        state.flips_by_layer[name], state.since_first_by_layer[name] = of_last / of_all, of_first / of_all
        last, first, entries = last + of_last, first + of_first, entries + of_all
    state.flip_rate, state.flips_since_first = last / entries, first / entries
    if known := trainee.learned.settled():
        numbers = [sum(getattr(one, name) for one in known) for name in ("num_decided", "num_groups", "kept", "whole")]
        decided, groups, kept, whole = parallel.total(accelerator, *numbers) if not _replicated(trainee) else numbers
        state.decided, state.kept_norm = decided / groups, kept / whole


def _replicated(trainee: Trainee) -> bool:
    return not any(hasattr(known.mask, "full_tensor") for known in trainee.masks.sites.values())


@torch.no_grad()
def validate(
    trainee: Trainee, guide: OnlineParts, sequences: Batch, config: RetrainConfig, accelerator: Accelerator
) -> dict[str, float | None]:
    """Measure the sparse student on the validation sequences, shared out over the processes.

    Returns:
        ``nll``, nats per token; ``perplexity``, its exponential: that of `sparsepass.graph.perplexity.perplexity` over the same
        windows; ``kl`` to the teacher at the training temperature, None where no teacher is in memory; ``num_tokens``.
    """
    guide = guide.without_cache()
    share = config.micro_batch_size or max(1, config.batch_size // accelerator.num_processes)
    kl = ce = counted = 0.0
    with trainee.sparse_forward():
        for start in range(0, len(sequences), share * accelerator.num_processes):
            first = start + accelerator.process_index * share
            rows = sequences[slice(first, first + share)]
            # Sharded processes call the model together: one without rows of its own runs some that do not count.
            batch = (rows if len(rows) else sequences[slice(0, 1)]).to(accelerator.device)
            targets_BT = _targets(batch) if len(rows) else torch.full_like(batch.input_ids, IGNORED)
            found = _forward(trainee, guide, batch, targets_BT, 1.0, config)
            kl, ce, counted = kl + float(found.kl_sum), ce + float(found.ce_sum), counted + found.num_counted
    kl, ce, counted = parallel.total(accelerator, kl, ce, counted)
    if not counted:
        raise SparsepassError("the validation data has no token that counts; check its labels and attention mask")
    nll = ce / counted
    return {
        "nll": nll,
        "perplexity": math.exp(min(nll, 700.0)),
        "kl": kl / counted if guide.teacher else None,
        "num_tokens": counted,
    }


def _this_run(program: Program, config: RetrainConfig, num_steps: int) -> dict[str, Any]:
    """What tells this run from another one."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    weights = {name: list(program.tensor(name).shape) for name in program.sparse}
    return {
        "settings": settings,
        "num_steps": num_steps,
        "recipe": program.recipe,
        "sparse_weights": weights,
        "program": _digest(program),
    }


def _digest(program: Program) -> str:
    """A hash of every tensor by name, all values: a checkpoint does not hold what is not trained."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(program.tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _resume(
    checkpoints: Checkpoints | None,
    resume: str,
    trainee: Trainee,
    data: TrainingData,
    state: _State,
    this_run: Mapping[str, Any],
) -> list[str]:
    """Go to where the newest checkpoint was written, if there is one; return what to tell the user."""
    if checkpoints is None or checkpoints.newest() is None:
        return []
    if resume == "never":
        raise SparsepassError("the run folder holds checkpoints of an earlier run; resume it, or give another folder")
    found = checkpoints.restore("newest", trainee.tensors(), expected=this_run)
    state.read(found.state)
    data.train.restore(found.state["data"])
    if found.local_state is not None:
        set_random_states(found.local_state, found.local_tensors)
    return [*found.notes, f"going on from step {state.step} ({found.path.name})"]


def _checkpoints(folder: Path | None, config: RetrainConfig) -> Checkpoints | None:
    if folder is None:
        return None
    if config.keep_checkpoints:
        return Checkpoints(folder / CHECKPOINTS, keep=config.keep_checkpoints)
    if Checkpoints(folder / CHECKPOINTS).newest() is not None:
        raise SparsepassError(
            f"{folder} holds checkpoints, which a run with keep_checkpoints: 0 would not go on from; give another run folder, "
            "or remove that setting"
        )
    return None


def _best(checkpoints: Checkpoints | None, trainee: Trainee, state: _State) -> tuple[_State, tuple[str, ...]]:
    """Go back to the checkpoint with the best validation, if there is a better one than the last.

    Returns:
        The state that the weights belong to, and what to tell the user.
    """
    best = None if checkpoints is None else checkpoints.best()
    if checkpoints is None or best is None or best.step == state.step:
        return state, ()
    found = checkpoints.restore("best", trainee.tensors())
    earlier = _State(started=state.started)
    earlier.read(found.state)
    return earlier, found.notes


def _record(
    config: RetrainConfig, data: TrainingData, guide: OnlineParts, state: _State, best: _State, num_steps: int
) -> dict[str, Any]:
    """What the program tells of its training: ``state`` is that of the end, ``best`` that of the returned weights."""
    return {
        "settings": asdict(config),
        "num_steps": num_steps,
        "num_tokens": state.num_tokens,
        "seconds": state.seconds,
        "step_of_weights": best.step,
        "teacher": guide.about,
        "data": data.describe(),
        "validations": state.validations,
        "flips_since_first": best.flips_since_first,
        "flips_since_first_by_layer": best.since_first_by_layer,
        **best.settled(),
    }
