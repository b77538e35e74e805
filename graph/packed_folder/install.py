"""Packed layers in a model that transformers is loading: put in place before the weights are read, laid out afterwards."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from sparsepass.graph.packed import PackedLinear, stored_form
from sparsepass.graph.packed_folder.names import find_layer, is_conv1d, linear_layers, stored_names
from sparsepass.graph.packed_folder.settings import BranchSettings, PackedSettings
from sparsepass.graph.support import SparsepassError, give_back_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADVICE: Final = "the folder is damaged or incomplete: copy it again, or export the model again"


def is_packed_module(module: nn.Module) -> bool:
    """Whether a module holds packed tensors.

    Example:
        >>> is_packed_module(nn.Linear(8, 4)), is_packed_module(PackedLinear(8, 4))
        (False, True)
    """
    return isinstance(module, PackedLinear)


def install(model: "PreTrainedModel", settings: PackedSettings) -> dict[str, str]:
    """Put a packed layer without values in the place of each dense one that a folder holds packed.

    Args:
        model: On the meta device. It is changed.
        settings: What the folder's configuration says. Layers that the model lacks (a head, say) are left out.

    Returns:
        Layer as named in the files -> its module path.

    Raises:
        SparsepassError: If a layer cannot be packed as the configuration says.
    """
    linear = linear_layers(model)
    by_name = {name: path for path, name in stored_names(model, linear).items()}
    installed: dict[str, str] = {}
    for name in settings.layers:
        path = find_layer(model, by_name, name)
        if path is None:
            continue
        dense = linear[path]
        branch = settings.branches.get(name)
        try:
            packed = _empty_layer(dense, settings, branch)
        except SparsepassError as error:
            raise SparsepassError(f"{path}: {error}; {_ADVICE}") from error
        if packed.bias is not None:
            # Rounded no further than the rest of the model is.
            bias = torch.empty_like(dense.bias)  # type: ignore[arg-type]
            packed.bias = nn.Parameter(bias, requires_grad=False)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, packed)
        installed[name] = path
    return installed


def _empty_layer(dense: nn.Module, settings: PackedSettings, branch: BranchSettings | None) -> PackedLinear:
    shape = dense.weight.shape
    assert isinstance(shape, torch.Size)
    columns, rows = shape if is_conv1d(dense) else reversed(shape)
    return PackedLinear(
        columns,
        rows,
        values=settings.values,
        group_size=settings.group_size,
        bias=dense.bias is not None,
        slorb_k=0 if branch is None else branch.k,
        slorb_trained=branch is not None and branch.projection == "trained",
        device="meta",
    )


def settle(model: "PreTrainedModel", settings: PackedSettings, installed: Mapping[str, str]) -> None:
    """Check the tensors of the packed layers that were read, and bring them into the form of the processor's kernels.

    Layer by layer, so that only one of them lies in memory twice. On another device they stay as they are stored.

    Args:
        model: With its weights. It is changed.
        settings: What the folder's configuration says.
        installed: What `install` returned.

    Raises:
        SparsepassError: If a tensor is missing or damaged; it is named.
    """
    for path in installed.values():
        layer = model.get_submodule(path)
        assert isinstance(layer, PackedLinear)
        _check_read(layer, path)
        layer.requires_grad_(False)
        if layer.codes is not None and layer.codes.device.type == "cpu":
            layer.lay_out(path)
    _own_dense_weights(model)
    give_back_freed_memory()


def _check_read(layer: PackedLinear, path: str) -> None:
    """Every tensor was in the files, and is of the type that the files have."""
    for name, parameter in layer.named_parameters(recurse=False):
        # transformers marks what it has read, and fills what is missing with random numbers.
        if parameter.is_meta or not getattr(parameter, "_is_hf_initialized", False):
            raise SparsepassError(f"{path}.{name} is missing in the model's files; {_ADVICE}")
    # transformers keeps some modules in float32, and reads packed numbers as such too: these come back as they were.
    parts = stored_form(layer.values, layer.out_features, layer.in_features, layer.group_size)
    for name, (_, dtype) in (parts | {"weight": parts["kept"]}).items():
        parameter = layer._parameters.get(name)
        if parameter is not None and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def _own_dense_weights(model: nn.Module) -> None:
    """Copy what stays dense out of the mapped file.

    transformers leaves weights where the file is mapped into memory, and the mapping stays, with all that was read through it,
    as long as one of them does: the packed tensors would count twice.
    """
    laid_out = {id(module.data) for module in model.modules() if isinstance(module, PackedLinear)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and id(tensor) not in laid_out:
            tensor.data = tensor.data.clone()
