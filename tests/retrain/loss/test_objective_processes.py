"""The loss inside modules that DDP and FSDP2 wrap: two gloo processes give the gradients of one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sparsepass.graph import SparsepassError
from sparsepass.retrain.loss.objective import Distillation, distillation_loss, next_token_targets
from sparsepass.retrain.teacher.online import OnlineTargets

B, T, H, V = 4, 6, 8, 16


class Student(nn.Module):
    """Embedding, two layers, and a head tied to the embedding; the loss is computed in its forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(2))
        self.head = nn.Linear(H, V)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, teacher: OnlineTargets, num_tokens: float) -> Distillation:
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        options = {"kd_weight": 0.5, "num_tokens": num_tokens}
        return distillation_loss(hidden, self.head, next_token_targets(ids), teacher, chunk_tokens=3, **options)


def data(rows: slice) -> tuple[Tensor, OnlineTargets]:
    torch.manual_seed(1)
    ids, hidden, head = torch.randint(0, V, (B, T)), torch.randn(B, T, H), nn.Linear(H, V).requires_grad_(False)
    return ids[rows], OnlineTargets(hidden[rows].reshape(-1, H), head)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items() if g is not None}


def worker(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # One process has three sequences, the other one: they differ in counted tokens and in chunks.
    ids, teacher = data(slice(0, 3) if rank == 0 else slice(3, B))
    found = {}
    model: nn.Module = DistributedDataParallel(Student())
    model(ids, teacher, B * (T - 1) / 2).loss.backward()
    found["ddp"] = gradients(model)
    for name, masked in (("fsdp", False), ("fsdp, nothing counts in one process", True)):
        student = Student()
        for layer in student.layers:
            fully_shard(layer)
        fully_shard(student)
        there = ids if not masked or rank == 0 else ids[:, :1]
        student(there, teacher, B * (T - 1) / 2).loss.backward()
        found[name] = gradients(student)
    student = Student()
    fully_shard(student)
    with pytest.raises(SparsepassError, match="is sharded here"):
        distillation_loss(torch.zeros(1, T, H), student.head, next_token_targets(ids[:1]), None, kd_weight=0.0, num_tokens=1)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(tmp_path,), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name, got in found.items():
        one = Student()
        ids, teacher = data(slice(0, 3) if "nothing" in name else slice(0, B))
        one(ids, teacher, B * (T - 1)).loss.backward()
        expected = gradients(one)
        assert (
            got.keys()
            == expected.keys()
            == {"table.weight", "head.bias"} | {f"layers.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
        )
        for key, gradient in expected.items():
            assert torch.allclose(got[key], gradient, atol=1e-7), f"{name}: {key}"
