"""Packed layers in a model that transformers is loading: put in place before the weights are read, laid out afterwards.

The output head runs on the kernels of packed layers too, dense as it is: it is a large part of what a token reads. So do
normalisations, which are many small operations.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from sparsepass.graph.native import TORCH, best_path
from sparsepass.graph.packed import FLOATS, DenseLinear, Int8Embedding, PackedLinear, fused_norm, group_siblings, stored_form
from sparsepass.graph.packed_folder.names import find_layer, is_conv1d, linear_layers, stored_names
from sparsepass.graph.packed_folder.settings import BranchSettings, PackedSettings
from sparsepass.graph.support import SparsepassError, give_back_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADVICE: Final = "the folder is damaged or incomplete: copy it again, or export the model again"


def is_packed_module(module: nn.Module) -> bool:
    """Whether a module holds tensors in a form of ours: a packed layer, or an embedding or head of bytes.

    Example:
        >>> is_packed_module(nn.Linear(8, 4)), is_packed_module(PackedLinear(8, 4))
        (False, True)
    """
    if isinstance(module, DenseLinear):
        return module.weight.dtype == torch.int8
    return isinstance(module, PackedLinear | Int8Embedding)


def num_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones counted once, and the zeros of packed layers counted too.

    Example:
        >>> num_parameters(nn.Linear(8, 4)), num_parameters(nn.Sequential(PackedLinear(8, 4, bias=True)))
        (36, 36)
    """
    packed = [module for module in model.modules() if is_packed_module(module)]
    layers = [module for module in packed if isinstance(module, PackedLinear)]
    # Scales and codes are no parameters of the model.
    form = {id(module._parameters.get(name)) for module in packed for name in ("codes", "scales")}
    form |= {id(layer.weight) for layer in layers}
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return weights + sum(p.numel() for p in model.parameters() if id(p) not in form)


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
        _replace(model, path, packed)
        installed[name] = path
    if settings.embeddings:
        installed |= _install_embeddings(model, settings)
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


def _install_embeddings(model: "PreTrainedModel", settings: PackedSettings) -> dict[str, str]:
    """Put embeddings and heads of bytes in place, with all that is tied to one of them."""
    tables = {path: m for path, m in model.named_modules() if path and type(m) in (nn.Embedding, nn.Linear)}
    by_name = {name: path for path, name in stored_names(model, tables).items()}
    installed: dict[str, str] = {}
    for name in settings.embeddings:
        path = find_layer(model, by_name, name)
        if path is None:
            continue
        tied = [target for target, source in model.all_tied_weights_keys.items() if source == f"{path}.weight"]
        for each in (path, *(target.removesuffix(".weight") for target in tied)):
            _replace(model, each, _empty_table(tables[each]))
            if each != path:
                # transformers ties the scales as it does the weights.
                model.all_tied_weights_keys[f"{each}.scales"] = f"{path}.scales"
        installed[name] = path
    return installed


def _empty_table(dense: nn.Module) -> nn.Module:
    if isinstance(dense, nn.Embedding):
        rows, columns = dense.weight.shape
        return Int8Embedding(rows, columns, dtype=dense.weight.dtype, device="meta")
    assert isinstance(dense, nn.Linear)
    layer = DenseLinear(dense.in_features, dense.out_features, dtype=torch.int8, device="meta")
    layer.bias = dense.bias
    return layer


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


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
        _check_read(layer, path)
        layer.requires_grad_(False)
        if isinstance(layer, PackedLinear) and layer.codes is not None and layer.codes.device.type == "cpu":
            layer.lay_out(path)
    _own_dense_weights(model)
    for group in settings.groups:
        siblings = [model.get_submodule(installed[name]) for name in group if name in installed]
        if len(siblings) > 1:
            group_siblings(siblings)  # type: ignore[arg-type]
    _run_head_by_kernel(model)
    _fuse_norms(model)
    give_back_freed_memory()


def cast_dense(model: "PreTrainedModel", types: Mapping[str, torch.dtype]) -> None:
    """Give what stays dense the types that a model was made with.

    Args:
        model: With its weights. It is changed.
        types: Name of a parameter -> its type; others stay.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False) if not is_packed_module(module) else ():
            wanted = types.get(name, parameter.dtype)
            in_float32 = parameter.dtype == torch.float32 and any(part in name for part in model._get_dtype_plan(wanted))
            if parameter.is_floating_point() and parameter.dtype != wanted and not in_float32:
                parameter.data = parameter.data.to(wanted)


def _check_read(layer: nn.Module, path: str) -> None:
    """Every tensor was in the files, and is of the type that the files have."""
    for name, parameter in layer.named_parameters(recurse=False):
        # transformers marks what it has read, and fills what is missing with random numbers.
        if parameter.is_meta or not getattr(parameter, "_is_hf_initialized", False):
            raise SparsepassError(f"{path}.{name} is missing in the model's files; {_ADVICE}")
    if isinstance(layer, PackedLinear):
        parts = stored_form(layer.values, layer.out_features, layer.in_features, layer.group_size)
        # Sizes and codes are checked when it is laid out.
        expected: dict[str, tuple[tuple[int, int] | None, torch.dtype]]
        expected = {("weight" if name == "kept" else name): (None, dtype) for name, (_, dtype) in parts.items()}
    else:
        sizes = ("num_embeddings", "embedding_dim") if isinstance(layer, Int8Embedding) else ("out_features", "in_features")
        rows, columns = (int(getattr(layer, size)) for size in sizes)
        expected = {"weight": ((rows, columns), torch.int8), "scales": ((rows, 1), torch.bfloat16)}
    for name, (shape, dtype) in expected.items():
        parameter = getattr(layer, name)
        if parameter.dtype == torch.float32:
            # transformers keeps some modules in float32, and reads packed numbers as such too: they come back as they were.
            parameter.data = parameter.data.to(dtype)
        if parameter.dtype != dtype or (shape is not None and tuple(parameter.shape) != shape):
            size = "" if shape is None else f"{list(shape)} of "
            raise SparsepassError(
                f"{path}.{name} has to be {size}{dtype}, and is {list(parameter.shape)} of {parameter.dtype}; {_ADVICE}"
            )


def _run_head_by_kernel(model: "PreTrainedModel") -> None:
    """Let the output head, if it is a plain linear layer in memory, be multiplied by the kernels. Its weight is not copied."""
    head = model.get_output_embeddings()
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    if type(head) is not nn.Linear or head.weight.device.type != "cpu" or head.weight.dtype not in kinds:
        return
    if best_path(kinds[head.weight.dtype]) == TORCH:
        return
    path = next(path for path, module in model.named_modules() if module is head)
    layer = DenseLinear(head.in_features, head.out_features, dtype=head.weight.dtype, device="meta")
    # The parameters themselves, which may be those of the embedding too.
    layer._parameters |= head._parameters
    _replace(model, path, layer.eval())


def _fuse_norms(model: nn.Module) -> None:
    """Let normalisations be one call each, where there is a compiled library."""
    if best_path("bf16") == TORCH:
        return
    for path, module in list(model.named_modules()):
        if path and (fused := fused_norm(module)) is not None:
            _replace(model, path, fused)


def _own_dense_weights(model: nn.Module) -> None:
    """Copy what stays dense out of the mapped file.

    transformers leaves weights where the file is mapped into memory, and the mapping stays, with all that was read through it,
    as long as one of them does: the packed tensors would count twice.
    """
    laid_out = {id(module.data) for module in model.modules() if isinstance(module, PackedLinear)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and id(tensor) not in laid_out:
            tensor.data = tensor.data.clone()
