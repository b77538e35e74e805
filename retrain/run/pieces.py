"""Tensors in files, whole or sharded: each process writes the piece it holds, and reads just the slices it needs.

A piece is a box of a tensor: where it starts, and its shape. Files are safetensors; which box of which tensor lies in which
file stands in a table (JSON), so that another number of processes, sharded otherwise or not at all, finds its slices.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from sparsepass.graph.support import SparsepassError, open_tensors
from sparsepass.retrain.run.processes import process_rank

JSON = Any

# Tensors of a GPU are copied to the host file by file, and a file is mapped into memory while it is read: this bounds both.
_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Box:
    """A box of a tensor.

    Attributes:
        start: First index along each axis.
        shape: Number of indices along each axis.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def meet(self, other: "Box") -> "Box | None":
        """The box that both share; None if they share no element."""
        start = tuple(map(max, self.start, other.start))
        ends = [min(a + m, b + n) for a, m, b, n in zip(self.start, self.shape, other.start, other.shape, strict=True)]
        shape = tuple(end - begin for begin, end in zip(start, ends, strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies within one that holds it."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.shape, strict=True))


def local_box(tensor: Tensor) -> Box:
    """Which box of a tensor this process holds: all of a plain tensor, its shard of a DTensor.

    Raises:
        SparsepassError: If the DTensor is neither replicated nor evenly or unevenly cut into consecutive shards.

    Example:
        >>> local_box(torch.zeros(4, 8))
        Box(start=(0, 0), shape=(4, 8))
    """
    start, shape = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise SparsepassError(f"a {tuple(shape)} tensor is sharded over processes that do not include {process_rank()}")
        for axis, (placement, index) in enumerate(zip(tensor.placements, coordinate, strict=True)):
            if isinstance(placement, Shard):
                size = shape[placement.dim]
                chunk = -(-size // mesh.size(axis))
                begin = min(index * chunk, size)
                start[placement.dim] += begin
                shape[placement.dim] = min(chunk, size - begin)
            elif not isinstance(placement, Replicate):
                raise SparsepassError(
                    f"a {tuple(tensor.shape)} tensor is placed as {placement}; a checkpoint takes Shard and Replicate: reduce "
                    "or redistribute it first"
                )
        held = tuple(tensor.to_local().shape)
        assert held == tuple(shape), f"a shard of shape {held} was expected to be {tuple(shape)}"
    return Box(tuple(start), tuple(shape))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor as it is. Shares memory, asks for no gradient.

    Example:
        >>> local(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def write_pieces(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> JSON:
    """Write this process's pieces of some tensors.

    Of a tensor that several processes hold, the first of them writes it. Names tied to one tensor share one piece.

    Args:
        folder: Where the files go.
        stem: How their names start, different for each process: ``rank-00000`` gives ``rank-00000-0.safetensors``.
        tensors: By name; plain or DTensor.

    Returns:
        The table: for each piece written its name, the tensor's ``dtype`` and ``shape``, the piece's ``start`` and ``size``,
        and the ``file`` and ``key`` under which it is found.

    Raises:
        SparsepassError: If a tensor is placed in a way that has no consecutive shards, or is sparse or has no data.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     table = write_pieces(Path(name), "rank-00000", {"w": torch.ones(2, 4)})
        >>> table[0]["file"], table[0]["start"], table[0]["size"]
        ('rank-00000-0.safetensors', [0, 0], [2, 4])
    """
    table: list[JSON] = []
    places: dict[tuple[Any, ...], tuple[str, str]] = {}
    storages: set[int] = set()
    waiting: dict[str, Tensor] = {}
    num_files, num_bytes = 0, 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise SparsepassError(f"{name} is on the meta device or sparse, and a checkpoint holds dense tensors with data")
        box = local_box(tensor)
        if not _writes(tensor):
            continue
        part = local(tensor)
        view = (part.device, part.data_ptr(), part.dtype, part.shape, part.stride())
        place = places.get(view) if part.numel() else None
        if place is None:
            if num_bytes and num_bytes + part.nbytes > _FILE_BYTES:
                safetensors.torch.save_file(waiting, folder / f"{stem}-{num_files}.safetensors")
                waiting, num_bytes, num_files = {}, 0, num_files + 1
            place = (f"{stem}-{num_files}.safetensors", name)
            places[view] = place
            storage = part.untyped_storage().data_ptr()
            # safetensors takes neither strides nor two tensors in one storage.
            waiting[name] = part.clone(memory_format=torch.contiguous_format) if storage in storages else part.contiguous()
            storages.add(storage)
            num_bytes += part.nbytes
        table.append(
            {
                "name": name,
                "dtype": _dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "start": list(box.start),
                "size": list(box.shape),
                "file": place[0],
                "key": place[1],
            }
        )
    if waiting:
        safetensors.torch.save_file(waiting, folder / f"{stem}-{num_files}.safetensors")
    return table


def check_fit(table: Iterable[JSON], into: Mapping[str, Tensor], *, partial: bool = False) -> None:
    """Raise unless the stored tensors have the names, shapes and types of those they are to be read into.

    Args:
        table: The tables of all processes, one after the other.
        into: Tensors by name.
        partial: Whether stored tensors that ``into`` does not name are left alone.

    Raises:
        SparsepassError: It names the tensors that differ, and how.

    Example:
        >>> row = {"name": "w", "dtype": "float32", "shape": [2], "start": [0], "size": [2], "file": "f", "key": "w"}
        >>> check_fit([row], {"w": torch.zeros(2)})
    """
    stored = {row["name"]: (row["dtype"], tuple(row["shape"])) for row in table}
    wanted = {name: (_dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in into.items()}
    problems = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    if not partial:
        problems += [f"{name} is in the checkpoint, and nothing here takes it" for name in stored if name not in wanted]
    problems += [
        f"{name} is {stored[name][0]} {list(stored[name][1])} in the checkpoint and {kind} {list(shape)} here"
        for name, (kind, shape) in wanted.items()
        if name in stored and stored[name] != (kind, shape)
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise SparsepassError(
            f"the checkpoint does not fit this run: {shown}; resume with the program and the configuration it was made with, "
            "or start anew in another folder"
        )


@torch.no_grad()
def read_pieces(folder: Path, table: Iterable[JSON], into: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into given ones, in place, reading only the slices that this process holds.

    Exactness: bitwise.

    Args:
        folder: Where the files are.
        table: The tables of all processes, one after the other; `check_fit` has passed.
        into: Tensors by name, plain or DTensor, sharded as they like.

    Raises:
        SparsepassError: If the pieces do not cover a tensor.

    Example:
        >>> import tempfile
        >>> target = torch.zeros(2, 4)
        >>> with tempfile.TemporaryDirectory() as name:
        ...     table = write_pieces(Path(name), "rank-00000", {"w": torch.ones(2, 4)})
        ...     read_pieces(Path(name), table, {"w": target})
        >>> float(target.sum())
        8.0
    """
    held = {name: local_box(tensor) for name, tensor in into.items()}
    parts = {name: local(tensor) for name, tensor in into.items()}
    num_read = dict.fromkeys(into, 0)
    wanted: dict[str, list[JSON]] = {}
    for row in table:
        if row["name"] in into and _box(row).meet(held[row["name"]]):
            wanted.setdefault(row["file"], []).append(row)
    for file, rows in wanted.items():
        with open_tensors(folder / file) as opened:
            for row in rows:
                name, stored = row["name"], _box(row)
                shared = stored.meet(held[name])
                assert shared is not None
                whole = shared == stored
                slices = shared.slices_in(stored)
                found = opened.get_tensor(row["key"]) if whole else opened.get_slice(row["key"])[slices]
                parts[name][shared.slices_in(held[name])].copy_(found)
                num_read[name] += math.prod(shared.shape)
    for name, part in parts.items():
        if num_read[name] != part.numel():
            raise SparsepassError(f"{folder} holds {num_read[name]} of the {part.numel()} elements of {name} needed here")


def _box(row: JSON) -> Box:
    return Box(tuple(row["start"]), tuple(row["size"]))


def _writes(tensor: Tensor) -> bool:
    """Whether this process is the first of those that hold its piece."""
    if not isinstance(tensor, DTensor):
        return process_rank() == 0
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return all(index == 0 for placement, index in zip(tensor.placements, coordinate, strict=True) if placement.is_replicate())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
