"""The operator ``sparsepass::packed_linear``, by which compilers and exporters see a packed layer.

It is registered by hand: `torch.library.custom_op` takes 12 us for each call (torch 2.13, measured), as much as a small layer.
Run eagerly, a layer calls its kernel itself.
"""

from dataclasses import replace
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from sparsepass.graph.native import best_path
from sparsepass.graph.packed.laid_out import TYPES, Form, LaidOut, product, refusal
from sparsepass.graph.support import SparsepassError

_LIBRARY = torch.library.Library("sparsepass", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor data, Tensor? codes, Tensor? scales, Tensor? branch, Tensor? bias, int[] form) -> Tensor"
)


def _computed(
    x: Tensor,
    data: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    form: list[int],
) -> Tensor:
    what = Form.from_numbers(form)
    if what.dense and data.device.type == "cpu":
        what = replace(what, path=_path_of_dense(what.values))
    return product(LaidOut(what, data, codes=codes, scales=scales, branch=branch, bias=bias), x)


@cache
def _path_of_dense(values: str) -> str:
    """A dense weight lies the same way for all kernels, so that one is chosen where it runs."""
    return best_path(values)


def _refuse(*_: object) -> NoReturn:
    raise SparsepassError(
        "packed layers are for inference, and have no gradients; prune or retrain the program and export it again. Without "
        "training, run the model under torch.no_grad()"
    )


def _keep_nothing(*_: object, **__: object) -> None:
    """A backward pass that refuses needs nothing."""


_LIBRARY.impl("packed_linear", _computed, "CompositeExplicitAutograd")
torch.library.register_autograd("sparsepass::packed_linear", _refuse, setup_context=_keep_nothing, lib=_LIBRARY)


@torch.library.register_fake("sparsepass::packed_linear", lib=_LIBRARY)
def _(x: Tensor, data: Tensor, codes: object, scales: object, branch: object, bias: object, form: list[int]) -> Tensor:
    rows, columns = form[2:4]
    if x.dtype not in TYPES or not x.dim() or x.shape[-1] != columns:
        raise refusal(x, columns)
    return x.new_empty((*x.shape[:-1], rows))


class WithoutGradient(torch.autograd.Function):
    """A result that was computed without a graph: whoever asks for its gradient is told that there is none."""

    @staticmethod
    def forward(_ctx: object, _x: Tensor, y: Tensor) -> Tensor:
        """The result as it is."""
        return y.view_as(y)

    @staticmethod
    def backward(_ctx: object, *_: Tensor) -> NoReturn:
        """Refuse."""
        _refuse()


def refuse_training() -> NoReturn:
    """Say that packed layers are not trained.

    Raises:
        SparsepassError: Always.
    """
    _refuse()
