"""The training loop: a rewritten program, its dense teacher, data, and settings in; the retrained program out."""

import contextlib
import copy
import gc
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.admission import check_has_values
from sparsepass.graph.support import alone_in, give_back_freed_memory, shows_progress
from sparsepass.retrain.config import RetrainConfig, annealed_decay, learning_rate, steps_of, straight
from sparsepass.retrain.data import TrainingData
from sparsepass.retrain.learner import Learner, shares
from sparsepass.retrain.run import (
    CHECKPOINTS,
    METRICS,
    Checkpoints,
    MetricsFile,
    ProgressLine,
    StopSignals,
    any_process,
    is_first_process,
    make_accelerator,
    memory_bytes,
    together,
    total,
    tracking,
)
from sparsepass.retrain.state import TrainingState, random_states, set_random_states
from sparsepass.retrain.teacher import Teacher, check_hidden, online_teacher
from sparsepass.retrain.trainee import make_trainee

_LOG = logging.getLogger(__name__)


class TrainingStoppedError(SparsepassError):
    """A signal asked the run to stop; its state has been saved."""


@torch.inference_mode(False)
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
    device: str | None = None,
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
        progress: Whether a line shows loss, KL, flip rate, speed, memory and the time left. News stand above it; where a
            logger ``sparsepass.retrain`` is listened to at level INFO, they go there instead.
        device: Where to train; see `trains_on_processor`. Student, teacher and optimizer have to find room there.

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
    check_has_values(program)
    program = program if inplace else copy.deepcopy(program)
    folder = None if run_folder is None else Path(run_folder)
    training = Training(program, teacher, data, config, folder, device)
    with alone_in(folder if is_first_process() else None):
        notes = training.resume(resume)
        with StopSignals() as stop, training.watched(progress=progress):
            for note in (*data.notes, *notes):
                training.tell(note)
            if training.validation_is_due:  # before the first step, and where a signal came before a validation that was due
                training.validate()
                if training.state.step:
                    training.save()
            while not training.is_over:
                values = training.step()
                training.log(values)
                stopping = any_process(stop.requested, training.device)
                if training.validation_is_due and (training.is_over or not stopping):
                    training.validate()
                if training.is_over or stopping or training.save_is_due:
                    training.save()
                if stopping and not training.is_over:
                    raise training.stopped_by(stop.name)
            best = training.go_back_to_best()
    return training.finish(best)


