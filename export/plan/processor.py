"""This machine's processor as a device: what it reads and computes in a second is measured, since no vendor says it."""

import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Final

import torch

from sparsepass.export.plan.devices import CPU, Device
from sparsepass.graph.native import find_kernels, processor
from sparsepass.graph.support import SparsepassError, fast_low_precision

_READ_BYTES: Final = 512 << 20  # many times the last cache, of which a virtual machine has a part
_MATMUL: Final = (512, 2048, 2048)  # tokens, columns, rows
_REPEATS: Final = 7


@cache
def this_processor() -> Device:
    """Measure the processor with all of torch's threads; it takes about a second, once in a process.

    Units: as `Device`.

    Returns:
        The bandwidth is that of reading memory once. Peaks are those of torch's product of 512 tokens with a weight of
        2048 x 2048, in the 16-bit type that is fast here or else in float32.

    Example:
        >>> this_processor().bandwidth_gb_s > 0
        True
    """
    tflops = _tflops()
    threads = torch.get_num_threads()
    return Device(
        name=CPU,
        title=f"{processor()}, {threads} thread{'s' if threads > 1 else ''}",
        architecture="processor",
        compute_capability="",
        half_tflops=tflops,
        int8_tops=tflops,  # weights are unpacked for the same product
        fp8_tflops=None,
        bandwidth_gb_s=_bandwidth_gb_s(),
        memory_gb=_memory_gb(),
        source="measured on this machine",
    )


def _bandwidth_gb_s() -> float:
    data, library = torch.ones(_READ_BYTES // 4), find_kernels()
    if isinstance(library, SparsepassError):
        return _READ_BYTES / _median_s(data.sum) / 1e9
    return _READ_BYTES / _median_s(lambda: library.read(data.data_ptr(), _READ_BYTES, torch.get_num_threads())) / 1e9


def _tflops() -> float:
    tokens, columns, rows = _MATMUL
    dtype = fast_low_precision("cpu") or torch.float32
    x_TI, weight_OI = torch.ones(tokens, columns, dtype=dtype), torch.ones(rows, columns, dtype=dtype)
    with torch.no_grad():
        seconds = _median_s(lambda: torch.nn.functional.linear(x_TI, weight_OI))
    return 2 * tokens * columns * rows / seconds / 1e12


def _memory_gb() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _median_s(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
