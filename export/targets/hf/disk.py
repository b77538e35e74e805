"""What transformers makes of a model on its way to the disk and back: names, axes, and the class that loads it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from torch import Tensor

from sparsepass.export.pattern import safetensors_files
from sparsepass.graph.program import Program

__all__ = ["StoredWeights", "auto_class", "package_version", "stored_weights"]

# The Auto classes a user would think of first; a model that is in none of these may be in another one of transformers'.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModel",
)


def auto_class(kind: type, config: Any) -> str:
    """Name of the Auto class of transformers that loads a checkpoint of a model class; the class itself if none does.

    Args:
        kind: A model class of transformers.
        config: Its configuration.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> auto_class(GPT2LMHeadModel, GPT2Config())
        'AutoModelForCausalLM'
    """
    from transformers.models.auto import modeling_auto

    others = sorted(name for name in vars(modeling_auto) if name.startswith("AutoModelFor"))
    for name in dict.fromkeys((*_AUTO_CLASSES, *others)):
        mapping = getattr(modeling_auto, name)._model_mapping
        try:
            found = mapping[type(config)]
        except KeyError:
            continue
        if kind in (found if isinstance(found, list | tuple) else (found,)):
            return name
    return kind.__name__


@final
@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Where the sparse weights are in the files.

    Attributes:
        expected_sparse: Name in the files -> pattern.
        axes: Name in the files -> axis of the pattern.
        fused_with_dense: Tensors that hold a sparse weight and a dense one: as a whole they are not sparse. Loaded, the
            sparse weight is by itself, and checked.
    """

    expected_sparse: Mapping[str, str]
    axes: Mapping[str, int]
    fused_with_dense: tuple[str, ...]


def stored_weights(program: Program, model: Any, folder: Path) -> StoredWeights:
    """Find a program's sparse weights in a checkpoint that transformers has written.

    Args:
        program: What was lowered.
        model: The model that was saved, or loaded back.
        folder: Where it was saved.
    """
    sizes = _sizes(folder)
    patterns: dict[str, str] = {}
    axes: dict[str, int] = {}
    covered: Counter[str] = Counter()
    for weight, state in program.sparse.items():
        found = _on_disk(program, weight, model, sizes)
        for name, (axis, size) in found.items():
            axes[name] = axis
            covered[name] += size
        # A weight that is nowhere is reported as missing under its own name.
        patterns |= dict.fromkeys(found or (weight,), state.pattern)
    partly = sorted(name for name, size in covered.items() if size < sizes[name])
    return StoredWeights(
        expected_sparse={name: pattern for name, pattern in patterns.items() if name not in partly},
        axes={name: axis for name, axis in axes.items() if name not in partly},
        fused_with_dense=tuple(partly),
    )


def _sizes(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for file in safetensors_files(folder):
        with safetensors.safe_open(file, framework="pt") as handle:
            sizes |= {name: math.prod(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return sizes


def _on_disk(program: Program, weight: str, model: Any, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Where a sparse weight is in the files: name -> (axis along which N:M runs there, number of its entries).

    transformers may rename, split, fuse or transpose a weight on its way to the disk. So the same conversion is applied to
    a marker that varies along the weight's N:M axis only, and where the result varies is the axis.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shape, axis = tuple(program.tensor(weight).shape), program.sparse[weight].axis
    along = [size if i == axis % len(shape) else 1 for i, size in enumerate(shape)]
    marker = (torch.arange(shape[axis]) % 2).to(torch.uint8).view(along).expand(shape)
    for name in (weight, *(alias for alias, canonical in program.aliases.items() if canonical == weight)):
        found = {}
        for stored, part in revert_weight_conversion(model, {name: marker}).items():
            varies = next((i for i in range(part.dim()) if part[_fiber(part, i)].unique().numel() > 1), axis)
            if stored in sizes:
                found[stored] = (varies, part.numel())
        if found:
            return found
    return {}


def _fiber(tensor: Tensor, axis: int) -> tuple[int | slice, ...]:
    return tuple(slice(None) if i == axis else 0 for i in range(tensor.dim()))


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
