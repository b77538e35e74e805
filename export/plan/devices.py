"""GPUs and runtimes that can be planned for: the vendors' figures, and the part of them that a runtime's kernels reach.

This machine's processor can be planned for too; its figures are measured (`processor.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sparsepass.export.plan.roofline import Machine
from sparsepass.graph.support import SparsepassError, closest

CPU = "cpu"
"""Name of this machine's processor as a device."""
Dtype = Literal["bf16", "fp16", "fp8", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = ("bf16", "fp16", "fp8", "int8", "int4")
"""Types of the weights that can be planned. int4 is weight-only: it computes in 16 bits."""


@dataclass(frozen=True)
class Device:
    """What a vendor says of a GPU. Peaks are dense; sparse tensor cores do twice as much.

    Of the processor, peaks and bandwidth are what was measured.

    Attributes:
        name: As it is given to ``--gpu``.
        title: As the vendor writes it.
        architecture: Such as ``Ampere``.
        compute_capability: Such as ``8.0``.
        half_tflops: Peak of bf16 and fp16 with 32-bit accumulation, 1e12 operations a second.
        int8_tops: Peak of int8.
        fp8_tflops: Peak of fp8; None where the tensor cores have no fp8.
        bandwidth_gb_s: Peak of the memory, 1e9 bytes a second.
        memory_gb: Size of the memory, 1e9 bytes.
        source: Where the figures stand.
    """

    name: str
    title: str
    architecture: str
    compute_capability: str
    half_tflops: float
    int8_tops: float
    fp8_tflops: float | None
    bandwidth_gb_s: float
    memory_gb: float
    source: str


_ROWS = (
    # The fields of `Device`, in their order.
    ("a100", "A100 80GB SXM", "Ampere", "8.0", 312, 624, None, 2039, 80, "NVIDIA A100 data sheet"),
    ("a100-40gb", "A100 40GB", "Ampere", "8.0", 312, 624, None, 1555, 40, "NVIDIA A100 data sheet"),
    ("a30", "A30", "Ampere", "8.0", 165, 330, None, 933, 24, "NVIDIA A30 data sheet"),
    ("a10", "A10", "Ampere", "8.6", 125, 250, None, 600, 24, "NVIDIA A10 data sheet"),
    ("a40", "A40", "Ampere", "8.6", 149.7, 299.3, None, 696, 48, "NVIDIA A40 data sheet"),
    ("rtxa6000", "RTX A6000", "Ampere", "8.6", 154.8, 309.7, None, 768, 48, "NVIDIA Ampere GA102 whitepaper"),
    ("rtx3090", "GeForce RTX 3090", "Ampere", "8.6", 71, 284, None, 936, 24, "NVIDIA Ampere GA102 whitepaper"),
    ("l4", "L4", "Ada", "8.9", 121, 242.5, 242.5, 300, 24, "NVIDIA L4 data sheet"),
    ("l20", "L20", "Ada", "8.9", 119.5, 239, 239, 864, 48, "tables of peak figures in public code (no public data sheet)"),
    ("l40", "L40", "Ada", "8.9", 181.05, 362, 362, 864, 48, "NVIDIA L40 data sheet"),
    ("l40s", "L40S", "Ada", "8.9", 362.05, 733, 733, 864, 48, "NVIDIA L40S data sheet"),
    ("rtx4090", "GeForce RTX 4090", "Ada", "8.9", 165.2, 660.6, 330.3, 1008, 24, "NVIDIA Ada whitepaper"),
    ("h100", "H100 80GB SXM", "Hopper", "9.0", 989.4, 1978.9, 1978.9, 3350, 80, "NVIDIA H100 data sheet"),
    ("h100-pcie", "H100 80GB PCIe", "Hopper", "9.0", 756, 1513, 1513, 2000, 80, "NVIDIA H100 data sheet"),
    ("h200", "H200 SXM", "Hopper", "9.0", 989.4, 1978.9, 1978.9, 4800, 141, "NVIDIA H200 data sheet"),
    ("b200", "B200", "Blackwell", "10.0", 2250, 4500, 4500, 8000, 180, "NVIDIA HGX B200 and DGX B200 data sheets"),
    ("rtx5090", "GeForce RTX 5090", "Blackwell", "12.0", 209.5, 838, 419, 1792, 32, "NVIDIA RTX Blackwell whitepaper"),
)
DEVICES: Mapping[str, Device] = {row[0]: Device(*row) for row in _ROWS}
"""The GPUs that can be planned for. Figures are the vendor's, none is fitted."""

_OLDER: Mapping[str, str] = {
    **dict.fromkeys(("t4", "rtx2060", "rtx2070", "rtx2080", "rtx2080ti", "titanrtx", "gtx1650", "gtx1660"), "Turing"),
    **dict.fromkeys(("quadrortx4000", "quadrortx5000", "quadrortx6000", "quadrortx8000"), "Turing"),
    **dict.fromkeys(("v100", "v100s", "titanv", "gv100"), "Volta"),
    **dict.fromkeys(("p100", "p40", "p4", "gtx1060", "gtx1070", "gtx1080", "gtx1080ti", "titanxp"), "Pascal"),
    **dict.fromkeys(("m40", "m60", "gtx980", "gtx980ti"), "Maxwell"),
    **dict.fromkeys(("k40", "k80"), "Kepler"),
}
_PREFIXES = ("nvidia", "geforce", "tesla")


def is_processor(name: str) -> bool:
    """Whether a name means this machine's processor, which is in no table.

    Example:
        >>> is_processor("CPU"), is_processor("a100")
        (True, False)
    """
    return _plain(name) == CPU


def find_device(name: str) -> Device:
    """Return the GPU of that name; spaces, dashes, case and "NVIDIA", "GeForce" or "Tesla" do not matter.

    Raises:
        SparsepassError: If it is older than Ampere, or not in the table (the nearest known name is given).

    Example:
        >>> find_device("NVIDIA GeForce RTX 4090").bandwidth_gb_s
        1008
    """
    wanted = _plain(name)
    by_name = {_plain(device): device for device in DEVICES}
    for candidate in (wanted, f"rtx{wanted}", f"gtx{wanted}"):
        if candidate in by_name:
            return DEVICES[by_name[candidate]]
        if candidate in _OLDER:
            raise SparsepassError(
                f"GPU {name} is of the {_OLDER[candidate]} architecture, and 2:4 sparsity needs tensor cores of Ampere or "
                f"newer (compute capability 8.0): no runtime can gain from it there. Known GPUs: {', '.join(DEVICES)}"
            )
    near = closest(wanted, by_name, cutoff=0.5)
    hint = f"; did you mean {by_name[near]!r}?" if near else "; take the known one that is nearest to it."
    raise SparsepassError(f"GPU {name!r} is not in the table of public figures{hint} Known: {', '.join((*DEVICES, CPU))}")


def _plain(name: str) -> str:
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    for prefix in _PREFIXES:
        word = word.removeprefix(prefix)
    return word


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A model of the kernels that run the layers. All constants are published measurements; docs/plan.md names them.

    Attributes:
        name: As it is given to ``--runtime``.
        summary: One line for people.
        dense_compute: Fraction of the dense peak that large dense matmuls reach.
        sparse_compute: Fraction of the sparse peak (twice the dense one) that large 2:4 matmuls reach.
        dense_bandwidth: Fraction of the memory's peak that dense kernels and all else reach.
        sparse_bandwidth: The same of 2:4 kernels, counted on their fewer bytes.
        gap_us: Idle time between two kernels.
        dense_host_us: Time of the processor for one call, hidden behind the GPU's work where that takes longer.
        sparse_host_us: The same for a call of a 2:4 kernel.
        picks_faster: Whether the runtime itself runs a 2:4 weight with a dense kernel where that is faster.
        takes_experts: Whether grouped matmuls of experts have 2:4 kernels.
        takes_convolutions: Whether convolutions have.
        align: Weight type -> number that both features of a 2:4 layer must be a multiple of.
        aligns_rows: Whether that holds for the output features too.
        min_features: Weight type -> fewest input and output features of a 2:4 layer.
        most_sparse_tokens: Tokens above which a 2:4 layer takes as long as a dense one; None for no such limit.
        is_of_processor: Whether it runs on the processor, and not on a GPU.
    """

    name: str
    summary: str
    dense_compute: float = 1.0
    sparse_compute: float = 1.0
    dense_bandwidth: float = 1.0
    sparse_bandwidth: float = 1.0
    gap_us: float = 0.0
    dense_host_us: float = 0.0
    sparse_host_us: float = 0.0
    picks_faster: bool = False
    takes_experts: bool = False
    takes_convolutions: bool = False
    align: Mapping[Dtype, int] | None = None
    aligns_rows: bool = True
    min_features: Mapping[Dtype, int] | None = None
    most_sparse_tokens: int | None = None
    is_of_processor: bool = False

    def machine(self, device: Device, dtype: Dtype) -> Machine:
        """What the roofline needs of this runtime on a device, for weights of that type.

        Raises:
            SparsepassError: If the device cannot compute in that type.
        """
        peak_tflops = peak(device, dtype)
        return Machine(
            dense_flops=peak_tflops * 1e12 * self.dense_compute,
            sparse_flops=2 * peak_tflops * 1e12 * self.sparse_compute,
            dense_bandwidth=device.bandwidth_gb_s * 1e9 * self.dense_bandwidth,
            sparse_bandwidth=device.bandwidth_gb_s * 1e9 * self.sparse_bandwidth,
            gap_s=self.gap_us * 1e-6,
            dense_host_s=self.dense_host_us * 1e-6,
            sparse_host_s=self.sparse_host_us * 1e-6,
            picks_faster=self.picks_faster,
            most_sparse_tokens=self.most_sparse_tokens,
        )

    def refusal(self, in_features: int, out_features: int, dtype: Dtype) -> str | None:
        """Why the runtime's 2:4 kernels do not take a matrix of that shape, or None if they do."""
        align, least = (self.align or {}).get(dtype, 1), (self.min_features or {}).get(dtype, 1)
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % align and (self.aligns_rows or what == "in_features"):
                return f"{what} {size} is not a multiple of {align}, as 2:4 kernels need in {dtype}"
            if size < least:
                return f"{what} {size} is below {least}, the least that 2:4 kernels take in {dtype}"
        return None


# torch: SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS; its rows and columns of the sparse operand.
_CUSPARSELT: Mapping[Dtype, int] = {"bf16": 16, "fp16": 16, "fp8": 32, "int8": 32, "int4": 16}
# Published: dense 0.71 and 0.79, 2:4 0.49 and 0.45 of their peaks; dense kernels 0.78 to 0.84 of the bandwidth.
# Published: Sparse-Marlin reads 689 GB/s where the dense int4 kernel reads 763 GB/s: 0.9 of the dense kernels' bandwidth.
_TORCH = Runtime(
    name="torch",
    summary="torch's semi-structured tensors, called one by one: each call costs the processor about 0.2 ms",
    dense_compute=0.75,
    sparse_compute=0.47,
    dense_bandwidth=0.80,
    sparse_bandwidth=0.80 * 0.90,
    dense_host_us=5.0,
    sparse_host_us=200.0,
    align=_CUSPARSELT,
    min_features=_CUSPARSELT,
)
_ENGINE = replace(
    _TORCH,
    name="tensorrt-llm",
    summary="an engine without launch costs, which runs a layer densely where that is faster",
    gap_us=0.5,
    dense_host_us=0.0,
    sparse_host_us=0.0,
    picks_faster=True,
    takes_convolutions=True,
)
_IDEAL = Runtime(
    name="ideal", summary="the GPU's peaks: no kernel is faster than this", takes_experts=True, takes_convolutions=True
)
# graph/packed: a row's codes fill whole bytes; with more than 16 tokens, arithmetic takes the time on most processors.
_PACKED = Runtime(
    name="packed",
    summary="sparsepass's own kernels on the processor, as far as bytes allow: up to 16 tokens read the packed weights",
    sparse_compute=0.5,
    align=dict.fromkeys(DTYPES, 8),
    aligns_rows=False,
    most_sparse_tokens=16,
    is_of_processor=True,
)
RUNTIMES: Mapping[str, Runtime] = {runtime.name: runtime for runtime in (_IDEAL, _ENGINE, _TORCH, _PACKED)}


def find_runtime(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        SparsepassError: If there is none.

    Example:
        >>> find_runtime("torch").picks_faster
        False
    """
    if name in RUNTIMES:
        return RUNTIMES[name]
    near = closest(name, RUNTIMES)
    hint = f"; did you mean {near!r}?" if near else "."
    raise SparsepassError(f"runtime {name!r} is not known{hint} Known: {', '.join(RUNTIMES)}")


def runtime_for(device: Device, name: str | None) -> Runtime:
    """The runtime of that name; without one, ``tensorrt-llm`` for a GPU and ``packed`` for the processor.

    Raises:
        SparsepassError: If there is no such runtime, or the device does not run it.

    Example:
        >>> runtime_for(DEVICES["a100"], None).name
        'tensorrt-llm'
    """
    is_processor = device.name == CPU
    found = find_runtime(name or (_PACKED if is_processor else _ENGINE).name)
    if found.is_of_processor != is_processor:
        fitting = ", ".join(runtime.name for runtime in RUNTIMES.values() if runtime.is_of_processor == is_processor)
        raise SparsepassError(f"runtime {found.name} does not run on {device.title}; expected {fitting} there")
    return found


def peak(device: Device, dtype: Dtype) -> float:
    """Dense peak of a device for weights of a type, 1e12 operations a second.

    Raises:
        SparsepassError: If the device's tensor cores do not have that type.
    """
    if dtype == "int8":
        return device.int8_tops
    if dtype == "fp8":
        if device.name == CPU:
            raise SparsepassError("packed layers on the processor have no fp8; take dtype=bf16, fp16, int8 or int4")
        if device.fp8_tflops is None:
            raise SparsepassError(
                f"{device.title} ({device.architecture}) has no fp8 tensor cores; take dtype=int8 or bf16, or an Ada or "
                "Hopper GPU"
            )
        return device.fp8_tflops
    return device.half_tflops