@final
class Training:
    """A training that stands between two steps.

    Args:
        program: It is trained in place.
        teacher: See `retrain`.
        data: See `retrain`.
        config: See `retrain`.
        folder: The run folder.
        device: See `retrain`.
    """

    def __init__(
        self,
        program: Program,
        teacher: nn.Module | Teacher | None,
        data: TrainingData,
        config: RetrainConfig,
        folder: Path | None,
        device: str | None = None,
    ) -> None:
        self.accelerator = make_accelerator(config.trackers, None if folder is None else str(folder), device)
        self.device = self.accelerator.device
        self.config = config = config.resolve(self.device)
        self.data, self.folder = data, folder
        self.num_steps = config.num_steps(data.train.shape.context)
        share, micro = shares(config, self.accelerator.num_processes)  # a mistake shows before anything expensive starts
        self._step_tokens = config.batch_size * data.train.shape.context
        self._validate_every = config.validate_every or max(1, self.num_steps // 10)
        self._checkpoint_every = config.checkpoint_every or self._validate_every
        torch.manual_seed(config.seed)
        check_hidden(program, teacher, config)
        self._identity = _identity(program, config, self.num_steps)
        self.trainee = make_trainee(program, config, self.accelerator, unpadded=data.unpadded)
        self.guide = online_teacher(teacher, config, self.accelerator, unpadded=data.unpadded)
        self.guide.check(self.trainee.student)
        self._identity["teacher"] = self.guide.about.get("fingerprint")
        self.learner = Learner(
            trainee=self.trainee, guide=self.guide, config=config, accelerator=self.accelerator, share=share, micro=micro
        )
        self._checkpoints = _checkpoints(folder, config)
        self.state = TrainingState()
        gc.collect()  # what capture left behind lies in cycles
        give_back_freed_memory()

    @property
    def is_over(self) -> bool:
        """Whether the last step was taken."""
        return self.state.step >= self.num_steps

    @property
    def validation_is_due(self) -> bool:
        """Whether this step is to be validated and was not yet."""
        due = self.is_over or self.state.step % self._validate_every == 0
        return self.data.validation is not None and due and not self.state.is_validated

    @property
    def save_is_due(self) -> bool:
        """Whether this step is to be saved, other than as the last one."""
        return self.state.step % self._checkpoint_every == 0 or self.state.is_best

    def resume(self, how: str) -> list[str]:
        """Go to where the newest checkpoint was written, if there is one; return what to tell the user."""
        notes = self.config.notes(self.num_steps)
        if self._checkpoints is None or self._checkpoints.newest() is None:
            return notes
        if how == "never":
            raise SparsepassError("the run folder holds checkpoints of an earlier run; resume it, or give another folder")
        found = self._checkpoints.restore("newest", self.trainee.tensors(), expected=self._identity)
        self.state = TrainingState.from_json(found.state["state"])
        self.data.train.restore(found.state["data"])
        if found.local_state is not None:
            set_random_states(found.local_state, found.local_tensors)
        return [*notes, *found.notes, f"going on from step {self.state.step} ({found.path.name})"]

    @contextlib.contextmanager
    def watched(self, *, progress: bool) -> Iterator[None]:
        """Show the progress line, and open the metrics file and the trackers."""
        first = self.accelerator.is_main_process
        resumed_at = self.state.step or None
        with contextlib.ExitStack() as stack:
            line = ProgressLine(self.num_steps, start=self.state.step, enabled=shows_progress(progress) and first)
            self._line = stack.enter_context(line)
            trackers = tracking(self.accelerator, "retrain", asdict(self.config), resumed_at=resumed_at)
            self._track = stack.enter_context(trackers)
            self._metrics: MetricsFile | None = None
            if self.folder is not None:
                metrics = MetricsFile(self.folder / METRICS, resumed_at=resumed_at, enabled=first)
                self._metrics = stack.enter_context(metrics)
            yield

    def tell(self, news: str) -> None:
        """Say something to the log, where it is listened to, and else above the progress line."""
        if not _LOG.isEnabledFor(logging.INFO):
            self._line.print(news)
        elif self.accelerator.is_main_process:
            _LOG.info(news)

    def step(self) -> dict[str, Any]:
        """Take one optimizer step; return what it measured."""
        config, state, trainee = self.config, self.state, self.trainee
        began = time.perf_counter()
        lr = self._set_schedule()
        if config.method == "cast" and state.step and state.step % config.mask_interval == 0:
            self._refresh_masks()
        batch = self.data.train.take(config.batch_size, rows=self.learner.rows())
        found = self.learner.gradients(batch)
        trainee.learned.reward_norm(straight(state.step, self.num_steps, config.mask_norm, 0.0))
        norm = self.learner.clip(batch, found, state.step)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.num_tokens += self._step_tokens
        if self._masks_move():
            self._refresh_masks()
        if trainee.grids.sites and any_process(not trainee.grids.refit(), self.device):
            raise self.learner.bad_weights(state.step)
        seconds = time.perf_counter() - began
        state.seconds += seconds
        state.last_validation = None
        return {
            "step": state.step,
            "tokens": state.num_tokens,
            **asdict(found),
            "grad_norm": norm,
            "lr": lr,
            "decay": trainee.optimizer.param_groups[0].get("decay", 0.0),
            "flip_rate": state.flip_rate,
            "flips_since_first": state.flips_since_first,
            **state.settled(),
            "seconds": seconds,
            "tokens_per_second": self._step_tokens / seconds,
            "memory_bytes": memory_bytes(),
        }

    def _set_schedule(self) -> float:
        """Set the rates of the next step; return its learning rate."""
        config, step, num_steps = self.config, self.state.step, self.num_steps
        lr = learning_rate(
            step,
            num_steps=num_steps,
            peak=config.lr,
            floor=config.min_lr,
            warmup_steps=steps_of(config.warmup, num_steps),
            final_steps=steps_of(config.final_linear, num_steps) if config.final_linear < 1 else num_steps,
            shape=config.lr_shape,
        )
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = lr
            if config.method == "ast":
                group["decay"] = annealed_decay(step, decay=config.decay, decay_steps=steps_of(config.decay_warmup, num_steps))
            if config.method == "cast":
                group["progress"] = step / num_steps
        self.trainee.learned.draw(
            step,
            scale=straight(step, num_steps, *config.mask_scale),
            temperature=straight(step, num_steps, *config.mask_temperature),
        )
        return lr

    def _masks_move(self) -> bool:
        """Whether the masks are refreshed after this step. Learned ones are only looked at: nothing in training reads them."""
        at_interval = self.state.step % self.config.mask_interval == 0
        if self.config.method == "maskllm":
            return at_interval or self.state.step % self._validate_every == 0 or self.is_over
        return self.config.method == "ast" and at_interval

    def _refresh_masks(self) -> None:
        """Choose the masks anew, and count what changed."""
        state, trainee = self.state, self.trainee
        if state.step > self.config.freeze_masks_after * self.num_steps:
            state.flip_rate = 0.0
            return
        flips = trainee.masks.refresh()
        sums = iter(self._over_processes(n for known in flips.values() for n in known))
        last = first = entries = 0.0
        for name in flips:
            of_last, of_first, of_all = next(sums), next(sums), next(sums)
            state.flips_by_layer[name], state.since_first_by_layer[name] = of_last / of_all, of_first / of_all
            last, first, entries = last + of_last, first + of_first, entries + of_all
        state.flip_rate, state.flips_since_first = last / entries, first / entries
        if known := trainee.learned.settled():
            decided, groups, kept, everything = self._over_processes(sum(column) for column in zip(*known, strict=True))
            state.decided, state.kept_norm = decided / groups, kept / everything

    def _over_processes(self, numbers: Iterator[float]) -> list[float]:
        """Add numbers up over the processes, if each holds a shard of the masks. If each holds all masks, nothing is added."""
        return total(self.accelerator, *numbers) if self.trainee.masks.are_sharded else list(numbers)

    def validate(self) -> None:
        """Measure the sparse student on the validation data."""
        assert self.data.validation is not None
        state = self.state
        with self._line.pause("validating"):
            found = self.learner.validate(self.data.validation, state.step)
        state.validations.append({"step": state.step, **found})
        state.last_validation = found["nll"]
        self._write({"step": state.step, "validation": found, "flips_by_layer": state.flips_by_layer})
        self.tell(f"step {state.step}: validation perplexity {found['perplexity']:.3f}")

    def log(self, values: dict[str, Any]) -> None:
        """Write what a step measured, and show it."""
        if values["step"] % self.config.log_every == 0 or self.is_over:
            self._write(values)
        shown = {name: values[name] for name in ("loss", "kl", "flip_rate", "lr")}
        self._line.update(values["step"], tokens=self._step_tokens, **shown)

    def _write(self, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(values)
        self._track(values)

    def save(self) -> None:
        """Write a checkpoint, where there is a run folder."""
        if self._checkpoints is None:
            return
        with self._line.pause("saving"):
            together(self.trainee.masks.check)
            states, tensors = random_states()
            self._checkpoints.save(
                self.state.step,
                self.trainee.tensors(),
                {**self._identity, "state": self.state.to_json(), "data": self.data.train.state()},
                metric=self.state.last_validation,
                local_tensors=tensors,
                local_state=states,
            )

    def stopped_by(self, name: str) -> TrainingStoppedError:
        """The error of a training that a signal ended."""
        kept = "nothing was saved: no checkpoints were asked for" if self._checkpoints is None else f"saved in {self.folder}"
        return TrainingStoppedError(
            f"stopped after step {self.state.step} of {self.num_steps} by {name or 'a signal to another process'}; {kept}. "
            "Start the same command again to go on"
        )

    def go_back_to_best(self) -> TrainingState:
        """Go back to the checkpoint with the best validation, if there is a better one than the last.

        Returns:
            The state that the weights belong to.
        """
        state = self.state
        best = None if self._checkpoints is None else self._checkpoints.best()
        if self._checkpoints is not None and best is not None and best.step != state.step:
            found = self._checkpoints.restore("best", self.trainee.tensors())
            state = TrainingState.from_json(found.state["state"])
            for note in found.notes:
                self.tell(note)
        together(self.trainee.masks.check)
        return state

    def finish(self, best: TrainingState) -> Program:
        """Give the trained weights to the program, with a record of the training; ``best`` is the state they belong to."""
        program = self.trainee.give_back()
        record = {
            "settings": asdict(self.config),
            "num_steps": self.num_steps,
            "num_tokens": self.state.num_tokens,
            "seconds": self.state.seconds,
            "step_of_weights": best.step,
            "teacher": self.guide.about,
            "data": self.data.describe(),
            "validations": self.state.validations,
            "flips_since_first": best.flips_since_first,
            "flips_since_first_by_layer": best.since_first_by_layer,
            **best.settled(),
        }
        program.retraining = (*program.retraining, record)
        return program


def _identity(program: Program, config: RetrainConfig, num_steps: int) -> dict[str, Any]:
    """What tells this run from another one."""
    # All values of all tensors: a checkpoint does not hold what is not trained.
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(program.tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "settings": config.computed,
        "num_steps": num_steps,
        "recipe": program.recipe,
        "sparse_weights": {name: list(program.tensor(name).shape) for name in program.sparse},
        "program": digest.hexdigest(),
    }


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
