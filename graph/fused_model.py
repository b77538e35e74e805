"""A model of transformers whose layers are fused as in a program, for graphs that are traced from the model's own class.

The model's code calls q, k and v one by one. Whichever it calls first runs the fused layer, and the others take their parts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.model import SLoRBLinear
from sparsepass.graph.program import Program
from sparsepass.graph.records import FusedPart

_LINEAR = "torch.nn.modules.linear.Linear"


def only_whole_modules(program: Program) -> Program:
    """A program in which only such layers are fused as are an nn.Linear each; the others are apart."""
    others = [w for w, parts in program.fused.items() if any(not p.levels or p.levels[-1][1] != _LINEAR for p in parts)]
    return split_siblings(program, others)


def fuse_layers(model: nn.Module, fused: Mapping[str, Sequence[FusedPart]]) -> None:
    """Put fused layers into a model, under the names that they have in the program.

    Args:
        model: From `to_model`. It is changed, and is for tracing: each layer is to be called once in a forward pass.
        fused: From a program; see `only_whole_modules`.

    Exactness: weights bitwise; outputs equal but for rounding.
    """
    for weight, parts in fused.items():
        layers = [model.get_submodule(part.name) for part in parts]
        whole = _whole(layers)
        parent, _, name = weight.removesuffix(".weight").rpartition(".")
        model.get_submodule(parent).add_module(name, whole)
        together = _Together(whole, [part.rows for part in parts])
        for place, part in enumerate(parts):
            parent, _, name = part.name.rpartition(".")
            setattr(model.get_submodule(parent), name, PartOfFused(together, place))


class PartOfFused(nn.Module):
    """Stands for a layer whose result is a part of a fused one's. Final."""

    def __init__(self, together: "_Together", place: int) -> None:
        super().__init__()
        self._together, self._place = together, place

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] -> [..., out]."""
        return self._together.result(x, self._place)


class _Together:
    """A fused layer and the parts of its last result that wait to be taken. No module: these tensors are no state of one."""

    def __init__(self, whole: nn.Module, rows: list[int]) -> None:
        self.whole, self._rows = whole, rows
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def result(self, x: Tensor, place: int) -> Tensor:
        if self._x is not x or place not in self._waiting:
            self._x, self._waiting = x, dict(enumerate(self.whole(x).split(self._rows, -1)))
        part = self._waiting.pop(place)
        if not self._waiting:
            self._x = None
        return part


def _whole(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer with the rows of all."""

    def rows(name: str) -> nn.Parameter | None:
        old = [getattr(layer, name) for layer in layers]
        return None if old[0] is None else nn.Parameter(torch.cat([tensor.detach() for tensor in old]), False)

    weight = cast(nn.Parameter, rows("weight"))
    whole = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    whole.weight, whole.bias = weight, cast(Any, rows("bias"))
    first = layers[0]
    if not isinstance(first, SLoRBLinear):
        return whole
    branch, projection = cast(nn.Parameter, rows("slorb_weight")), first.slorb_projection
    return SLoRBLinear(whole, branch.data, first.k, projection, transposed=False)
