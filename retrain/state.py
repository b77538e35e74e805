"""Where a training stands: counted in every process alike, saved in each checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SAVED = (
    "step",
    "num_tokens",
    "seconds",
    "flip_rate",
    "flips_since_first",
    "flips_by_layer",
    "since_first_by_layer",
    "validations",
    "decided",
    "kept_norm",
)


@dataclass(kw_only=True)
class TrainingState:
    """Where a training stands.

    Attributes:
        step: Optimizer steps done.
        num_tokens: Tokens trained on, over all processes.
        seconds: Time of the steps, without validations and checkpoints.
        flip_rate: Share of mask entries that the last refresh changed.
        flips_since_first: Share of mask entries that differ from the mask at the start.
        flips_by_layer: The flip rate of each weight.
        since_first_by_layer: The share since the start, of each weight.
        validations: What each validation found, with its step.
        last_validation: The validation loss of this step; None if it was not validated.
        decided: Share of groups whose learned mask is decided; None where none is learned.
        kept_norm: Share of the squared norm that learned masks keep; None where none is learned.
    """

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    flip_rate: float = 0.0
    flips_since_first: float = 0.0
    flips_by_layer: dict[str, float] = field(default_factory=dict)
    since_first_by_layer: dict[str, float] = field(default_factory=dict)
    validations: list[dict[str, float | None]] = field(default_factory=list)
    last_validation: float | None = None
    decided: float | None = None
    kept_norm: float | None = None

    @property
    def is_validated(self) -> bool:
        """Whether this step was validated."""
        return bool(self.validations) and self.validations[-1]["step"] == self.step

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
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in _SAVED}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "TrainingState":
        """Read what a checkpoint kept; what an older one lacks is as at the start."""
        return cls(**{name: saved[name] for name in _SAVED if name in saved})
