"""What a run of a command leaves in the report: when, with which versions, on which machine."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from sparsepass.export.report.schema import MachineEntry, RunEntry

_PACKAGES = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "peft", "safetensors", "numpy", "tensorrt",
    "tensorrt-rtx-cu13-bindings", "torch-tensorrt",
)  # fmt: skip


def run_record(stage: str, *, command: str | None, seconds: float) -> RunEntry:
    """Describe one run: what was called, when, with which versions, on which machine.

    Args:
        stage: Such as ``export``.
        command: The command line; None for a call from Python.
        seconds: Wall time.
    """
    return RunEntry(
        stage=stage,
        command=command or "python",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        versions=versions(),
        machine=machine(),
    )


def versions() -> dict[str, str]:
    """Versions of sparsepass, Python, and the libraries that are installed."""
    found = {"sparsepass": _version("sparsepass") or "unknown", "python": platform.python_version()}
    return found | {package: version for package in _PACKAGES if (version := _version(package))}


def machine() -> MachineEntry:
    """What the figures were measured on; nothing that names the machine or its user."""
    import torch

    return MachineEntry(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        accelerators=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            return platform.machine()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
