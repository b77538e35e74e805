"""What the two processes of the tests of checkpoints do: a program of its own, started once per process.

Usage: checkpoint_processes.py RANK NUM_PROCESSES FOLDER SUBFOLDER:ACTION...
"""

import errno
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sparsepass.graph import SparsepassError
from sparsepass.retrain.run import checkpoint
from sparsepass.retrain.run.checkpoint import Checkpoints
from sparsepass.retrain.run.processes import any_process


def whole(scale: int = 1) -> dict[str, Tensor]:
    """Tensors with odd sizes, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return {
        "rows": scale * torch.randn(7, 4, generator=generator),
        "columns": scale * torch.randn(4, 5, generator=generator).bfloat16(),
        "mask": (torch.rand(7, 4, generator=generator) > 0.5) & bool(scale),
        "one_row": scale * torch.randn(1, 3, generator=generator),
        "replicated": scale * torch.randn(3, generator=generator),
        "hybrid": scale * torch.randn(5, 2, generator=generator),
        "step": torch.tensor(float(12 * scale)),
    }


def sharded(tensors: dict[str, Tensor], swapped: bool = False) -> dict[str, Tensor]:
    """The same as DTensors: in rows and columns of uneven sizes, one of them with no row at all in the last process."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    axes = {"rows": 0, "columns": 1, "mask": 0, "one_row": 0}
    if swapped:
        axes = {name: 1 - axis for name, axis in axes.items()}
    placed = {name: [Shard(axes[name])] if name in axes else [Replicate()] for name in tensors}
    placed_tensors = {n: distribute_tensor(t, mesh, placed[n], src_data_rank=None) for n, t in tensors.items() if n != "step"}
    hybrid = init_device_mesh("cpu", (distributed.get_world_size(), 1))
    placed_tensors["hybrid"] = distribute_tensor(tensors["hybrid"], hybrid, [Replicate(), Shard(0)], src_data_rank=None)
    return {**tensors, **placed_tensors}


def fsdp() -> dict[str, Tensor]:
    """Parameters of a model under `fully_shard`, a mask among them, and the moments of its optimizer after a step."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model.mask = nn.Parameter(torch.rand(7, 5) > 0.5, requires_grad=False)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    full = [{n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in ts.items()} for ts in (first, second)]
    return all(torch.equal(full[0][name], full[1][name]) for name in full[1]) and full[0].keys() == full[1].keys()


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def act(action: str, checkpoints: Checkpoints, rank: int) -> None:
    if action in ("save", "save replicated"):
        local = {"generator": torch.tensor([rank], dtype=torch.uint8)}
        tensors = sharded(whole()) if action == "save" else whole()
        checkpoints.save(3, tensors, {"seen": 5}, local_tensors=local, local_state={"position": rank})
    elif action in ("restore", "restore swapped"):
        into = sharded(whole(0), swapped=action.endswith("swapped"))
        restored = checkpoints.restore("newest", into)
        assert equal(into, whole())
        if not restored.notes:
            assert restored.local_tensors["generator"].tolist() == [rank]
            assert restored.local_state == {"position": rank}
    elif action == "restore replicated":
        into = whole(0)
        checkpoints.restore("newest", into)
        assert equal(into, whole())
    elif action == "fsdp":
        tensors = fsdp()
        before = {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in tensors.items()}
        assert any(name.endswith("exp_avg") for name in tensors)
        checkpoints.save(1, tensors, {})
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        checkpoints.restore("newest", tensors)
        assert equal(tensors, before)
    elif action == "second process has a full disk":
        patch = pytest.MonkeyPatch()
        if rank == 1:

            def refuse(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(checkpoint, "write_pieces", refuse)
        with pytest.raises((OSError, SparsepassError), match="No space left" if rank else "disk is full"):
            checkpoints.save(4, sharded(whole()), {})
        patch.undo()
    elif action == "restore damaged":
        found = checkpoints.newest()
        assert found is not None
        if rank == 0:
            flip_last_bit(found.path / "rank-00001-0.safetensors")
        distributed.barrier()
        with pytest.raises(SparsepassError, match=r"no intact checkpoint .*rank-00001-0\.safetensors"):
            checkpoints.restore("newest", sharded(whole(0)))
    elif action == "any":
        assert any_process(rank == 1)
        assert not any_process(False)


def main() -> None:
    rank, num_processes, folder, actions = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    rendezvous = folder.parent / "rendezvous"
    distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=num_processes, timeout=timedelta(seconds=60)
    )
    for action in actions:
        subfolder, _, name = action.partition(":")
        act(name, Checkpoints(folder / subfolder), rank)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
