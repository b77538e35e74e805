"""The processes of one training run: how a student is spread over them, what they tell each other, and how they are stopped.

Without a process group everything here is about the one process there is. accelerate shards on accelerators only; the sharding
here is torch's own `fully_shard`, the same on GPUs and on CPU processes.
"""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, TypeVar, final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from sparsepass.graph.support import AUTO, SparsepassError, find_device

T = TypeVar("T")

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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


def trains_on_processor(device: str | None) -> bool:
    """Whether a training computes on the processor, by the name of its device.

    Args:
        device: ``cpu``, the kind of GPU (``cuda``), or ``auto`` (or None) for the GPU where there is one. Which GPU each
            process takes is for the launcher and CUDA_VISIBLE_DEVICES to say.

    Raises:
        SparsepassError: If there is no such device, or it is one of several by its number.

    Example:
        >>> trains_on_processor("cpu")
        True
    """
    if device in (None, AUTO):
        return not torch.accelerator.is_available()
    place = find_device(str(device))
    if place.type == "cpu":
        return True
    if torch.device(str(device)).index:
        raise SparsepassError(
            f"a training takes the first GPU that it sees (each process its own), and device is {device}; give {place.type}, "
            "and choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or kind.type != place.type:
        raise SparsepassError(f"a training computes on {kind.type if kind else 'cpu'} here, and device is {device}; use auto")
    return False


def local_device(device: str | None) -> torch.device:
    """The accelerator of this process, if there is one and it is asked for; see `trains_on_processor`."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if trains_on_processor(device) or kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def make_accelerator(trackers: tuple[str, ...], folder: str | None, device: str | None = None) -> Accelerator:
    """Make an Accelerator for the processes that `accelerate launch` or torchrun started, or for this one alone.

    Args:
        trackers: Where metrics go besides.
        folder: The run folder.
        device: See `trains_on_processor`.

    Raises:
        SparsepassError: If accelerate was configured to shard by itself.
    """
    accelerator = Accelerator(
        cpu=trains_on_processor(device),  # else it overlooks that several processes were started
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in _PLAIN:
        raise SparsepassError(
            f"accelerate is configured for {accelerator.distributed_type.value}; launch with --multi_gpu (or --cpu) and "
            "without it, and set parallel: fsdp in the training settings to shard"
        )
    return accelerator


def replicate(student: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wrap a module in DDP. Its buffers (masks, rotary frequencies) are the same everywhere and are not sent around."""
    names = [name for name, _ in student.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, names)
    wrapped: nn.Module = accelerator.prepare_model(student)
    return wrapped


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Compute what is within each block again in the backward pass instead of keeping it. Exact: nothing in it is random."""
    for block in blocks:
        run = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = run


def shard(
    student: nn.Module, blocks: Iterable[nn.Module], axes: Mapping[int, int], device: torch.device, *, whole: bool = False
) -> None:
    """Shard a module over all processes: each block a group of its own, and what is left another one.

    Args:
        student: Changed in place.
        blocks: Its blocks.
        axes: Parameter's id -> the axis to shard it along, where that is not the first: groups of M must stay whole.
        device: Where its tensors are.
        whole: Whether what lies outside the blocks stays whole on every process.

    Raises:
        SparsepassError: If an axis other than the first does not divide evenly.
    """
    world = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world,))

    def placement(parameter: nn.Parameter) -> Shard | None:
        axis = axes.get(id(parameter), 0)
        if axis and parameter.shape[axis] % world:
            raise SparsepassError(
                f"a weight of shape {tuple(parameter.shape)} is sharded along axis {axis}, to keep its groups whole, and "
                f"{parameter.shape[axis]} is not a multiple of {world} processes; use parallel: ddp, or another number of them"
            )
        return Shard(axis)

    for block in blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=placement)
    if not whole:
        fully_shard(student, mesh=mesh, shard_placement_fn=placement)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; any other tensor as it is."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def total(accelerator: Accelerator, *values: float) -> list[float]:
    """Sums of numbers over all processes, in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    distributed.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


@final
class StopSignals:
    """While it is entered, SIGTERM and Ctrl-C do not end the process, they make `requested` true.

    A second Ctrl-C raises KeyboardInterrupt at once. The handlers that stood before come back on leaving. Signals reach the
    main thread only, so elsewhere it does nothing. Of several processes each has its own flag: `any_process` joins them.

    Example:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested, stop.name
        (True, 'SIGTERM')
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._received is not None

    @property
    def name(self) -> str:
        """Name of the first signal that came; empty if none did."""
        return self._received.name if self._received else ""

    def __enter__(self) -> "StopSignals":
        self._received = None
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not set from Python, and cannot be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()
