"""What the machine does and has: memory that it keeps, the 16-bit type that it is fast in, installed packages."""

import ctypes
import sys
from importlib import metadata

import torch


def give_back_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps it, in pieces that may not fit what is needed next.

    In a calibration of SmolLM2-135M that is up to 250 MiB. Elsewhere than with glibc there is no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def fast_low_precision(device: torch.device | str) -> torch.dtype | None:
    """The 16-bit type that matmuls are fast in on a device, or None where float32 is faster.

    A processor without instructions for bfloat16 computes in it all the same, ten times slower than in float32.

    Args:
        device: Where the matmuls run.

    Returns:
        ``torch.bfloat16``, ``torch.float16`` (GPUs before Ampere), or None.

    >>> fast_low_precision("meta") is None
    True
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "cpu":
        # Private in torch, and there is no public way to ask.
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return torch.bfloat16 if any(getattr(torch.cpu, name, lambda: False)() for name in asked) else None
    return None


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
