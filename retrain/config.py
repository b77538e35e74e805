"""The settings of a training run: plain fields, checked when they are made, readable from a recipe file.

How learning rate and decays change over a run are pure functions of the step.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, get_args, get_type_hints

import torch

from sparsepass.graph import SparsepassError
from sparsepass.graph.support import closest, fast_low_precision, how_to_install

Method = Literal["ast", "cast", "fixed", "maskllm"]
Settings = TypeVar("Settings")
_BY_METHOD: dict[str, dict[str, Any]] = {
    "lr": {"maskllm": 5e-4, "": 2e-4},
    "min_lr": {"maskllm": 5e-5, "": 2e-5},
    "weight_decay": {"maskllm": 0.1, "": 0.0},
    "behind": {"ast": "zeros", "": "original"},
    "decay": {"cast": 4e-7, "": 1e-4},
}
"""Defaults that depend on the method; the last one is that of all others."""
FREE_SETTINGS = ("keep_checkpoints", "log_every", "trackers", "validate_every", "checkpoint_every", "compile")
"""Settings that a resumed run may change: they say how a run is watched, not what it computes."""


def _by_method() -> Any:
    """A field whose default is in `_BY_METHOD`."""
    return dataclasses.field(default=None)


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """How a program is retrained.

    The defaults are the paper's for models of about 100M parameters where a run is long enough for them; lengths that depend
    on the run are fractions of it.

    Attributes:
        method: ``ast``: masks move, masked weights fade (AST); ``cast``: the forward stays dense and an optimizer drives
            weights to zero (CAST); ``fixed``: the mask stays as it is and what is behind it does not train; ``maskllm``: masks
            are learned over weights that stay as they are (MaskLLM), after the pass learn_masks.
        max_steps: Optimizer steps; this or max_tokens.
        max_tokens: Tokens to train on at most, over all processes; the run is as many whole steps as fit in.
        batch_size: Sequences per optimizer step, over all processes.
        micro_batch_size: Sequences that a process runs at once; the rest is accumulated. None: all of its share.
        optimizer: ``adamw`` or ``sgd``, each in AST's form. CAST brings its own, a form of AdamW.
        lr: Peak learning rate. None: 2e-4; 5e-4 for maskllm.
        min_lr: Where its descent ends, before the line to zero. None: 2e-5; 5e-5 for maskllm.
        lr_shape: ``cosine``, ``linear`` or ``constant``, between warm-up and the line to zero.
        warmup: Steps (1 or more) or fraction of the run (below 1) of the rise to the peak.
        final_linear: Fraction of the run over which the rate goes to zero at the end.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's.
        momentum: SGD's.
        weight_decay: Decoupled decay of matrices (tensors of two or more dimensions). None: 0; 0.1 for maskllm.
        clip_grad_norm: Gradients are scaled to at most this norm; None for no limit.
        decay: Largest decay of masked weights (lambda); CAST's size of the L1 term. None: 1e-4; 4e-7 for cast.
        decay_warmup: Steps (1 or more) or fraction of the run (below 1) over which the decay grows (T0).
        mask_interval: Optimizer steps between two refreshes of the masks; maskllm refreshes them before a validation too, and
            only looks at them.
        freeze_masks_after: Fraction of the run after which masks stay as they are.
        behind: What stands behind the masks at the start: ``original`` (what the program has there), ``zeros``, ``clipped``
            (see `sparsepass.retrain.masks.put_behind`), or a factor. None: zeros for ast, where a weight comes back once its
            gradients have made it larger than a kept one; original for the others. The paper's start, magnitude of the dense
            weights, needs original; after SparseGPT what it dropped does harm where it comes back as it was.
        mask_scale: maskllm: what the logits are multiplied by (kappa), at the first and the last step; a line in between.
        mask_temperature: maskllm: temperature of the soft masks (tau), at the first and the last step; a line in between.
        mask_norm: maskllm: reward of the kept weights' squared norm (lambda) at the first step; it goes to zero in a line.
        kd_weight: Weight of the KL divergence to the teacher; the rest is cross-entropy with the text.
        temperature: Of the distillation.
        hidden_weight: Weight of the log of 1 + the relative squared error of each block's output to the teacher's; 0 is off.
        frozen: Parameters that are not trained: names, globs or 're:...'. Embeddings are named like
            ``*embed_tokens*``. The mask of a weight that is not trained stays.
        quantize: Whether a quantized program (pass quantize) is trained behind its rounding: the forward pass computes with the
            rounded weights, and scales follow the weights. For ast and fixed.
        dtype: ``bfloat16`` computes under autocast with float32 weights; ``float32``; ``auto``: bfloat16 where the device
            is fast in it, else float32.
        chunk_tokens: Tokens whose logits are held at once; None chooses.
        parallel: ``ddp``, ``fsdp`` (sharded, one group a block), or ``auto``: ddp.
        activation_checkpointing: Whether activations within a block are computed again in the backward pass.
        compile: Whether blocks run through torch.compile.
        seed: Of the random states at the start.
        validate_every: Steps between validations; None: ten in a run.
        checkpoint_every: Steps between checkpoints; None: at every validation. A validation that is the best so far is saved
            in any case.
        keep_checkpoints: Newest checkpoints kept; the best one is kept besides. 0 writes none: the run cannot be resumed, and
            its last weights are the result.
        log_every: Steps between two lines of metrics.jsonl.
        trackers: Trackers that accelerate knows, such as ``tensorboard``.
    """

    method: Method = "ast"
    max_steps: int | None = None
    max_tokens: int | None = None
    batch_size: int = 128
    micro_batch_size: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = _by_method()
    min_lr: float = _by_method()
    lr_shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    final_linear: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = _by_method()
    clip_grad_norm: float | None = 1.0
    decay: float = _by_method()
    decay_warmup: float = 0.25
    mask_interval: int = 10
    freeze_masks_after: float = 1.0
    behind: Literal["original", "zeros", "clipped"] | float = _by_method()
    mask_scale: tuple[float, float] = (100.0, 500.0)
    mask_temperature: tuple[float, float] = (4.0, 0.05)
    mask_norm: float = 1e-5
    kd_weight: float = 0.67
    temperature: float = 2.0
    hidden_weight: float = 0.0
    frozen: tuple[str, ...] = ()
    quantize: bool = False
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    chunk_tokens: int | None = None
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 1
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in _BY_METHOD.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values.get(self.method, values[""]))
        if self.max_steps is None and self.max_tokens is None:
            raise SparsepassError("a training run needs a length: give max_steps or max_tokens")
        for name in ("max_steps", "max_tokens", "batch_size", "micro_batch_size", "mask_interval", "validate_every",
                     "checkpoint_every", "keep_checkpoints", "log_every", "chunk_tokens"):  # fmt: skip
            value, least = getattr(self, name), 0 if name == "keep_checkpoints" else 1
            is_number = isinstance(value, int) and not isinstance(value, bool)
            self._expect(name, f"a whole number of at least {least}", value is None or (is_number and value >= least))
        for name in ("method", "optimizer", "lr_shape", "dtype", "parallel"):
            choices = get_args(get_type_hints(RetrainConfig)[name])
            self._expect(name, f"one of {', '.join(choices)}", getattr(self, name) in choices)
        for name in ("lr", "min_lr", "warmup", "eps", "weight_decay", "decay", "decay_warmup", "hidden_weight", "mask_norm"):
            self._expect(name, "a number of at least 0", 0 <= getattr(self, name) < float("inf"))
        for name in ("final_linear", "freeze_masks_after", "kd_weight"):
            self._expect(name, "a fraction from 0 to 1", 0 <= getattr(self, name) <= 1)
        if self.min_lr > self.lr:
            raise SparsepassError(f"min_lr {self.min_lr} is above lr {self.lr}; the rate descends from lr to min_lr")
        self._expect("temperature", "a number above 0", self.temperature > 0)
        self._expect("clip_grad_norm", "a number above 0 or null", self.clip_grad_norm is None or self.clip_grad_norm > 0)
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._expect("betas", "two numbers from 0 to below 1", fits)
        self._expect("momentum", "a number from 0 to below 1", 0 <= self.momentum < 1)
        behind = self.behind
        fits = behind in ("original", "zeros", "clipped") if isinstance(behind, str) else 0 <= behind <= 1
        self._expect("behind", "original, zeros, clipped or a factor from 0 to 1", fits)
        for name in ("mask_scale", "mask_temperature"):
            ends = getattr(self, name)
            fits = len(ends) == 2 and all(0 < end < float("inf") for end in ends)
            self._expect(name, "two numbers above 0, at the first and the last step", fits)
        if self.trackers:
            _check_trackers(self.trackers)
        if self.method == "cast" and self.optimizer != "adamw":
            raise SparsepassError("method cast has an optimizer of its own, a form of AdamW (AdamS): leave out optimizer")
        if self.method == "maskllm" and (self.behind != "original" or self.freeze_masks_after != 1):
            raise SparsepassError(
                "method maskllm chooses among all weights as they are, to the end: leave out behind and freeze_masks_after"
            )

        if self.quantize and self.method not in ("ast", "fixed"):
            why = {
                "cast": "cast computes with dense weights until its end, and a grid that fits those fits no sparse ones",
                "maskllm": "maskllm learns masks over weights that stay as they are",
            }[self.method]
            raise SparsepassError(
                f"quantize: true is for the methods ast and fixed: {why}; train first, then apply the pass quantize"
            )

    @property
    def computed(self) -> dict[str, Any]:
        """The settings that say what a run computes: what tells it from another one, and what a resumed one may not change."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE_SETTINGS}
        # Earlier versions do not know it, and what they began goes on.
        return found if self.quantize else {name: value for name, value in found.items() if name != "quantize"}

    def _expect(self, name: str, expected: str, fits: bool) -> None:
        if not fits:
            raise SparsepassError(f"{name} expects {expected}, got {getattr(self, name)!r}")

    def resolve(self, device: torch.device | str) -> "RetrainConfig":
        """The same settings, with ``dtype: auto`` decided for a device."""
        if self.dtype != "auto":
            return self
        return dataclasses.replace(self, dtype="bfloat16" if fast_low_precision(device) == torch.bfloat16 else "float32")

    def num_steps(self, context: int) -> int:
        """Optimizer steps of the run, with sequences of ``context`` tokens.

        Raises:
            SparsepassError: If max_tokens does not suffice for one step.
        """
        if self.max_tokens is None:
            assert self.max_steps is not None
            return self.max_steps
        fitting = self.max_tokens // (self.batch_size * context)
        if fitting < 1:
            raise SparsepassError(
                f"max_tokens {self.max_tokens} is less than one step of {self.batch_size} sequences of {context} tokens; "
                "raise it, or lower batch_size"
            )
        return min(fitting, self.max_steps or fitting)

    def notes(self, num_steps: int) -> list[str]:
        """What the user should know of a run of so many steps: a warm-up that does not end within it.

        >>> RetrainConfig(max_steps=6, warmup=2000).notes(6)[0][:64]
        'the warm-up of 2000 steps leaves no room in a run of 6: the lear'
        """
        rise, end = steps_of(self.warmup, num_steps), round(self.final_linear * num_steps)
        if rise + end <= max(num_steps, 1) or rise <= 1:
            return []
        return [
            f"the warm-up of {rise} steps leaves no room in a run of {num_steps}: the learning rate does not come down as it "
            "should; give warmup as a fraction of the run, such as 0.05"
        ]

    @staticmethod
    def from_mapping(settings: Mapping[str, Any], *, where: str = "the training settings") -> "RetrainConfig":
        """Make a configuration from plain values, as a recipe file has them.

        Args:
            settings: Field name -> value.
            where: Named in errors.

        Raises:
            SparsepassError: If a name is unknown (the nearest is said) or a value does not fit.

        >>> RetrainConfig.from_mapping({"max_steps": 3, "lr": "1e-3"}).lr
        0.001
        """
        return read_settings(RetrainConfig, settings, where=where)


