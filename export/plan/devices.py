"""Public figures of GPUs that have sparse tensor cores, and the older ones that have none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sparsepass.graph.support import SparsepassError, closest


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a vendor says of a GPU. Peaks are dense; sparse tensor cores do twice as much.

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
    # name, title, architecture, capability, bf16, int8, fp8, GB/s, GB, source
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
DEVICES: Mapping[str, Device] = {
    row[0]: Device(
        name=row[0],
        title=row[1],
        architecture=row[2],
        compute_capability=row[3],
        half_tflops=row[4],
        int8_tops=row[5],
        fp8_tflops=row[6],
        bandwidth_gb_s=row[7],
        memory_gb=row[8],
        source=row[9],
    )
    for row in _ROWS
}
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
    for candidate in (wanted, f"rtx{wanted}"):
        if candidate in by_name:
            return DEVICES[by_name[candidate]]
    for candidate in (wanted, f"rtx{wanted}", f"gtx{wanted}"):
        if candidate in _OLDER:
            raise SparsepassError(
                f"GPU {name} is of the {_OLDER[candidate]} architecture, and 2:4 sparsity needs tensor cores of Ampere or "
                f"newer (compute capability 8.0): no runtime can gain from it there. Known GPUs: {', '.join(DEVICES)}"
            )
    near = closest(wanted, by_name, cutoff=0.5)
    hint = f"; did you mean {by_name[near]!r}?" if near else "; take the known one that is nearest to it."
    raise SparsepassError(f"GPU {name!r} is not in the table of public figures{hint} Known: {', '.join(DEVICES)}")


def _plain(name: str) -> str:
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    for prefix in _PREFIXES:
        word = word.removeprefix(prefix)
    return word
