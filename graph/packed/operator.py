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
_OPERATOR = torch.ops.sparsepass.packed_linear.default


def packed_linear(
    x: Tensor,
    data: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    form: Form,
) -> Tensor:
    """Call the operator: what a compiler or an exporter has to see.

    Args:
        x: ``[..., I]``.
        data: As in `LaidOut`.
        codes: As in `LaidOut`.
        scales: As in `LaidOut`.
        branch: As in `LaidOut`.
        bias: As in `LaidOut`.
        form: What the weight is. The kernel of a dense weight is chosen where the operator runs.

    Returns:
        ``[..., O]``.
    """
    return _OPERATOR(x, data, codes, scales, branch, bias, form.to_numbers())  # type: ignore[no-any-return]


def _compute(
    x: Tensor,
    data: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    numbers: list[int],
) -> Tensor:
    form = _form_of(tuple(numbers), data.device.type == "cpu")
    return product(LaidOut(form, data, codes=codes, scales=scales, branch=branch, bias=bias), x)


@cache
def _form_of(numbers: tuple[int, ...], is_cpu: bool) -> Form:
    form = Form.from_numbers(numbers)
    return replace(form, path=best_path(form.values)) if form.dense and is_cpu else form


def _fake(x: Tensor, data: Tensor, codes: object, scales: object, branch: object, bias: object, numbers: list[int]) -> Tensor:
    rows, columns = numbers[2:4]
    if x.dtype not in TYPES or not x.dim() or x.shape[-1] != columns:
        raise refusal(x, columns)
    return x.new_empty((*x.shape[:-1], rows))


def _with_autograd(
    x: Tensor,
    data: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    numbers: list[int],
) -> Tensor:
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    # Where nobody listens, the way by the dispatcher would only cost time.
    if type(x) is Tensor and not needs_gradient and not torch._C._len_torch_dispatch_stack():
        return _compute(x, data, codes, scales, branch, bias, numbers)
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = _OPERATOR(x, data, codes, scales, branch, bias, numbers)
    return without_gradient(x, y) if needs_gradient else y


_LIBRARY.impl("packed_linear", _compute, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear", _with_autograd, "Autograd")
torch.library.register_fake("sparsepass::packed_linear", _fake, lib=_LIBRARY)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, _x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(_ctx: object, *_: Tensor) -> NoReturn:
        refuse_training()


def without_gradient(x: Tensor, y: Tensor) -> Tensor:
    """A result that was computed without a graph: whoever asks for its gradient is told that there is none.

    Args:
        x: What it was computed from.
        y: The result.
    """
    return _WithoutGradient.apply(x, y)  # type: ignore[no-any-return, no-untyped-call]


def is_seen(x: Tensor) -> bool:
    """Whether a layer has to call the operator, since somebody looks on: a compiler, an exporter, a mode of torch."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def refuse_training() -> NoReturn:
    """Say that packed layers are not trained.

    Raises:
        SparsepassError: Always.
    """
    raise SparsepassError(
        "packed layers are for inference, and have no gradients; prune or retrain the program and export it again. Without "
        "training, run the model in evaluation mode, or under torch.no_grad()"
    )
