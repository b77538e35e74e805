"""What the processes of one training run tell each other: plain values, and whether all of them succeeded.

Without a process group everything here is about the one process there is.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

from sparsepass.graph.support import SparsepassError

T = TypeVar("T")


def process_rank() -> int:
    """Which of the processes this one is; 0 if it is the only one.

    Example:
        >>> process_rank()
        0
    """
    return distributed.get_rank() if _grouped() else 0


def num_processes() -> int:
    """How many processes train together.

    Example:
        >>> num_processes()
        1
    """
    return distributed.get_world_size() if _grouped() else 1


def is_first_process() -> bool:
    """Whether this is the process that writes; known from the launcher before the processes are joined.

    Example:
        >>> is_first_process()
        True
    """
    return process_rank() == 0 if _grouped() else int(os.environ.get("RANK", "0")) == 0


def leave_processes() -> None:
    """Part from the other processes after a training; from then on each is alone.

    Example:
        >>> leave_processes()
    """
    if _grouped():
        distributed.destroy_process_group()


def together(action: Callable[[], T]) -> list[T]:
    """Do something in every process and share the results; if it fails in one, it fails in all, and none waits for ever.

    Args:
        action: What this process does. It must not talk to the other processes itself.

    Returns:
        The results of all processes, by rank.

    Raises:
        Exception: The error of this process, where there is one.
        SparsepassError: If only others failed; it names the first of them and its error.

    Example:
        >>> together(lambda: 7)
        [7]
    """
    if not _grouped():
        return [action()]
    mine: tuple[T | None, str] = (None, "")
    error: Exception | None = None
    try:
        mine = (action(), "")
    except Exception as caught:  # noqa: BLE001  (the others must hear of it; it is raised below)
        error = caught
        mine = (None, f"{type(caught).__name__}: {caught}")
    everyone: list[tuple[T | None, str]] = [mine] * num_processes()
    distributed.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everyone):
        if message:
            raise SparsepassError(f"process {rank} of {len(everyone)} failed: {message}")
    return [value for value, _ in everyone]  # type: ignore[misc]


def any_process(claim: bool, device: torch.device | str = "cpu") -> bool:
    """Whether a claim is true in at least one process, such as "I was told to stop".

    Args:
        claim: What is true here.
        device: Where the processes exchange tensors: the GPU under NCCL, the CPU under gloo.

    Example:
        >>> any_process(True)
        True
    """
    if not _grouped():
        return claim
    flag = torch.tensor([claim], dtype=torch.int32, device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
