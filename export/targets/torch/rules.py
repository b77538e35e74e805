"""What torch's semi-structured kernels take: types, patterns, shapes and GPUs. Their own tables are read, none is copied.

Tensor shape legend: O out features, I in features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from sparsepass.export.targets.evidence import LOWEST_SM, check_two_four
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

BACKENDS: Final[Mapping[str, Any]] = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}
"""Name -> torch's class of tensors that its kernels multiply."""

DTYPES: Final = (torch.bfloat16, torch.float16)
"""Types that both backends multiply in 2:4. For float32 the tensor cores' pattern is 1:2, which 2:4 does not imply."""

_OTHERWISE: Final = "the folder's weights run dense on any machine by transformers' from_pretrained"


@final
@dataclass(frozen=True, kw_only=True)
class Device:
    """The GPU and torch that something was measured on.

    Attributes:
        name: Name of the GPU.
        sm: Its compute capability, 80 for SM80.
        torch: Version of torch.
    """

    name: str
    sm: int
    torch: str

    def __str__(self) -> str:
        return f"{self.name} (SM{self.sm}), torch {self.torch}"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def check_patterns(program: Program) -> None:
    """Refuse a program in which nothing is sparse, or something has another pattern than 2:4.

    Raises:
        SparsepassError: If so.
    """
    check_two_four({name: str(state.pattern) for name, state in program.sparse.items()}, "torch", "use the target hf")
    if not program.sparse:
        raise SparsepassError(
            "no weight of this program is sparse, so there is nothing to lower; prune it first, with nm_sparsify{pattern=2:4}"
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse types without 2:4 kernels in torch.

    Raises:
        SparsepassError: If it is none of `DTYPES`.

    Example:
        >>> check_dtype(torch.float32)
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: the weights are float32, and torch has no 2:4 kernels for it: ...
    """
    if dtype not in DTYPES:
        raise SparsepassError(
            f"the weights are {short(dtype)}, and torch has no 2:4 kernels for it: lower them as bfloat16 (or float16), with "
            "--dtype bfloat16 or dtype=torch.bfloat16"
        )


def gpu_is_here() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def check_device(device: torch.device) -> Device:
    """Describe the GPU that layers are lowered for.

    Raises:
        SparsepassError: If it is no CUDA GPU, there is none, or it is older than Ampere.
    """
    if device.type != "cuda":
        raise SparsepassError(
            f"torch's semi-structured kernels run on NVIDIA GPUs from Ampere (SM{LOWEST_SM}) on, and the device given is "
            f"{device}; name a CUDA device ({_OTHERWISE})"
        )
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f", and torch {torch.__version__} is built without CUDA"
        raise SparsepassError(
            f"no CUDA GPU is seen here{built}: torch's semi-structured kernels need one, from Ampere (SM{LOWEST_SM}) on; "
            f"load the folder on a GPU machine ({_OTHERWISE})"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return check_generation(
        Device(name=torch.cuda.get_device_name(device), sm=10 * major + minor, torch=str(torch.__version__))
    )


def check_generation(device: Device) -> Device:
    """Refuse GPUs without sparse tensor cores, by name.

    Raises:
        SparsepassError: If it is older than Ampere.

    Example:
        >>> check_generation(Device(name="Tesla T4", sm=75, torch="2.13.0"))
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: Tesla T4 is SM75 and has no 2:4 kernels: they need Ampere (SM80) or newer; ...
    """
    if device.sm < LOWEST_SM:
        raise SparsepassError(
            f"{device.name} is SM{device.sm} and has no 2:4 kernels: they need Ampere (SM{LOWEST_SM}) or newer; run the model "
            f"dense there ({_OTHERWISE}), or write it for another GPU with --no-measure"
        )
    return device


def refusal(shape_OI: tuple[int, ...], dtype: torch.dtype, backend: str) -> str:
    """Say which rule of a backend keeps a weight from its kernels; empty if none does.

    Args:
        shape_OI: Shape of the weight as the layer multiplies it.
        dtype: Type of the weight.
        backend: A name from `BACKENDS`.

    Source: torch.sparse's own table of shape constraints.

    Example:
        >>> refusal((48, 40), torch.bfloat16, "cusparselt")
        'in_features 40 is not a multiple of 16'
    """
    rules = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS
    if dtype not in rules or dtype not in DTYPES:
        return f"no 2:4 kernels for {short(dtype)}"
    least = (rules[dtype].sparse_min_rows, rules[dtype].sparse_min_cols)
    for what, size, multiple in zip(("out_features", "in_features"), shape_OI, least, strict=True):
        if size % multiple or size < multiple:
            return f"{what} {size} is not a multiple of {multiple}"
    return ""


def refusals(shape_OI: tuple[int, ...], dtype: torch.dtype, backends: Iterable[str] = tuple(BACKENDS)) -> str:
    """Say why none of some backends takes a weight; empty if one does.

    Example:
        >>> refusals((48, 64), torch.bfloat16)
        ''
        >>> refusals((8, 64), torch.bfloat16)
        'shape rule: out_features 8 is not a multiple of 16 (cusparselt); out_features 8 is not a multiple of 32 (cutlass)'
    """
    said = {backend: refusal(shape_OI, dtype, backend) for backend in backends}
    if not all(said.values()):
        return ""
    return "shape rule: " + "; ".join(f"{reason} ({backend})" for backend, reason in said.items())


def short(dtype: torch.dtype) -> str:
    """A type's name, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
