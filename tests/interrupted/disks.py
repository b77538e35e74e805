"""A small disk in memory, which can be full or read-only."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLENTY = 1 << 30
"""Bytes of a disk that has room for whatever a command on a tiny model writes."""


class NoDiskError(Exception):
    """This user, or this container, may not mount one."""


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """Mount a disk in memory on an empty folder, with plenty of room until `change` says otherwise.

    Raises:
        NoDiskError: If it cannot be mounted: only root can, and not in every container.
    """
    try:
        _mount(place, f"size={PLENTY}", kind=("-t", "tmpfs", "tmpfs"))
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoDiskError(f"no disk can be mounted on {place}: {error}") from error
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def change(place: Path, *, free_bytes: int | None = None, is_read_only: bool = False) -> None:
    """Leave so much room on the disk that is mounted there (None: plenty), or let nothing be written to it."""
    pages = sum(-(-file.stat().st_blocks * 512 // 4096) * 4096 for file in place.rglob("*"))
    size = PLENTY if free_bytes is None else max(pages + free_bytes, 4096)  # a size of 0 would be no limit
    _mount(place, f"remount,{'ro' if is_read_only else 'rw'},size={size}")


def _mount(place: Path, options: str, kind: tuple[str, ...] = ()) -> None:
    subprocess.run(["mount", *kind[:-1], "-o", options, *kind[-1:], str(place)], check=True, capture_output=True)
