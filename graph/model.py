"""From a program back to the model's own class."""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sparsepass.graph.configuration import (
    at_most_modules,
    class_of,
    configuration_of,
    generation_config_of,
    told_as_configuration,
)
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.sites import BETWEEN_BLOCKS
from sparsepass.graph.support import CaptureError, default_dtype, one_at_a_time

# Modules without a tensor of their own: activations, dropout, lists.
_MODULES_OF_TENSOR, _MODULES_BESIDE = 16, 1000


class SLoRBLinear(nn.Module):
    """A linear layer with its SLoRB branch: ``y = x W^T + b + (X x) S^T``. Final.

    It keeps the names of the layer it stands for (``weight``, ``bias``), so state dicts of the model still fit.

    Shapes: x [..., in], weight [out, in] ([in, out] for GPT-2's Conv1D), S [out, in/k], X [in/k, in] or the segment sum.

    Args:
        base: The layer that it replaces.
        branch: S.
        k: Input features summed into one.
        projection: X, if it is trainable.
        transposed: Whether the weight is stored [in, out].

    Source: AST, arXiv 2407.20584, eqs. 5 and 6.
    """

    def __init__(self, base: nn.Module, branch: Tensor, k: int, projection: Tensor | None, *, transposed: bool) -> None:
        super().__init__()
        weight, bias = base.weight, base.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.weight, self.bias = weight, bias
        self.slorb_weight = nn.Parameter(branch)
        self.slorb_projection = nn.Parameter(projection) if projection is not None else None
        self.k, self.transposed = k, transposed

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] -> [..., out]."""
        weight = self.weight.t() if self.transposed else self.weight
        return nn.functional.linear(x, weight, self.bias) + slorb_branch(x, self.slorb_weight, self.k, self.slorb_projection)


def slorb_branch(x: Tensor, branch: Tensor, k: int, projection: Tensor | None) -> Tensor:
    """A SLoRB branch alone: ``(X x) S^T``.

    Shapes: x [..., in], S [out, in/k], X [in/k, in]; gives [..., out].

    Args:
        x: Inputs of the layer.
        branch: S.
        k: Input features summed into one.
        projection: X; None for the segment sum.

    Source: AST, arXiv 2407.20584, eqs. 5 and 6.

    Example:
        >>> slorb_branch(torch.ones(1, 4), torch.ones(2, 2), 2, None)
        tensor([[4., 4.]])
    """
    projected = torch.unflatten(x, -1, (-1, k)).sum(-1) if projection is None else nn.functional.linear(x, projection)
    return nn.functional.linear(projected, branch)


def to_model(program: Program) -> nn.Module:
    """Build the model's own class with the program's folded weights and attached branches.

    Returns:
        A transformers model in evaluation mode with tensors of its own: `generate()`, `save_pretrained()` and evaluation
        harnesses work on it. Weights are strictly N:M; sites with SLoRB are `SLoRBLinear` modules.

    Raises:
        CaptureError: If the program comes from a plain nn.Module or from code outside transformers, whose class cannot be
            built again, or has no place for what a pass has put between blocks.

    Exactness: bitwise the program's outputs without SLoRB; with it, up to the rounding of the last addition. Layers that
    are fused in the program are apart in the model, which moves the outputs by rounding.
    """
    between = [name for name in program.tensors() if name.rpartition(".")[2] == BETWEEN_BLOCKS]
    if between:
        raise CaptureError(
            f"its blocks are joined by {len(between)} rotations ({between[0]}, ...), for which the model's own class has no "
            "place; call the program itself, or rotate with form=model"
        )
    program = split_siblings(program)
    model = skeleton(program)
    state = {}
    for name in model.state_dict():
        try:
            state[name] = masked_weight(program, name).clone()
        except KeyError as error:
            raise CaptureError(
                f"by its configuration the model has a tensor {name}, and the program has none; they do not belong together"
            ) from error
    for name, tensor in model.state_dict().items():
        if tensor.shape != state[name].shape:
            raise CaptureError(
                f"{name} has shape {list(state[name].shape)} in the program, and by its configuration {list(tensor.shape)}; "
                "they do not belong together"
            )
    model.load_state_dict(state, assign=True)
    _share_ties(model, program)
    for name, _ in list(model.named_buffers()):  # rotary frequencies and other state that is never saved
        with contextlib.suppress(KeyError):
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = program.tensor(name).detach().clone()
    for weight, sparse in program.sparse.items():
        if sparse.branch is not None:
            _attach(model, program, weight)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left and not any(t.is_meta for t in program.tensors().values()):
        raise CaptureError(f"{', '.join(left)}: no values are known for these; load the checkpoint again and recapture")
    return model.eval()


@one_at_a_time
def skeleton(program: Program, *, real_buffers: bool = False) -> nn.Module:
    """The model's own class with parameters on the meta device, made from the configuration alone.

    Args:
        program: Where the class and configuration come from.
        real_buffers: Whether buffers are computed instead of being on the meta device too.

    Raises:
        CaptureError: If the class is not known to transformers.
    """
    import accelerate

    origin, config = program.origin, configuration_of(program.origin)
    kind = class_of(origin)
    if kind is None or config is None:
        raise CaptureError(
            "this program was captured from a plain nn.Module (or from code outside transformers), so the class cannot be "
            "built again; use program.hierarchy() for modules, or call the program itself"
        )
    dtype = next((t.dtype for t in program.tensors().values() if t.is_floating_point()), torch.float32)
    empty = accelerate.init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta")
    most = _MODULES_OF_TENSOR * (len(program.tensors()) + len(program.aliases)) + _MODULES_BESIDE
    with warnings.catch_warnings(), default_dtype(dtype), empty, at_most_modules(most), told_as_configuration(origin):
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config)
        if origin.generation_config is not None:
            model.generation_config = generation_config_of(origin)
    return model


def _share_ties(model: nn.Module, program: Program) -> None:
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for alias, name in program.aliases.items():
        if alias in parameters and name in parameters:
            path, _, attribute = alias.rpartition(".")
            model.get_submodule(path).register_parameter(attribute, parameters[name])


def _attach(model: nn.Module, program: Program, weight: str) -> None:
    branch = program.sparse[weight].branch
    assert branch is not None
    path = weight.removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    base = model.get_submodule(path)
    projection = program.tensor(branch.projection).detach().clone() if branch.projection else None
    slorb_weight = masked_weight(program, branch.weight).clone()
    layer = SLoRBLinear(base, slorb_weight, branch.k, projection, transposed=type(base).__name__ == "Conv1D")
    setattr(model.get_submodule(parent), name, layer)
