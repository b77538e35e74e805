"""Runs a command in a forked child that is ended at one of its steps in the file system, or cannot write large files."""

import contextlib
import mmap
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300
"""What a command may take on a busy machine; it takes a few."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_STEPS = frozenset(
    ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")
)
_COUNT = struct.Struct("q")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Exit code, or minus the signal that ended it.
        steps: How many steps in the file system it took, as far as it came.
        seconds: Time from the fork to the end.
        said: What it wrote to standard output and standard error.
    """

    code: int
    steps: int
    seconds: float
    said: str


def run_until(
    arguments: Sequence[str],
    place: Path,
    *,
    step: int | None = None,
    seconds: float | None = None,
    by: signal.Signals = signal.SIGKILL,
    file_bytes: int | None = None,
) -> Ended:
    """Run the command line on arguments in a child that shares what this process has imported.

    Args:
        arguments: As a shell would give them.
        place: Folder whose steps count: opening a file to write it, renaming, removing, making and removing a folder.
        step: Before which of them the child gets the signal; None for none.
        seconds: After how much time it gets the signal; None for never.
        by: The signal.
        file_bytes: The largest file that it can write.

    Returns:
        How it ended.
    """
    # Neither the count nor what it says goes to a file: the child may be unable to write any.
    steps = mmap.mmap(-1, _COUNT.size)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _run(arguments, writing, _hook(place, steps, step, by), file_bytes)
        except BaseException:  # noqa: BLE001  (the child ends here, whatever it was)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    said, ended = b"", 0
    while not ended:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while more := os.read(reading, 1 << 16):
                said += more
        spent = time.monotonic() - started
        if seconds is not None and spent >= seconds and not ended:
            os.kill(child, by)
            seconds = None
        if spent > SECONDS and not ended:
            os.kill(child, signal.SIGKILL)
    os.close(reading)
    count = _COUNT.unpack(steps[:])[0]
    return Ended(code=os.waitstatus_to_exitcode(status), steps=count, seconds=spent, said=said.decode(errors="replace"))


def _run(arguments: Sequence[str], log: int, hook: Callable[[str, tuple[object, ...]], None], file_bytes: int | None) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["sparsepass", *arguments]
    from sparsepass.export.cli import main

    sys.addaudithook(hook)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _hook(place: Path, steps: mmap.mmap, step: int | None, by: signal.Signals) -> Callable[[str, tuple[object, ...]], None]:
    """Counts steps, and sends the signal before one of them."""
    root = os.fspath(place)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _STEPS:
            path = arguments[0]
        else:
            return
        # Names without a folder come from whoever removes a tree by its descriptors.
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if name and (name.startswith(root) or not os.path.isabs(name)):
            count = _COUNT.unpack(steps[:])[0] + 1
            steps[:] = _COUNT.pack(count)
            if count == step:
                os.kill(os.getpid(), by)

    return hook
