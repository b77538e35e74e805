"""Ends a command at one place, looks at what is there, and runs it again."""

import contextlib
import hashlib
import importlib
import itertools
import json
import pkgutil
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from tests.interrupted.commands import Command
from tests.interrupted.disks import change, small_disk
from tests.interrupted.ending import Ended, run_until

import sparsepass
from sparsepass.graph.support.checksums import changed_files, read_checksums

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_KEPT = ".run"
"""How a folder ends in which progress is kept on purpose."""


def imported() -> None:
    """Import what the commands import, before anything is forked, and compute in one thread as the children will."""
    torch.set_num_threads(1)
    ours = [module.name for module in pkgutil.walk_packages(sparsepass.__path__, "sparsepass.")]
    for name in ("transformers.models.llama.modeling_llama", "onnx", "onnxruntime", "onnx_ir", "datasets", *ours):
        if not name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # the library of kernels is no module
                importlib.import_module(name)


class BrokenError(Exception):
    """What a command left behind is neither nothing, nor the old result, nor a whole one, or it cannot be run again."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What stops a command: a signal before one of its steps in the file system or after some time, or the disk.

    Attributes:
        by: The signal.
        step: The step.
        seconds: The time.
        file_bytes: The largest file that it can write.
        free_bytes: Room on the disk that it writes to.
        is_read_only: Nothing can be written there.
    """

    by: signal.Signals = signal.SIGKILL
    step: int | None = None
    seconds: float | None = None
    file_bytes: int | None = None
    free_bytes: int | None = None
    is_read_only: bool = False

    @property
    def is_disk(self) -> bool:
        """Whether it is the disk that stops the command."""
        return self.is_read_only or self.free_bytes is not None

    def __str__(self) -> str:
        if self.is_disk:
            return "a read-only disk" if self.is_read_only else f"a disk with {self.free_bytes} bytes free"
        if self.file_bytes is not None:
            return f"files of at most {self.file_bytes} bytes"
        return f"{self.by.name} " + (f"before step {self.step}" if self.step is not None else f"after {self.seconds:.2f} s")


