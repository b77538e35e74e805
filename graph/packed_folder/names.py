"""Names of layers in the files of a model, and in the model itself: transformers renames some on their way to the disk."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D, a linear layer that stores its weight [in, out].

    Example:
        >>> from transformers.pytorch_utils import Conv1D
        >>> is_conv1d(Conv1D(4, 8)), is_conv1d(nn.Linear(8, 4))
        (True, False)
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a packed one can stand for: nn.Linear itself (a subclass may do more), and GPT-2's Conv1D.

    Example:
        >>> list(linear_layers(nn.Sequential(nn.Linear(8, 4), nn.ReLU())))
        ['0']
    """
    return {path: module for path, module in model.named_modules() if path and (type(module) is nn.Linear or is_conv1d(module))}


def stored_names(model: "PreTrainedModel", layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Module path -> name in the files, of the layers that transformers stores as they are (under another name, maybe).

    Args:
        model: A model of transformers; its values are not read.
        layers: Module path -> module with a ``weight``.

    Returns:
        The layers whose weight is neither split, fused nor transposed on its way to the disk, and whose other tensors would be
        stored beside it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # A tensor that comes out as the very one that went in was renamed at most.
    sent = {f"{path}.weight": module.weight for path, module in layers.items()}
    sent |= {f"{path}.codes": torch.empty(0, device="meta") for path in layers}
    back = revert_weight_conversion(model, dict(sent))  # type: ignore[arg-type]
    names = {id(tensor): name for name, tensor in back.items()}
    found: dict[str, str] = {}
    for path in layers:
        weight, codes = (names.get(id(sent[f"{path}.{part}"]), "") for part in ("weight", "codes"))
        name = weight.removesuffix(".weight")
        if weight == f"{name}.weight" and codes == f"{name}.codes":
            found[path] = name
    return found


def find_layer(model: "PreTrainedModel", names: Mapping[str, str], wanted: str) -> str | None:
    """Module path of a layer that is named as in the files; None if the model has none.

    A checkpoint of a model with a head is loaded into one without too, and the other way round: then the names of one have the
    base model's prefix, and those of the other do not.

    Args:
        model: The model.
        names: Name in the files -> module path.
        wanted: Name in the files.
    """
    prefix = f"{model.base_model_prefix}."
    for name in (wanted, wanted.removeprefix(prefix), prefix + wanted):
        if name in names:
            return names[name]
    return None
