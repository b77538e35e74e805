"""What the weights of a checkpoint are, whatever its configuration says: plain, or in a form that a plain class misreads."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsepass._terminal import one_line
from sparsepass.graph.support import SparsepassError, check_tensors

_FLOATS = {"F64", "F32", "F16", "BF16"}
_PACKED = re.compile(r"\.(qweight|weight_packed|compressed|bitmask|W_q|qzeros)$|_blocks$|bitsandbytes__")
_SCALES = ("_scale", "_scale_inv", ".scales", ".absmax", ".SCB")
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "DeepSpeed",
}
_ADAPTED = re.compile(r"\.lora_|\.(ada_lora|ia3|dora|loha|hada|oft|boft|vera|slorb)_|magnitude_vector|\.base_layer\.")


def check_plain(folder: Path, shards: Iterable[str], name: str) -> None:
    """Refuse weights that are quantized or compressed, or that were saved out of a wrapper.

    Args:
        folder: Where they lie.
        shards: Their files.
        name: The model's name.

    Raises:
        SparsepassError: If a plain model class would misread them; the message says what they are.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for shard in shards:
        header = check_tensors(folder / shard)
        found |= {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}
    _check(found, name)


def check_plain_state(tensors: Mapping[str, Tensor], name: str) -> None:
    """Do as `check_plain` for a state dict."""
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def kind(tensor: Tensor) -> str:
        small = "F8" if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else ""
        return kinds.get(tensor.dtype) or small or str(tensor.dtype).removeprefix("torch.").upper()

    _check({key: (kind(tensor), list(tensor.shape)) for key, tensor in tensors.items()}, name)


def _check(found: Mapping[str, tuple[str, list[int]]], name: str) -> None:
    """Look through names, types and shapes for what is not plain."""
    for key, (dtype, shape) in found.items():
        if wrapper := next((part for part in key.split(".")[:-1] if part.startswith("_") and part in _WRAPPERS), None):
            raise _wrapped(name, key, wrapper)
        is_weight = dtype not in _FLOATS and key.endswith((".weight", "_proj"))
        if (is_weight and not dtype.startswith("F8")) or _PACKED.search(key):
            raise SparsepassError(
                f"model {name} is quantized or compressed, although its config.json does not say so: {one_line(key)} is "
                f"{one_line(dtype)} {shape}, and pruning needs the floating-point weights; start from the checkpoint it was "
                "made from"
            )
        if is_weight and (scale := next((key + each for each in _SCALES if key + each in found), _beside(key, found))):
            raise SparsepassError(
                f"model {name} is quantized: {one_line(key)} is {one_line(dtype)}, and {one_line(scale)} beside it says how "
                "large its values really are; start from the checkpoint it was made from"
            )
    if found and all(key.startswith("module.") for key in found):
        raise _wrapped(name, next(iter(found)), "module")


def _beside(key: str, found: Mapping[str, object]) -> str | None:
    """A scale of a weight that is named after its module: ``q_proj.scale``, ``q_proj.weight_scale``."""
    module = key.removesuffix("weight")
    return next((module + each for each in ("scale", "scales", "scale_weight", "scale_inv") if module + each in found), None)


def _wrapped(name: str, key: str, wrapper: str) -> SparsepassError:
    return SparsepassError(
        f"model {name} was saved out of a wrapper: its weights have names such as {key} ({wrapper} is {_WRAPPERS[wrapper]}'s); "
        "save the model that is wrapped, or take that part out of the names"
    )


def check_all_used(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint with tensors that change what a layer of the model computes, and that its class does not read.

    Args:
        model: The model, with its weights.
        info: What `from_pretrained` says of the loading.
        name: The model's name.

    Raises:
        SparsepassError: If there is one: a scale, a bias or an adapter's matrix of a layer that the model has.
    """
    for key in sorted(info["unexpected_keys"]):
        owner = _owner(model, key)
        block = _block(model, key)
        if block and not owner and not _ADAPTED.search(key):
            raise SparsepassError(
                f"model {name} holds {key}, which {type(model).__name__} does not read: a part of the block {block}, so the "
                "model would compute something else; load the checkpoint by the class that wrote it"
            )
        if owner or _ADAPTED.search(key):
            what = "an adapter that is not merged" if _ADAPTED.search(key) else f"a part of the layer {owner}"
            raise SparsepassError(
                f"model {name} holds {key}, which {type(model).__name__} does not read: {what}, so the model would compute "
                "something else; merge it (merge_and_unload of peft), or load the checkpoint by the class that wrote it"
            )


def _block(model: nn.Module, key: str) -> str:
    """The numbered block of the model that a weight belongs to by its name; empty if none, or if it is no weight."""
    parts = key.split(".")
    if parts[-1] != "weight":
        return ""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for end in range(len(parts) - 1, 1, -1):
        if not parts[end - 1].isdigit():
            continue
        path = ".".join(parts[:end])
        for candidate in (path, path.removeprefix(prefix), prefix + path):
            try:
                model.get_submodule(candidate)
            except (AttributeError, IndexError, KeyError):
                continue
            return candidate
    return ""


def _owner(model: nn.Module, key: str) -> str:
    """The layer with weights of its own, and without layers below it, that a tensor belongs to by its name; empty if none."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        for candidate in (path, path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")):
            try:
                module = model.get_submodule(candidate)
            except (AttributeError, IndexError):  # a list of layers that has none
                continue
            is_layer = next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None
            return candidate if is_layer and parts[end] not in dict(module.named_buffers()) else ""
    return ""
