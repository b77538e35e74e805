"""2:4 weights for tests, and what a packed layer has to give, from its definition in float64."""

import pytest
import torch
from torch import Tensor

from sparsepass.graph.native import PATHS, VARIABLE, available_paths
from sparsepass.graph.packed import PackedWeight, Values, pack, unpack
from sparsepass.graph.packed.laid_out import Form, most_tokens

KINDS: tuple[Values, ...] = ("bf16", "fp16", "int8", "int4")
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def sparse_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random, with the two largest of each four; some groups have fewer."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator)
    groups_OG4 = weight_OI.view(rows, columns // 4, 4)
    kept = groups_OG4.abs().topk(2, dim=-1).indices
    mask = torch.zeros_like(groups_OG4, dtype=torch.bool).scatter_(-1, kept, True)
    mask &= torch.rand(groups_OG4.shape, generator=generator) > 0.05
    return (groups_OG4 * mask).view(rows, columns)


def packed_weight(rows: int, columns: int, values: Values, group_size: int = 0, seed: int = 0) -> PackedWeight:
    return pack(sparse_weight(rows, columns, seed), values=values, group_size=group_size)


def force(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layers laid out for a path; skip where the processor lacks it."""
    assert path in PATHS
    if path != "torch" and path not in available_paths(kind):
        pytest.skip(f"no kernel {path} for {kind} here: the processor lacks it, or no library was compiled")
    monkeypatch.setenv(VARIABLE, path)


def rounded(x: Tensor, values: str) -> Tensor:
    """The activations as a kernel has them (`interface.h`), in float64."""
    if values == "bf16":
        return x.to(torch.bfloat16).double()
    if values == "fp16":
        return x.to(torch.float16).double()
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(-1, keepdim=True)
    steps = (padded * (127 / largest.where(largest > 0, 1.0))).round()
    known: Tensor = (steps.double() * (largest / 127).double()).flatten(-2)
    return known[..., : x.shape[-1]]


def expected(packed: PackedWeight, x: Tensor, path: str) -> Tensor:
    """What the product has to be, in float64."""
    form = Form(values=packed.values, path=path, rows=packed.shape[0], columns=packed.shape[1])
    # torch multiplies x as it is, and the weight in x's type.
    if path == "torch" or x.numel() // x.shape[-1] > most_tokens(form):
        return x.double() @ unpack(packed, x.dtype).double().T
    most_as_bytes = {"avx512": 64, "amx": 12}
    if packed.values in ("int8", "int4") and x.numel() // x.shape[-1] > most_as_bytes.get(path, x.numel()):
        return rounded(x, "bf16") @ unpack(packed, torch.bfloat16).double().T
    return rounded(x, packed.values) @ unpack(packed, torch.float32).double().T


def tolerance(dtype: torch.dtype) -> float:
    """Of a result of a type, relative to the largest: half a step of the type, and the sums in float32."""
    return {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 1e-5}[dtype]
