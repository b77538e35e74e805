"""torch's 2:4 kernels: what they take, and packing weights for them without losing a bit.

1. Types, shapes and GPUs: torch's own tables are read, none is copied.
2. Kernels read the kept half of the weights and two bits of position for each. torch's functions for CUTLASS's layout run on
   any device, so the proof that what was packed comes back needs no GPU. On a GPU, the kernel's own tensor is asked too.

Tensor shape legend: O out features, I in features, K = I / 2 kept.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsepass.export.targets.evidence import LOWEST_SM, check_two_four
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError
from sparsepass.passes.maths import NMPattern, canonical_zeros, num_violations

BACKENDS: Final[Mapping[str, Any]] = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}
"""Name -> torch's class of tensors that its kernels multiply."""

DTYPES: Final = (torch.bfloat16, torch.float16)
"""Types that both backends multiply in 2:4. For float32 the tensor cores' pattern is 1:2, which 2:4 does not imply."""

_OTHERWISE: Final = "the folder's weights run dense on any machine by transformers' from_pretrained"
_ROWS, _COLUMNS = 32, 64  # what CUTLASS's layout is made of, for types of 16 bits
_ROWS_AT_ONCE: Final = 1024
_COLUMNS_AT_ONCE: Final = 1024
TWO_FOUR: Final = NMPattern(2, 4)


@final
@dataclass(frozen=True, kw_only=True)
class MeasuredOn:
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
    check_two_four(program, "torch", "use the target hf")
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


def check_device(device: torch.device) -> MeasuredOn:
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
        MeasuredOn(name=torch.cuda.get_device_name(device), sm=10 * major + minor, torch=str(torch.__version__))
    )


def check_generation(device: MeasuredOn) -> MeasuredOn:
    """Refuse GPUs without sparse tensor cores, by name.

    Raises:
        SparsepassError: If it is older than Ampere.

    Example:
        >>> check_generation(MeasuredOn(name="Tesla T4", sm=75, torch="2.13.0"))
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


def packed(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight in CUTLASS's layout, on any device. Shapes that the layout does not know are filled up with zeros.

    Shapes: weight [O, I]; gives values [O', K'] and positions [O', K' / 8], with O' and 2 K' the next multiples of 32 and 64.

    Args:
        weight_OI: A weight of 16 bits that keeps to 2:4. What breaks it would be lost.

    Example:
        >>> values, positions = packed(torch.tensor([[0, 1, 2, 0]], dtype=torch.bfloat16))
        >>> values.shape, values[0, :2].tolist()
        (torch.Size([32, 32]), [1.0, 2.0])
    """
    rows, columns = weight_OI.shape
    filled = torch.nn.functional.pad(canonical_zeros(weight_OI), (0, -columns % _COLUMNS, 0, -rows % _ROWS))
    values, positions = sparse_semi_structured_from_dense_cutlass(filled)
    return values, positions


def unpacked(values: Tensor, positions: Tensor, shape_OI: tuple[int, ...]) -> Tensor:
    """Undo `packed`.

    Example:
        >>> unpacked(*packed(torch.tensor([[0, 1, 2, 0]], dtype=torch.bfloat16)), (1, 4))
        tensor([[0., 1., 2., 0.]], dtype=torch.bfloat16)
    """
    whole: Tensor = sparse_semi_structured_to_dense_cutlass(values, positions)
    return whole[: shape_OI[0], : shape_OI[1]]


def check_packing(name: str, weight_OI: Tensor) -> None:
    """Pack a weight and compare what comes back, bit for bit.

    Args:
        name: Of the weight, for the error.
        weight_OI: The folded weight.

    Raises:
        SparsepassError: If the weight is not 2:4, or something else comes back.

    Exactness: bitwise, -0.0 taken for +0.0.
    """
    check_weight(name, weight_OI)
    for rows_OI in weight_OI.split(_ROWS_AT_ONCE):
        _check_equal(name, rows_OI, unpacked(*packed(rows_OI), tuple(rows_OI.shape)), "torch's packed form")


def check_weight(name: str, weight_OI: Tensor) -> None:
    """Refuse a weight that 2:4 kernels would change.

    Raises:
        SparsepassError: If it breaks the pattern, or holds NaN or infinity.
    """
    broken = num_violations(weight_OI, TWO_FOUR)
    if broken:
        raise SparsepassError(
            f"{name} is not 2:4 along its input features ({broken} of {weight_OI.numel() // 4} groups hold more than two "
            "nonzeros): it was changed after the export, by training without masks or by a merged LoRA; export the model again"
        )
    if not bool(torch.isfinite(weight_OI).all()):
        raise SparsepassError(f"{name} holds NaN or infinity; check the weights")


def semi_structured(name: str, weight_OI: Tensor, backend: str) -> Tensor:
    """Make the tensor that a backend's kernels multiply, and prove that it holds the weight.

    Args:
        name: Of the weight, for errors.
        weight_OI: The folded weight, on a GPU.
        backend: A name from `BACKENDS`.

    Returns:
        A `torch.sparse.SparseSemiStructuredTensor`.

    Raises:
        SparsepassError: If the weight is not 2:4, or something else comes back out of the tensor.

    Exactness: bitwise, -0.0 taken for +0.0.
    """
    check_weight(name, weight_OI)
    lowered = convert(weight_OI, backend)
    _check_equal(name, weight_OI, dense_of(lowered), f"{backend}'s tensor")
    return lowered


def convert(weight_OI: Tensor, backend: str) -> Tensor:
    """Make the tensor that a backend's kernels multiply, without a check."""
    kind: Any = BACKENDS[backend]
    with warnings.catch_warnings():
        # torch says once that the interface is a prototype.
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        lowered: Tensor = kind.from_dense(canonical_zeros(weight_OI.detach()).contiguous())
    return lowered


@torch.no_grad()
def dense_of(lowered: Tensor) -> Tensor:
    """Read a semi-structured tensor through its kernel: its product with the identity, which is exact.

    Each entry of the product is one weight times one, plus zeros.
    """
    columns = lowered.shape[1]
    parts = []
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        width = min(_COLUMNS_AT_ONCE, columns - start)
        part = torch.zeros(columns, width, dtype=lowered.dtype, device=lowered.device)
        part[start : start + width].fill_diagonal_(1)
        parts.append(torch.mm(lowered, part))
    return torch.cat(parts, dim=1)


def _check_equal(name: str, weight_OI: Tensor, back_OI: Tensor, what: str) -> None:
    expected, got = (canonical_zeros(t.detach()).contiguous().view(torch.int16) for t in (weight_OI, back_OI))
    if not torch.equal(expected, got):
        differing = int((expected != got).sum())
        raise SparsepassError(
            f"{name}: {differing} of {weight_OI.numel()} weights do not come back out of {what}; this is a defect of torch "
            f"{torch.__version__} or of its libraries on this machine: leave the layer dense, and report it"
        )
