"""Where a training stands, as each checkpoint holds it: what was counted, and the states of all random generators.

What was counted is the same in every process. The states are each process's own: JSON and tensors, so that no pickle is needed.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph import SparsepassError

_CPU, _CUDA = "torch_random_cpu", "torch_random_cuda"


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
        last_validation: The validation loss of this step; None if it was not validated. Not saved.
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
        return {name: value for name, value in asdict(self).items() if name != "last_validation"}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "TrainingState":
        """Read what a checkpoint kept; what an older one lacks is as at the start."""
        return cls(**{known.name: saved[known.name] for known in fields(cls) if known.name in saved})


def random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take the states of Python's, numpy's and torch's global generators, the latter on the CPU and the current GPU.

    Returns:
        The states of Python and numpy as JSON, and torch's as uint8 tensors by name.

    Example:
        >>> states, tensors = random_states()
        >>> first = random.random(), float(np.random.rand()), torch.rand(1)
        >>> set_random_states(states, tensors)
        >>> first == (random.random(), float(np.random.rand()), torch.rand(1))
        True
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    numpy_state = {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}}
    tensors = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_CUDA] = torch.cuda.get_rng_state()
    return {"python": [version, list(words), gauss], "numpy": numpy_state}, tensors


def set_random_states(states: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the generators into the states that `random_states` took.

    Raises:
        SparsepassError: If states are missing: here is a GPU and there was none, or these are not such states.

    Example:
        >>> set_random_states(*random_states())
    """
    needed = {_CPU, *([_CUDA] if torch.cuda.is_available() else [])}
    if missing := needed - set(tensors):
        raise SparsepassError(
            f"the saved random states lack {', '.join(sorted(missing))}: the run was saved on a machine without a GPU; resume "
            "it on such a machine, or start it with fresh random states"
        )
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    saved = states["numpy"]
    key = np.asarray(saved["state"]["key"], dtype=np.uint32)
    np.random.set_state({**saved, "state": {**saved["state"], "key": key}})
    torch.set_rng_state(tensors[_CPU])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[_CUDA])
