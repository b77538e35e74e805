"""Quantized weights as compressed-tensors stores them, which stock transformers loads.

1. ``pack-quantized``: a layer has ``weight_packed`` (integers in words), ``weight_scale``, ``weight_shape`` and, if it has zero
   points, ``weight_zero_point``, in the place of ``weight``. ``float-quantized``: ``weight`` is of fp8, with ``weight_scale``.
2. Numbers and scales are the program's own. A dropped weight's number is that of 0.
3. An embedding, a convolution, and an output head of another grid than the layers stay floating-point values on their grid:
   what reads this format looks for linear layers, of one grid with most versions.
4. `config.json` says which layers these are. There is no ``sparsity_config``: that loads nowhere any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from sparsepass.graph.integer_words import to_words
from sparsepass.graph.integers import integers_of
from sparsepass.graph.packed_folder import linear_layers, stored_names
from sparsepass.graph.program import Program
from sparsepass.graph.rounding import Rounded, RoundingGrid
from sparsepass.graph.support import SparsepassError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD: Final = "compressed-tensors"
PARTS: Final = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")
_INSTEAD: Final = "write floating-point values on their grids with hf{form=dense}, or quantize with this layer among ignore"


@final
@dataclass(frozen=True, kw_only=True)
class IntegerLayer:
    """A layer whose integers, or numbers of fp8, are stored.

    Attributes:
        path: Of the module.
        name: Its name in the files.
        grid: As it is stored: one scale a row for a group that is larger than a row, or that fills the widest row.
    """

    path: str
    name: str
    grid: RoundingGrid

    @property
    def weight(self) -> str:
        """Name of its weight in the model."""
        return f"{self.path}.weight"

    @property
    def form(self) -> str:
        """What compressed-tensors calls the way that it is stored in."""
        return "float-quantized" if self.grid.format == "fp8" else "pack-quantized"

    @property
    def numbers(self) -> str:
        """What is stored, in words."""
        return numbers_in_words(self.grid)


def numbers_in_words(grid: RoundingGrid) -> str:
    """What the numbers of a grid are called in a sentence.

    Example:
        >>> numbers_in_words(RoundingGrid()), numbers_in_words(RoundingGrid(bits=8, format="fp8"))
        ('integers', 'numbers of fp8')
    """
    return "integers" if grid.format == "int" else f"numbers of {grid.kind}"


def integer_layers(program: Program, model: "PreTrainedModel") -> tuple[IntegerLayer, ...]:
    """The layers of a program that are stored as integers: linear ones that are quantized, but for some heads.

    Args:
        program: Not changed.
        model: The model that is written; its values are not read.

    Raises:
        SparsepassError: If compressed-tensors has no form for one of them.
    """
    linear = {path: module for path, module in linear_layers(model).items() if type(module) is nn.Linear}
    names = stored_names(model, linear)
    tied = {name for pair in program.aliases.items() for name in pair}
    sites = {site.weight: site for site in program.sites()}
    own = {  # others are SLoRB branches, and what stays floating-point values
        weight: state
        for weight, state in program.quantized.items()
        if weight in sites and sites[weight].role != "embedding" and sites[weight].layout not in ("conv1d", "conv2d")
    }
    grids = {state.grid for weight, state in own.items() if sites[weight].role != "head"}
    widest = max((program.tensor(weight).shape[1] for weight in own), default=0)
    found = []
    for weight, state in own.items():
        if sites[weight].role == "head" and grids and state.grid not in grids:
            continue
        path, shape = weight.removesuffix(".weight"), program.tensor(weight).shape
        reason = ""
        if weight != f"{path}.weight" or path not in linear:
            reason = "it is no nn.Linear, and compressed-tensors packs no other"
        elif path not in names or weight in tied:
            reason = "transformers stores it tied, fused or turned"
        elif 0 < state.group_size < shape[1] and shape[1] % state.group_size:
            reason = f"its {shape[1]} input features are no multiple of group_size {state.group_size}"
        elif (branch := program.sparse.get(weight)) is not None and branch.branch is not None:
            reason = "its SLoRB branch would have to be an adapter beside such numbers"
        if reason:
            raise SparsepassError(f"{path} cannot be stored as {numbers_in_words(state.grid)}: {reason}; {_INSTEAD}")
        size = 0 if state.group_size > shape[1] or state.group_size >= widest else state.group_size
        found.append(IntegerLayer(path=path, name=names[path], grid=replace(state.grid, group_size=size)))
    named = {layer.grid: layer.path for layer in found}
    if len(named) > 1 and (model._keep_in_fp32_modules or not all(grid.symmetric for grid in named)):
        said = "; ".join(f"{path}: {grid.text}" for grid, path in named.items())
        raise SparsepassError(f"this model loads if all layers have one grid, and these have several ({said}); {_INSTEAD}")
    return tuple(found)


def integer_tensors(found: Rounded, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored of a layer: name behind the layer's -> tensor.

    Args:
        found: Numbers, scales and zero points.
        dtype: Of the scales.

    Raises:
        SparsepassError: If it cannot hold a scale.
    """
    scales_OG = found.scales_OG.to(dtype)
    if not torch.equal(scales_OG.float(), found.scales_OG.float()):
        raise SparsepassError(f"a scale of bfloat16 does not fit {dtype}; take dtype=bfloat16 or float32")
    if found.grid.format == "fp8":
        return {"weight": found.numbers_OI.contiguous(), "weight_scale": scales_OG.contiguous()}
    bits = found.grid.bits
    numbers_OI = found.numbers_OI.short() + (2 ** (bits - 1) if found.zeros_OG is None else 0)
    tensors = {
        "weight_packed": to_words(numbers_OI.to(torch.uint8), bits),
        "weight_scale": scales_OG.contiguous(),
        "weight_shape": torch.tensor(numbers_OI.shape),
    }
    if found.zeros_OG is not None:
        tensors["weight_zero_point"] = to_words(found.zeros_OG.to(torch.uint8).T.contiguous(), bits).T.contiguous()
    return tensors