def _check_trackers(names: tuple[str, ...]) -> None:
    """Accelerate fails late at a name that it does not know, and passes over a tracker that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    there = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            near = closest(name, known)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
            raise SparsepassError(f"trackers: accelerate knows no {name!r}; {hint}")
        if name not in there:
            how = f": {how_to_install(name)}" if name == "tensorboard" else ""
            raise SparsepassError(f"trackers: {name} is not installed; install it{how}, or leave it out")


def steps_of(length: float, num_steps: int) -> int:
    """Steps that a length stands for: itself from 1 on, a fraction of the run below.

    >>> steps_of(0.1, 50), steps_of(20, 50)
    (5, 20)
    """
    return int(length) if length >= 1 else round(length * num_steps)


def learning_rate(
    step: int, *, num_steps: int, peak: float, floor: float, warmup_steps: int, final_steps: int, shape: str = "cosine"
) -> float:
    """Return the learning rate of a step: up in a line, down to a floor, and in a line to zero at the end.

    Where the decay of masked weights dominates, AdamW's step is near ``lr * sign(W)`` whatever the decay's size, so the rate
    has to end near zero.

    Args:
        step: 0 for the first step.
        num_steps: Steps of the whole run.
        peak: Rate after the warm-up.
        floor: Rate at which the descent ends.
        warmup_steps: Steps until the peak is reached.
        final_steps: Steps of the line to zero.
        shape: ``cosine``, ``linear``, or ``constant`` (stays at the peak until the line to zero).

    Returns:
        The rate, in the units of ``peak``.

    Source: arXiv 2407.20584, appendix (settings); methods.md section 2.

    >>> [round(learning_rate(s, num_steps=10, peak=1.0, floor=0.1, warmup_steps=2, final_steps=2), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 0.94, 0.78, 0.55, 0.33, 0.16, 0.1, 0.05]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start_of_end = num_steps - final_steps
    end = floor if shape != "constant" else peak
    if step >= start_of_end:
        return end * (num_steps - step) / max(final_steps, 1)
    share = (step - warmup_steps) / max(start_of_end - warmup_steps, 1)
    if shape == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2
    return peak + (end - peak) * share


def straight(step: int, num_steps: int, start: float, end: float) -> float:
    """Return what goes in a line from ``start`` at the first step to ``end`` at the last.

    >>> [straight(step, 5, 4.0, 0.0) for step in range(5)]
    [4.0, 3.0, 2.0, 1.0, 0.0]
    """
    return start + (end - start) * step / max(num_steps - 1, 1)


def annealed_decay(step: int, *, decay: float, decay_steps: int) -> float:
    """Return the decay of masked weights: up in a line to ``decay`` over ``decay_steps``, then constant.

    Source: arXiv 2407.20584, section 3: ``lambda(t) = alpha t`` for ``t <= T0``, then ``alpha T0``.

    >>> [annealed_decay(step, decay=1.0, decay_steps=4) for step in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return decay * min(1.0, step / decay_steps) if decay_steps else decay


_OF_TRAINER: Final = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "micro_batch_size (batch_size is that of all processes)",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "num_train_epochs": "max_tokens or max_steps",
    "max_grad_norm": "clip_grad_norm",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "lr_shape",
    "optim": "optimizer",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "logging_steps": "log_every",
    "eval_steps": "validate_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "report_to": "trackers",
    "bf16": "dtype",
    "max_length": "context",
    "dataset_text_field": "text_column",
}
"""Names of transformers' Trainer and trl's SFTTrainer -> what the setting is called here, its name first."""


def read_settings(kind: type[Settings], settings: Mapping[str, Any], *, where: str) -> Settings:
    """Make a dataclass of plain fields from the values of a file, with errors that a user can act on.

    Raises:
        SparsepassError: If a name is unknown (the nearest is said) or a value does not fit its field.
    """
    from pydantic import TypeAdapter, ValidationError

    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in settings:
        if name not in names:
            if (ours := _OF_TRAINER.get(name)) and ours.split()[0] in names:
                raise SparsepassError(
                    f"{where}: there is no setting {name!r}, as transformers' Trainer calls it; here it is {ours}"
                )
            near = closest(name, names)
            raise SparsepassError(
                f"{where}: there is no setting {name!r}" + (f"; did you mean {near!r}?" if near else f" (there are {names})")
            )
    try:
        return TypeAdapter(kind).validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        raise SparsepassError(f"{where}: {place}: {first['msg']}, got {first['input']!r}") from error
