"""Which of TensorRT's packages are installed, what each can do on this machine, and which one is taken.

Nothing native is imported here: packages are looked up, and the GPU is asked through the driver's own library.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from sparsepass.graph.support import SparsepassError, how_to_install, package_version

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@final
@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        name: Its name.
        sm: Compute capability, 86 for SM86.
    """

    name: str
    sm: int


@final
@dataclass(frozen=True, kw_only=True)
class EngineBuilder:
    """A package that builds engines.

    Attributes:
        name: What ``--runtime`` takes.
        modules: Python modules with its interface, the first one that is there is used.
        distributions: Names under which pip knows it, for its version.
        extra: The extra of sparsepass that installs it.
        needs_gpu: Whether it builds on a GPU only.
        does: What it does where it can.
    """

    name: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    extra: str
    needs_gpu: bool
    does: str

    @property
    def install(self) -> str:
        """The commands that install it."""
        return how_to_install(self.extra)


RUNTIMES: Final[Mapping[str, EngineBuilder]] = {
    row.name: row
    for row in (
        EngineBuilder(
            name="tensorrt",
            modules=("tensorrt", "tensorrt_bindings"),
            distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
            extra="tensorrt",
            needs_gpu=True,
            does="times dense and sparse tactics and reports which it took",
        ),
        EngineBuilder(
            name="tensorrt-rtx",
            modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
            distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
            extra="tensorrt-rtx",
            needs_gpu=False,
            does="builds ahead of time for SM80, SM86, SM89 and SM120 and picks kernels later, on the GPU that runs the engine",
        ),
        EngineBuilder(
            name="torch-tensorrt",
            modules=("torch_tensorrt",),
            distributions=("torch-tensorrt", "torch-tensorrt-rtx"),
            extra="torch-tensorrt",
            needs_gpu=True,
            does="builds one plain engine (no key-value cache) straight from the program's graph",
        ),
    )
}
"""Name -> package. `choose` goes through them in this order."""


@final
@dataclass(frozen=True, kw_only=True)
class Installed:
    """A package that is there.

    Attributes:
        runtime: Its row.
        module: The module to import.
        version: Its version, "unknown" if pip does not know it.
    """

    runtime: EngineBuilder
    module: str
    version: str


def find(name: str) -> Installed | None:
    """Look for one of `RUNTIMES`; None if it is not installed.

    Raises:
        SparsepassError: If the name is unknown.
    """
    if name not in RUNTIMES:
        raise SparsepassError(f"unknown runtime {name!r} (known are {', '.join(RUNTIMES)})")
    row = RUNTIMES[name]
    module = next((each for each in row.modules if _is_there(each)), None)
    if module is None:
        return None
    versions = filter(None, map(package_version, row.distributions))
    return Installed(runtime=row, module=module, version=next(versions, "unknown"))


def choose(name: str | None, gpus: tuple[Gpu, ...]) -> Installed:
    """Take the package that the user named, or the first one that can build here.

    Args:
        name: Name in `RUNTIMES`; None to choose tensorrt where there is a GPU, else tensorrt-rtx. torch-tensorrt is taken
            only by name.
        gpus: GPUs of this machine.

    Raises:
        SparsepassError: If it is not installed or cannot build here. The message says what to install, and what each
            package can do on this machine.
    """
    if name is not None:
        installed = find(name)
        if installed is None:
            raise SparsepassError(f"{name} is not installed; {RUNTIMES[name].install}", lines=abilities(gpus))
        if installed.runtime.needs_gpu and not gpus:
            raise SparsepassError(f"{name} {installed.version} builds on a GPU only, and none is here", lines=abilities(gpus))
        return installed
    for each in ("tensorrt", "tensorrt-rtx"):
        installed = find(each)
        if installed is not None and (gpus or not installed.runtime.needs_gpu):
            return installed
    best = RUNTIMES["tensorrt" if gpus else "tensorrt-rtx"]
    raise SparsepassError(f"no TensorRT that can build here is installed; {best.install}", lines=abilities(gpus))


def abilities(gpus: tuple[Gpu, ...]) -> list[str]:
    """Tell what each package can do on this machine, one line each."""
    lines = [f"On this machine ({', '.join(f'{gpu.name}, SM{gpu.sm}' for gpu in gpus) or 'no GPU'}):"]
    for row in RUNTIMES.values():
        installed = find(row.name)
        state = f"{row.name} {installed.version} is installed" if installed else f"{row.name} is not installed ({row.install})"
        able = (
            f"it {row.does}"
            if gpus or not row.needs_gpu
            else f"it cannot build here, for want of a GPU; elsewhere it {row.does}"
        )
        lines.append(f"- {state}: {able}")
    if not gpus:
        lines.append("- No engine can be run here, so outputs, times and the kernels that were taken stay unknown.")
    return lines


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine, as the driver knows them; empty without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), index):
            continue
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        found.append(Gpu(name=name.value.decode(errors="replace"), sm=major.value * 10 + minor.value))
    return tuple(found)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