def with_integers(
    program: Program, model: "PreTrainedModel", layers: tuple[IntegerLayer, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a model by name, integers in the place of the weights of some layers."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for layer in layers:
        found = integers_of(program, layer.weight)
        assert found is not None
        del state[layer.weight]
        state |= {f"{layer.path}.{part}": tensor for part, tensor in integer_tensors(found, dtype).items()}
    return state


def quantization_config(model: nn.Module, layers: tuple[IntegerLayer, ...]) -> dict[str, Any]:
    """What config.json says of them.

    Where all are of one grid, they are all linear layers but some, as readers expect; otherwise each is named.
    """
    paths = {layer.path for layer in layers}
    grids: dict[RoundingGrid, list[str]] = {}
    for layer in layers:
        grids.setdefault(layer.grid, []).append(layer.path)
    ignore = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in paths]
    forms = {layer.grid: layer.form for layer in layers}
    whole, *others = set(forms.values())
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(grids) == 1 else named,
            "weights": _scheme(grid),
            **({"format": forms[grid]} if others else {}),
        }
        for number, (grid, named) in enumerate(grids.items())
    }
    # compressed-tensors 0.20 forgets that zero points are in words while a model has no values yet, and then refuses them. And
    # what a model keeps in float32 may be a weight that it reads by itself (T5), which is not there while it is packed.
    reads_weights = bool(getattr(model, "_keep_in_fp32_modules", None))
    as_floats = {"dequantize": True} if reads_weights or not all(grid.symmetric for grid in grids) else {}
    return as_floats | {
        "quant_method": METHOD,
        "format": "mixed-precision" if others else whole,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


def _scheme(grid: RoundingGrid) -> Mapping[str, Any]:
    kind = "float" if grid.format == "fp8" else "int"
    scheme: dict[str, Any] = {"num_bits": grid.bits, "type": kind, "symmetric": grid.symmetric, "dynamic": False}
    if grid.group_size:
        return scheme | {"strategy": "group", "group_size": grid.group_size}
    return scheme | {"strategy": "channel"}
