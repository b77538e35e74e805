"""One student on one process or many: replicated (DDP) or sharded block by block (FSDP2), with checkpointed activations.

accelerate shards on accelerators only; the sharding here is torch's own `fully_shard`, the same on GPUs and on CPU processes.
"""

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from sparsepass.graph import SparsepassError

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(trackers: tuple[str, ...], folder: str | None) -> Accelerator:
    """Make an Accelerator for the processes that `accelerate launch` or torchrun started, or for this one alone.

    Raises:
        SparsepassError: If accelerate was configured to shard by itself.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else it overlooks that several processes were started
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
    world = torch.distributed.get_world_size()
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
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def total(accelerator: Accelerator, *values: float) -> list[float]:
    """Sums of numbers over all processes, in float64."""
    if accelerator.num_processes == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(sums)
    return [float(value) for value in sums.tolist()]