class Trial:
    """A command that is ended again and again.

    Args:
        command: The command.
        base: What it reads; see `make_base`.
        here: Where it writes. Made anew each time, in a folder of its own, on which a disk can be mounted.
    """

    def __init__(self, command: Command, base: Path, here: Path) -> None:
        self.command, self._base, self._here = command, base, here
        self._prepare()
        self._old = {name: _digest(here / name) for name in command.results}
        self._before = (_digest(here), set(here.rglob("*")))
        self.reference = self._run()
        if self.reference.code != command.code:
            raise BrokenError(f"by itself it ends with {self.reference.code}: {self.reference.said[-500:]}")
        self._names, self._weights = _names(here), _weights(here)
        self._bytes = sum(each.stat().st_size for each in here.rglob("*") if each.is_file())

    def places(self, number: int) -> list[Place]:
        """So many places, by each signal in turn: steps far apart, and times where there are fewer steps."""
        steps = self.reference.steps
        chosen = sorted({1 + round(index * (steps - 1) / max(number - 1, 1)) for index in range(number)} if steps else ())
        times = number - len(chosen)
        signals = itertools.cycle(SIGNALS)
        found = [Place(by=next(signals), step=step) for step in chosen]
        seconds = [self.reference.seconds * (index + 0.5) / times for index in range(times)]
        return found + [Place(by=next(signals), seconds=moment) for moment in seconds]

    def sizes(self, number: int) -> list[Place]:
        """So many limits on the size of files, up to the size of the largest that it writes."""
        files = [each for name in self.command.results for each in (self._here / name, *(self._here / name).rglob("*"))]
        largest = max(each.stat().st_size for each in files if each.is_file())
        return [Place(file_bytes=largest * index // number) for index in range(number)]

    def disks(self, number: int) -> list[Place]:
        """A read-only disk, and so many that are full, or become full on the way."""
        return [Place(is_read_only=True), *(Place(free_bytes=self._bytes * index // number) for index in range(number))]

    def end_at(self, place: Place) -> str:
        """End the command there and, where that left anything, run it again.

        Returns:
            What was there in between: ``absent``, ``old`` or ``whole``.

        Raises:
            BrokenError: If it was anything else, or the second run did not do what one run alone does.
            NoDiskError: If the place is a disk, and none can be mounted.
        """
        with small_disk(self._here.parent) if place.is_disk else contextlib.nullcontext():
            return self._ended_at(place)

    def _ended_at(self, place: Place) -> str:
        self._prepare()
        if place.is_disk:
            change(self._here.parent, free_bytes=place.free_bytes, is_read_only=place.is_read_only)
        ended = self._run(place)
        if place.is_disk:
            change(self._here.parent)
        if (place.is_disk or place.file_bytes is not None) and ended.code not in (self.command.code, 2):
            raise BrokenError(f"{place}: exit code {ended.code}: {ended.said[-500:]}")
        if "Traceback" in ended.said:
            raise BrokenError(f"{place}: a traceback: {ended.said[-500:]}")
        states = {name: self._state(name) for name in self.command.results}
        if torn := [f"{name} {state}" for name, state in states.items() if state not in ("absent", "old", "whole")]:
            raise BrokenError(f"{place}: {'; '.join(torn)}")
        if self._is_untouched():  # the second run would be the first
            return min(states.values())
        whole = all(self._state(name) == "whole" for name in self.command.results)
        again = self._run()
        # A command that is done and finds its own result there refuses to write over it.
        refused = again.code == 2 and whole and "--force" in again.said
        if again.code != self.command.code and not refused:
            raise BrokenError(f"{place} (ended with {ended.code}): again, it ends with {again.code}: {again.said[-500:]}")
        for name in self.command.results:
            if not _is_whole(self._here / name):
                raise BrokenError(f"{place}: after the second run {name} is {self._state(name)}")
        if (left := _names(self._here)) != self._names:
            raise BrokenError(
                f"{place}: after the second run {sorted(left ^ self._names)} differ from what one run alone writes"
            )
        if _weights(self._here) != self._weights:
            raise BrokenError(f"{place}: after the second run the weights are not those of one run alone")
        return min(states.values())

    def _prepare(self) -> None:
        shutil.rmtree(self._here, ignore_errors=True)
        self._here.parent.mkdir(exist_ok=True)
        self.command.prepare(self._base, self._here)

    def _run(self, place: Place | None = None) -> Ended:
        at = place or Place()
        arguments = self.command.given(self._base, self._here)
        return run_until(arguments, self._here, step=at.step, seconds=at.seconds, by=at.by, file_bytes=at.file_bytes)

    def _is_untouched(self) -> bool:
        return (_digest(self._here), set(self._here.rglob("*"))) == self._before

    def _state(self, name: str) -> str:
        path = self._here / name
        if not path.exists():
            return "absent" if self._old[name] is None else "gone"
        if _digest(path) == self._old[name]:
            return "old"
        return "whole" if _is_whole(path) else "torn"


def _is_whole(path: Path) -> bool:
    if path.is_dir():
        reports = [path / "report.json"] if (path / "report.json").exists() else []
        # A folder that holds a report alone has no checksums.
        return bool(reports or read_checksums(path)) and not changed_files(path) and all(map(_is_whole, reports))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return bool(file.keys()) and "sparsepass" in (file.metadata() or {})
    text = path.read_text(encoding="utf-8")
    try:
        for each in text.splitlines() if path.suffix == ".jsonl" else [text] if path.suffix == ".json" else []:
            json.loads(each)
    except ValueError:
        return False
    return text.endswith("\n")


def _digest(path: Path) -> str | None:
    """Of a file, or of all files in a folder but hidden ones; None for what is not there."""
    if not path.exists():
        return None
    files = sorted(each for each in path.rglob("[!.]*") if each.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _names(here: Path) -> set[str]:
    """Everything that lies there, hidden files too, but for progress that is kept on purpose."""
    found = {path.relative_to(here) for path in here.rglob("*")}
    return {str(name) for name in found if not any(part.endswith(_KEPT) for part in name.parts[:-1])}


def _weights(here: Path) -> dict[str, str | None]:
    """The digest of each file of tensors, but for progress."""
    files = [*here.rglob("*.safetensors"), *here.rglob("*.onnx"), *here.rglob("*.onnx.data")]
    kept = [file for file in files if not any(part.endswith(_KEPT) for part in file.relative_to(here).parts)]
    return {str(file.relative_to(here)): _digest(file) for file in kept}
