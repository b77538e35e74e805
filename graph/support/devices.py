"""Which device to compute on: what a user names, or the GPU where there is one."""

import torch

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.words import first_line

AUTO = "auto"
"""The name that stands for the GPU where there is one, and for the processor elsewhere."""


def find_device(name: torch.device | str) -> torch.device:
    """The device of a name, tried before any work.

    Args:
        name: Such as ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is the first CUDA GPU (ROCm's are called so too), or else the
            processor.

    Raises:
        SparsepassError: If there is no such device, or it cannot be used.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.empty(0, device=torch.device(name)).device  # with its number
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SparsepassError(
            f"device {name} cannot be used here ({first_line(error)}); try device=cpu, or device=auto for the GPU where "
            "there is one"
        ) from error
    if place.type == "meta":
        raise SparsepassError("device meta holds no values, so nothing can be computed there; try device=cpu")
    return place


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that is free; None where that is not known, as of the processor."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
