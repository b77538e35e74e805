"""What fraction of a GPU's peak a runtime's kernels reach, and which layers its sparse kernels take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparsepass.export.plan.devices import Device
from sparsepass.export.plan.roofline import Machine
from sparsepass.graph.support import SparsepassError, closest

Dtype = Literal["bf16", "fp16", "fp8", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = ("bf16", "fp16", "fp8", "int8", "int4")
"""Types of the weights that can be planned. int4 is weight-only: it computes in 16 bits."""


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
        min_features: Weight type -> fewest input and output features of a 2:4 layer.
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
    min_features: Mapping[Dtype, int] | None = None

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
        )

    def refusal(self, in_features: int, out_features: int, dtype: Dtype) -> str | None:
        """Why the runtime's 2:4 kernels do not take a matrix of that shape, or None if they do."""
        align, least = (self.align or {}).get(dtype, 1), (self.min_features or {}).get(dtype, 1)
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % align:
                return f"{what} {size} is not a multiple of {align}, as 2:4 kernels need in {dtype}"
            if size < least:
                return f"{what} {size} is below {least}, the least that 2:4 kernels take in {dtype}"
        return None


# torch: SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS; its rows and columns of the sparse operand.
_CUSPARSELT: Mapping[Dtype, int] = {"bf16": 16, "fp16": 16, "fp8": 32, "int8": 32, "int4": 16}
# Published: dense 0.71 and 0.79, 2:4 0.49 and 0.45 of their peaks; dense kernels 0.78 to 0.84 of the bandwidth.
_DENSE_COMPUTE, _SPARSE_COMPUTE, _BANDWIDTH = 0.75, 0.47, 0.80
# Published: Sparse-Marlin reads 689 GB/s where the dense int4 kernel reads 763 GB/s.
_SPARSE_BANDWIDTH = _BANDWIDTH * 0.90

RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="ideal", summary="the GPU's peaks: no kernel is faster than this", takes_experts=True, takes_convolutions=True
        ),
        Runtime(
            name="tensorrt-llm",
            summary="an engine without launch costs, which runs a layer densely where that is faster",
            dense_compute=_DENSE_COMPUTE,
            sparse_compute=_SPARSE_COMPUTE,
            dense_bandwidth=_BANDWIDTH,
            sparse_bandwidth=_SPARSE_BANDWIDTH,
            gap_us=0.5,
            picks_faster=True,
            takes_convolutions=True,
            align=_CUSPARSELT,
            min_features=_CUSPARSELT,
        ),
        Runtime(
            name="torch",
            summary="torch's semi-structured tensors, called one by one: each call costs the processor about 0.2 ms",
            dense_compute=_DENSE_COMPUTE,
            sparse_compute=_SPARSE_COMPUTE,
            dense_bandwidth=_BANDWIDTH,
            sparse_bandwidth=_SPARSE_BANDWIDTH,
            dense_host_us=5.0,
            sparse_host_us=200.0,
            align=_CUSPARSELT,
            min_features=_CUSPARSELT,
        ),
    )
}


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


def peak(device: Device, dtype: Dtype) -> float:
    """Dense peak of a device for weights of a type, 1e12 operations a second.

    Raises:
        SparsepassError: If the device's tensor cores do not have that type.
    """
    if dtype == "int8":
        return device.int8_tops
    if dtype == "fp8":
        if device.fp8_tflops is None:
            raise SparsepassError(
                f"{device.title} ({device.architecture}) has no fp8 tensor cores; take --dtype int8 or bf16, or an Ada or "
                "Hopper GPU"
            )
        return device.fp8_tflops
    return device.half_tflops
