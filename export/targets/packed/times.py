"""How long a token takes in packed layers and in dense ones, measured where a folder is written.

The folder is for other machines too, and smaller in any case, so a shape that is slower here is packed all the same, and told.

Tensor shape legend: O out features, I in features.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from sparsepass.graph.native import best_path, processor
from sparsepass.graph.packed import PackedLinear, PackedWeight, unpack

_ROTATED_BYTES: Final = 64 << 20
"""Copies of a dense weight together, so that it is read from memory, as in a model."""
_MOST_COPIES: Final = 32
_REPEATS: Final = 21
_SLOWER: Final = 1.05


@final
@dataclass(frozen=True, kw_only=True)
class ShapeTime:
    """Times of one shape, for one token.

    Attributes:
        shape: Out and in features.
        packed_ms: In a packed layer, median.
        dense_ms: In `nn.Linear`, median.
    """

    shape: tuple[int, int]
    packed_ms: float
    dense_ms: float

    @property
    def ratio(self) -> float:
        """Time packed by time dense."""
        return self.packed_ms / self.dense_ms


@final
@dataclass(frozen=True, kw_only=True)
class OneTokenTimes:
    """What was measured.

    Attributes:
        processor: Where.
        path: The kernel.
        num_threads: Threads of both sides.
        shapes: The shapes, each once.
    """

    processor: str
    path: str
    num_threads: int
    shapes: tuple[ShapeTime, ...]

    @property
    def note(self) -> str:
        """One line for people."""
        slower = [each for each in self.shapes if each.ratio > _SLOWER]
        where = f"{self.processor}, kernel {self.path}, {self.num_threads} threads"
        ratios = [each.ratio for each in self.shapes]
        said = f"one token takes {min(ratios):.2f} to {max(ratios):.2f} of the dense layer's time here ({where})"
        if not slower:
            return said
        shapes = ", ".join("x".join(map(str, each.shape)) for each in slower)
        return f"{said}: slower than dense by more than 5% are {shapes}; the folder is smaller all the same"

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON."""
        return {
            "processor": self.processor,
            "path": self.path,
            "num_threads": self.num_threads,
            "shapes": [
                {"shape": list(each.shape), "packed_ms": each.packed_ms, "dense_ms": each.dense_ms} for each in self.shapes
            ],
        }


def one_token_times(weights: Sequence[PackedWeight], dtype: torch.dtype) -> OneTokenTimes:
    """Time one token through a packed and a dense layer of each shape, taking turns.

    Args:
        weights: One of each shape, and at least one; all of one kind.
        dtype: Of activations and of the dense weight.
    """
    return OneTokenTimes(
        processor=processor(),
        path=best_path(weights[0].values),
        num_threads=torch.get_num_threads(),
        shapes=tuple(_time(packed, dtype) for packed in weights),
    )


@torch.no_grad()
def _time(packed: PackedWeight, dtype: torch.dtype) -> ShapeTime:
    weight_OI = unpack(packed).to(dtype)
    copies = max(2, min(_MOST_COPIES, _ROTATED_BYTES // weight_OI.nbytes))
    sides: list[list[nn.Module]] = [
        [PackedLinear.from_packed(packed).lay_out() for _ in range(copies)],
        [_dense(weight_OI.clone()) for _ in range(copies)],
    ]
    x = torch.randn(1, packed.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    took: list[list[float]] = [[], []]
    for i in range(-1, _REPEATS):
        for layers, times in zip(sides, took, strict=True):
            begin = time.perf_counter()
            layers[i % copies](x)
            if i >= 0:
                times.append(time.perf_counter() - begin)
    packed_ms, dense_ms = (1e3 * statistics.median(times) for times in took)
    return ShapeTime(shape=packed.shape, packed_ms=packed_ms, dense_ms=dense_ms)


def _dense(weight_OI: Tensor) -> nn.Module:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer
