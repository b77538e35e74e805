"""Checkpoints of a training run: complete or not there, checked byte by byte, readable by any number of processes.

A checkpoint is a folder ``step-00000120``: tensors as safetensors, everything else as JSON, and ``checkpoint.json``, written
last, which lists every file with its size and SHA-256. No pickle is written or read. The folder is written beside its place
and moved over, so a run that is killed leaves the old checkpoints, and at most a hidden folder that the next save removes.

Several processes need one folder that all of them see.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import safetensors.torch
from torch import Tensor

from sparsepass.graph.support import SparsepassError, load_tensors, remove_if_dead, replaced_folder
from sparsepass.retrain.run.manifest import (
    MANIFEST_FILE,
    STATE_FILE,
    Checkpoint,
    DamagedError,
    differences,
    file_hash,
    part_file,
    read_manifest,
    to_json_text,
    write_manifest,
)
from sparsepass.retrain.run.pieces import check_fit, read_pieces, write_pieces
from sparsepass.retrain.run.processes import num_processes, process_rank, together

JSON = Any

CHECKPOINTS = "checkpoints"
"""Name of the folder, inside a run folder, that holds the checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a restored checkpoint gives back beside the tensors it was copied into.

    Attributes:
        path: The folder it came from.
        step: Optimizer steps taken.
        metric: As it was saved.
        state: The run's state, as it was saved (tuples come back as lists).
        local_state: This process's own state; None if another number of processes wrote the checkpoint.
        local_tensors: This process's own tensors; empty in that case.
        notes: What the user should be told: damaged checkpoints passed over, process states that could not be restored.
    """

    path: Path
    step: int
    metric: float | None
    state: JSON
    local_state: JSON = None
    local_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@final
class Checkpoints:
    """The checkpoints of one run: saves, finds and restores them, and keeps the newest and the best.

    With a process group, every method but the constructor is called by all processes.

    Args:
        folder: Where they lie; made at the first save.
        keep: How many of the newest stay. The one with the lowest metric stays besides.

    Raises:
        SparsepassError: If ``keep`` is less than 1.

    Example:
        >>> import tempfile, torch
        >>> weight = torch.ones(2, 4)
        >>> with tempfile.TemporaryDirectory() as name:
        ...     checkpoints = Checkpoints(Path(name))
        ...     path = checkpoints.save(10, {"weight": weight}, {"seen": 640}, metric=3.2)
        ...     _ = weight.zero_()
        ...     restored = checkpoints.restore("newest", {"weight": weight})
        >>> path.name, restored.step, restored.state, float(weight.sum())
        ('step-00000010', 10, {'seen': 640}, 8.0)
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise SparsepassError(f"at least one checkpoint is kept, got keep={keep}")
        self._folder = Path(folder).absolute()
        self._keep = keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, JSON],
        *,
        metric: float | None = None,
        local_tensors: Mapping[str, Tensor] | None = None,
        local_state: JSON = None,
    ) -> Path:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            step: Optimizer steps taken. A checkpoint of the same step is replaced.
            tensors: By name. Plain ones are the same in all processes, and the first writes them; of a DTensor each process
                writes its shard.
            state: JSON, the same in all processes.
            metric: What the run reached on the validation split; lower is better.
            local_tensors: This process's own, such as states of random generators.
            local_state: This process's own JSON.

        Returns:
            The folder of the checkpoint.

        Raises:
            SparsepassError: If the state is not JSON or the metric not finite, before anything is written; if the disk is
                full. The checkpoints that stood there are then untouched.
        """
        if metric is not None and not math.isfinite(metric):
            raise SparsepassError(f"the metric of step {step} is {metric}; give a finite number, or None")
        state_text = to_json_text(state, "state")
        to_json_text(local_state, "local_state")
        rank, target = process_rank(), self._folder / f"step-{step:08d}"
        with ExitStack() as stack:

            def begin() -> str:
                if rank:
                    return ""
                for left in self._folder.glob(".step-*.partial"):
                    remove_if_dead(left)
                return str(stack.enter_context(replaced_folder(target, force=True, checksums=False)))

            staging = Path(together(begin)[0])

            def write() -> dict[str, tuple[int, str]]:
                stem = f"rank-{rank:05d}"
                table = {"pieces": write_pieces(staging, stem, tensors), "local_state": local_state}
                part_file(staging, rank).write_text(json.dumps(table), encoding="utf-8")
                local = {name: tensor.detach().contiguous() for name, tensor in (local_tensors or {}).items()}
                safetensors.torch.save_file(local, _local_file(staging, rank))
                if rank == 0:
                    (staging / STATE_FILE).write_text(state_text, encoding="utf-8")
                mine = [*staging.glob(f"{stem}*"), *([staging / STATE_FILE] if rank == 0 else [])]
                return {path.name: _settle(path) for path in sorted(mine)}

            files = {name: entry for written in together(write) for name, entry in written.items()}

            def finish() -> None:
                if rank:
                    return
                serial = 1 + max((c.serial for c in self._scan()[0]), default=0)
                count = num_processes()
                written = Checkpoint(path=staging, step=step, metric=metric, serial=serial, num_processes=count, files=files)
                write_manifest(written)
                _settle(staging / MANIFEST_FILE)
                stack.close()  # moves the folder to its place
                _settle_names(self._folder)
                self._prune()

            together(finish)
        return target

    def newest(self) -> Checkpoint | None:
        """The checkpoint saved last whose files are all there; None if there is no checkpoint at all.

        Contents are checked by `restore`; here only the manifest and the sizes are.

        Raises:
            SparsepassError: If there are checkpoints and all are damaged, or one is of a newer format.
        """
        return next(iter(self._candidates("newest")), None)

    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest metric, the earliest of equals; None if none has a metric.

        Raises:
            SparsepassError: As for `newest`.
        """
        return next(iter(self._candidates("best")), None)

    def restore(
        self,
        which: Literal["newest", "best"] | int,
        into: Mapping[str, Tensor],
        *,
        expected: Mapping[str, JSON] | None = None,
        partial: bool = False,
    ) -> Restored:
        """Copy a checkpoint into the given tensors, in place.

        Every byte is checked first; if the newest (or best) is damaged, the next one is taken, and the notes say so. Nothing
        is copied unless everything fits. Exactness: bitwise.

        Args:
            which: The newest, the best, or the one of a step.
            into: Tensors by name, plain or DTensor; they may be sharded otherwise than those that were saved.
            expected: Entries that the saved state must hold: what tells this run from another.
            partial: Whether stored tensors that ``into`` does not name are left alone.

        Returns:
            The state, and what to tell the user.

        Raises:
            SparsepassError: If there is no such checkpoint or none is intact; if it is of another run (the differences are
                named), of a newer format, or its tensors have other names, shapes or types.
        """
        wanted = json.loads(to_json_text(expected or {}, "expected"))
        damaged: list[str] = []
        for found in self._candidates(which):
            if reason := _wrong_contents(found):
                damaged.append(f"{found.path.name} was passed over: {reason}")
                continue
            state = found.state()
            if unlike := differences(wanted, {key: state.get(key) for key in wanted}):
                raise SparsepassError(
                    f"{found.path} is a checkpoint of another run: {'; '.join(unlike)}; resume with the same settings, or "
                    "start anew in another folder (--from-checkpoint takes its weights there)"
                )
            parts = found.parts()
            table = [row for part in parts for row in part["pieces"]]
            check_fit(table, into, partial=partial)
            together(lambda path=found.path, rows=table: read_pieces(path, rows, into))  # type: ignore[misc]
            notes = (*found.notes, *damaged)
            restored = Restored(path=found.path, step=found.step, metric=found.metric, state=state, notes=notes)
            if found.num_processes != num_processes():
                note = (
                    f"{found.path.name} was written by {found.num_processes} process(es) and is read by {num_processes()}: the "
                    "states of single processes (random generators, data positions) were not restored"
                )
                return replace(restored, notes=(*notes, note))
            local_tensors = load_tensors(_local_file(found.path, process_rank()))
            return replace(restored, local_state=parts[process_rank()]["local_state"], local_tensors=local_tensors)
        kind = {"newest": "", "best": " with a metric"}.get(str(which), f" of step {which}")
        found_none = f"no intact checkpoint{kind} ({'; '.join(damaged)})" if damaged else f"no checkpoint{kind}"
        raise SparsepassError(f"{self._folder} has {found_none}; start anew, or name another folder")

    def _candidates(self, which: Literal["newest", "best"] | int) -> list[Checkpoint]:
        """Checkpoints in the order in which they are tried. All processes see what the first one sees."""
        intact, damaged = together(lambda: self._scan() if process_rank() == 0 else ([], []))[0]
        if damaged and not intact:
            raise SparsepassError(f"none of the checkpoints in {self._folder} is intact: {'; '.join(damaged)}")
        if which == "newest":
            intact = sorted(intact, key=lambda c: -c.serial)
        elif which == "best":
            intact = sorted((c for c in intact if c.metric is not None), key=lambda c: (c.metric, c.serial))
        else:
            intact = [c for c in intact if c.step == which]
        notes = tuple(f"{reason}; it was passed over" for reason in damaged)
        return [replace(found, notes=notes) for found in intact]

    def _scan(self) -> tuple[list[Checkpoint], list[str]]:
        """The checkpoints whose sizes are right, and one sentence for each of the others."""
        # A run killed between the two moves of a replacement leaves the old folder under a hidden one.
        hidden = [path for path in self._folder.glob(".step-*.old/step-*") if not (self._folder / path.name).exists()]
        intact, damaged = [], []
        for path in sorted([*self._in_place(), *hidden]):
            try:
                intact.append(read_manifest(path))
            except DamagedError as error:
                damaged.append(str(error))
        return intact, damaged

    def _in_place(self) -> list[Path]:
        return [path for path in self._folder.glob("step-*") if step_of(path) is not None]

    def _prune(self) -> None:
        """Remove, oldest first, all but the newest and the best, and what killed runs left."""
        found = sorted(self._scan()[0], key=lambda c: c.serial)
        measured = [c for c in found if c.metric is not None]
        kept = [c.path for c in found[-self._keep :]]
        kept += [min(measured, key=lambda c: (c.metric, c.serial)).path] if measured else []
        rest = dict.fromkeys(self._in_place(), 0) | {c.path: c.serial for c in found}
        _remove(sorted((path for path in rest if path not in kept), key=lambda path: rest[path]))
        _remove(path for path in self._folder.glob(".step-*.old") if not any(k.is_relative_to(path) for k in kept))
        _remove(self._folder.glob(".step-*.removed"))


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder; None of any other.

    >>> step_of(Path("run/checkpoints/step-00000120")), step_of(Path("run"))
    (120, None)
    """
    found = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(found[1]) if found else None


def _local_file(path: Path, rank: int) -> Path:
    return path / f"rank-{rank:05d}-local.safetensors"


def _wrong_contents(found: Checkpoint) -> str:
    """Check the contents of all files, shared out over the processes; say what is wrong, or nothing."""
    largest_first = sorted(found.files, key=lambda name: -found.files[name][0])
    mine = largest_first[process_rank() :: num_processes()]
    found_wrong = together(lambda: [name for name in mine if file_hash(found.path / name) != found.files[name][1]])
    wrong = [name for names in found_wrong for name in names]
    return f"the contents of {', '.join(wrong)} are not as they were written" if wrong else ""


def _settle(path: Path) -> tuple[int, str]:
    """Wait until a file is on the disk; give its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, file_hash(path)


def _settle_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: the new checkpoint stands before an old one goes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folders: Iterable[Path]) -> None:
    """Remove folders; each vanishes at once from view, so that none stands half removed."""
    for path in list(folders):
        gone = path
        if not path.name.startswith("."):
            gone = path.with_name(f".{path.name}.removed")
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
