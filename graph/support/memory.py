"""Memory that is free, but that the process still holds."""

import ctypes
import functools
import sys


def give_back_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps it, in pieces that may not fit what is needed next.

    In a calibration of SmolLM2-135M that is up to 250 MiB. Elsewhere than with glibc there is no such call.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
