"""The states of all random generators a training run draws from, as JSON and tensors, so that no pickle is needed."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError

JSON = Any

_CPU, _CUDA = "torch_random_cpu", "torch_random_cuda"


def random_states() -> tuple[JSON, dict[str, Tensor]]:
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


def set_random_states(states: JSON, tensors: Mapping[str, Tensor]) -> None:
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
