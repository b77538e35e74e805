"""The compiled kernels: found beside this file, loaded by ctypes; `interface.h` says what each function does.

Tensors are not known here: functions take addresses, which ``Tensor.data_ptr()`` gives.
"""

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from sparsepass.graph.support import SparsepassError, nearest

VERSION: Final = 3
"""Of the interface that this file declares."""
TORCH: Final = "torch"
"""The path of torch's own operations, which needs no library and is slow."""
KINDS: Final = {"bf16": 0, "fp16": 1, "int8": 2, "int4": 3}
TYPES: Final = {"bfloat16": 0, "float16": 1, "float32": 2}
"""Of activations, results and scores, by torch's names."""
PATHS: Final = {TORCH: -1, "generic": 0, "avx2": 1, "avx512": 2, "amx": 3}
VARIABLE: Final = "SPARSEPASS_KERNEL"
_INSTRUCTIONS: Final = {"avx2": "AVX2", "avx512_bf16": "AVX512 with BF16", "avx512_vnni": "VNNI", "amx_bf16": "AMX"}


class NativeWeight(ctypes.Structure):
    """A weight in memory, as `interface.h` has it."""

    _fields_ = (
        ("kind", c_int32),
        ("path", c_int32),
        ("dense", c_int32),
        ("k", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("group_size", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("branch", c_void_p),
        ("bias", c_void_p),
    )


_FUNCTIONS: Final[dict[str, tuple[Any, list[Any]]]] = {
    "version": (c_int, []),
    "use_openmp": (None, [c_void_p]),
    "has": (c_int, [c_int, c_int]),
    "huge_pages": (None, [c_void_p, c_int64]),
    "laid_out_bytes": (c_int64, [c_int, c_int, c_int64, c_int64]),
    "row_multiple": (c_int64, [c_int, c_int, c_int64]),
    "lay_out": (c_int, [c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int]),
    "store": (c_int, [c_int, c_int, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int]),
    "bad_codes": (c_int64, [c_void_p, c_int64, c_int64, c_int]),
    "largest_of_four": (None, [c_int, c_void_p, c_int64, c_int, c_void_p, c_int]),
    "rms_norm": (None, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int]),
    "read": (c_int64, [c_void_p, c_int64, c_int]),
    "unpack": (c_int, [POINTER(NativeWeight), c_int64, c_int64, c_int, c_void_p, c_int]),
    "linear": (c_int, [POINTER(NativeWeight), c_int, c_void_p, c_int64, c_int64, c_void_p, c_int]),
    "linear_parts": (
        c_int,
        [POINTER(NativeWeight), c_int, c_void_p, c_int64, c_int64, c_int, c_void_p, c_void_p, c_int],
    ),
}


@dataclass(frozen=True, eq=False)
class Kernels:
    """The functions of `interface.h`, without their prefix."""

    use_openmp: Callable[[object], None]
    has: Callable[[int, int], int]
    huge_pages: Callable[[int, int], None]
    laid_out_bytes: Callable[[int, int, int, int], int]
    row_multiple: Callable[[int, int, int], int]
    lay_out: Callable[[int, int, int, int, int, int, int, int], int]
    store: Callable[[int, int, int, int, int, int, int, int], int]
    bad_codes: Callable[[int, int, int, int], int]
    largest_of_four: Callable[[int, int, int, int, int, int], None]
    rms_norm: Callable[[int, int, int, int, int, float, int, int], None]
    read: Callable[[int, int, int], int]
    unpack: Callable[[object, int, int, int, int, int], int]
    linear: Callable[[object, int, int, int, int, int, int], int]
    linear_parts: Callable[[object, int, int, int, int, int, object, object, int], int]


def library_file() -> Path:
    """Where the compiled kernels lie, if they do."""
    return Path(__file__).with_name("libsparsepass.dylib" if sys.platform == "darwin" else "libsparsepass.so")


@cache
def kernels() -> Kernels | None:
    """The compiled kernels; None if they cannot be loaded, which is told once."""
    found = find_kernels()
    if isinstance(found, SparsepassError):
        warnings.warn(
            f"{found}. Packed layers run all the same, by torch's own operations: each call unpacks the whole weight, which "
            "is many times slower than the dense layer. Install a C++ compiler (g++) and sparsepass anew, or take its wheel",
            stacklevel=2,
        )
        return None
    return found


@cache
def find_kernels() -> Kernels | SparsepassError:
    """The compiled kernels, or why they cannot be loaded.

    Threads are those of torch, if it has been imported before and brings its own OpenMP runtime.
    """
    try:
        found = load(library_file())
    except SparsepassError as error:
        return error
    found.use_openmp(openmp())
    return found


def load(file: Path) -> Kernels:
    """Load compiled kernels from a file.

    Raises:
        SparsepassError: If there is no such file, it is no library for this processor, or one of another interface.
    """
    if not file.is_file():
        raise SparsepassError(f"the kernels were not compiled when sparsepass was installed ({file} is missing)")
    try:
        library = ctypes.CDLL(str(file))
        functions = {name: _declared(library, name) for name in _FUNCTIONS}
    except (OSError, AttributeError) as error:
        raise SparsepassError(f"the compiled kernels cannot be loaded ({error})") from error
    if (version := functions.pop("version")()) != VERSION:
        raise SparsepassError(f"the compiled kernels {file} are of version {version}, and this sparsepass needs {VERSION}")
    return Kernels(**functions)


def available_paths(kind: str) -> tuple[str, ...]:
    """The paths that this processor has for a kind of values, the fastest one first; ``torch`` is always one.

    Example:
        >>> available_paths("bf16")[-1]
        'torch'
    """
    library = kernels()
    names = () if library is None else ("amx", "avx512", "avx2", "generic")
    return (*(name for name in names if library is not None and library.has(PATHS[name], KINDS[kind])), TORCH)


def best_path(kind: str) -> str:
    """The fastest path for a kind of values, or the one that the environment variable SPARSEPASS_KERNEL names.

    Raises:
        SparsepassError: If that is no path, or this processor lacks it.

    Example:
        >>> best_path("int8") in PATHS
        True
    """
    forced = os.environ.get(VARIABLE, "")
    if not forced:
        return available_paths(kind)[0]
    if forced not in PATHS:
        raise SparsepassError(
            f"{VARIABLE} is {forced!r}, which names no kernel{nearest(forced, list(PATHS))}; leave it unset for the fastest one"
        )
    if forced != TORCH and forced not in (have := available_paths(kind)):
        raise SparsepassError(
            f"{VARIABLE}={forced}, and there is no such kernel for {kind} here: {', '.join(have)}; leave it unset for the "
            "fastest one"
        )
    return forced


def _declared(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, f"sparsepass_{name}")
    function.restype, function.argtypes = _FUNCTIONS[name]
    return function


def openmp() -> c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch brings and has loaded; None for threads of the kernels' own."""
    spec = find_spec("torch") if "torch" in sys.modules else None
    if spec is None or spec.origin is None or not hasattr(os, "RTLD_NOLOAD"):
        return None
    for file in sorted((Path(spec.origin).parent / "lib").glob("libgomp*.so*")):
        try:
            runtime = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
        except OSError:
            continue  # there, and not what torch uses
        return ctypes.cast(runtime.GOMP_parallel, c_void_p)
    return None


def processor() -> str:
    """The processor's name, where the system tells it, and which of the instructions that kernels use it has.

    Example:
        >>> len(processor()) > 0
        True
    """
    name, flags = platform.processor() or platform.machine(), set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() == "flags":
            flags = set(value.split())
    return ", ".join([name, *(said for flag, said in _INSTRUCTIONS.items() if flag in flags)])
