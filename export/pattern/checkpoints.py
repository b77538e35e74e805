"""Finding the matmul weights of safetensors checkpoints by the conventions of Hugging Face.

A checkpoint holds names and shapes, and no operations. Which tensors are matmul weights, and along which axis each is
reduced, is convention:

1. A matrix named `weight` is `[out, in]`: axis 1. In the families that use GPT-2's Conv1D (told by `config.json`) the
   matrices of its modules are `[in, out]`: axis 0.
2. Experts, rank 3 and named `*_proj`, `*_linear.weight` or below `experts`, are `[expert, out, in]`: the last axis, but the
   second where they are stored transposed. The shapes of `gate_up_proj` and `down_proj` beside it tell, or else the family. So
   are other stacks of matrices in families that are known for them.
3. Another tensor of rank 3 to 5 named `weight` is a convolution `[out, in / group, ...]`: axis 1. Of rank 3, only if its name
   says so or its last axis is as short as a kernel's; else it may be a stack of matrices, and is not checkable.
4. Embeddings, small matrices of other names, vectors and masks are listed and not judged, or are no weights.
5. ``weight_packed`` of compressed-tensors, with its scales and its shape beside it, is read as integers less their zero points.
   Whatever else is large (as most weights are), or of a type that holds no plain weights (packed, compressed, of a format that
   is not known), is not checkable, and then the pattern is not proven.
6. `axes` overrides all of that by name.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch

from sparsepass.export.pattern.bits import BitView, view_bits
from sparsepass.export.pattern.candidates import Candidate, NamePatterns
from sparsepass.export.pattern.integers import PACKED, packed_integers
from sparsepass.graph.support import (
    INFINITIES,
    SparsepassError,
    check_tensors,
    native_path,
    read_by,
    read_object,
    weights_entry,
    weights_files,
)

_CONV1D_FAMILIES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_CONV1D_MODULES = re.compile(r"(c_attn|c_proj|c_fc|q_attn)$")
_TRANSPOSED_EXPERT_FAMILIES = {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"}
_EMBEDDING = re.compile(r"(^|\.)([^.]*emb[^.]*|wte|wpe|shared|tokens_embed|positions_embed|relative_attention_bias)$")
# Stacks of matrices that are no experts: family -> the axis of K.
_STACKED_FAMILIES = {"moshi": 2, "moshi_depth": 2, "csm": 1, "csm_depth_decoder_model": 1}
_EXPERTS = re.compile(r"(_proj|_linear\.weight)$|(^|[._])experts?[._]|\.moe\.")
_CONVOLUTION = re.compile(r"conv|(^|\.)(ups|resblocks|downsample|upsample)\.")
_LONGEST_KERNEL = 11
_PACKED = (".qweight", ".weight_packed", ".compressed", "_blocks", ".bitmask")
_BUFFER = re.compile(
    r"(ids|index|indices|coords|mask|masked_bias|\.bias|anchors|num_batches_tracked|running_\w+|inv_freq|freqs?|cis|window|basis|"
    r"mel_filters|grid)(_\w+)?$"
)
_PARAMETER = re.compile(
    r"emb|pos|token|quer|latent|bias|mask|table|norm|scale|gamma|anchor|prototype|codebook|inv_freq|cluster|lora_|slorb|A_log|"
    r"conv|original[01]$|weight_[gv]$|probe|memory"
)
_ZERO_POINTS = ("zero_point", "zero_points", "zeros", "qzeros", "weight_zero_point", "zero")
_SMALL, _LARGE, _LARGE_VECTOR = 1 << 10, 1 << 16, 1 << 20
_QUANTIZER_DATA = ("zero_point", "scale", "scale_inv", "scales", "qzeros", ".zeros", "g_idx", "absmax", "weight_shape")
# Element types of the format that a weight can have: whether they have a sign bit (and so a -0.0).
_HAS_SIGN = {"F64": True, "F32": True, "F16": True, "BF16": True, "F8_E4M3": True, "F8_E5M2": True, "I8": False}
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def safetensors_files(folder: Path) -> list[Path]:
    """List the safetensors files of a folder: those that transformers reads, else those that another index names, else all.

    Args:
        folder: The folder.

    Returns:
        The files, sorted; empty when there are none.

    Raises:
        SparsepassError: An index cannot be read, or names a file that is not there; or what would be read is a pickle.
    """
    if (entry := weights_entry(folder)) is not None:
        return sorted(weights_files(entry))
    # Variants and other libraries: model.safetensors.index.fp16.json, diffusion_pytorch_model.safetensors.index.json.
    if indices := sorted(folder.glob("*.safetensors.index*.json")):
        return sorted({file for index in indices for file in weights_files(index)})
    found = sorted(folder.glob("*.safetensors"))
    pickled = [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).is_file()]
    if found and pickled:
        raise SparsepassError(
            f"{folder} holds {found[0].name}, and transformers loads {pickled[0]} beside it: which is to be checked? Name "
            "the .safetensors file, or save the model with save_pretrained."
        )
    return found


def safetensors_candidates(paths: Sequence[Path], axes: Mapping[str, int]) -> Iterator[Candidate]:
    """Find the weights of a checkpoint.

    Args:
        paths: Its files, all in one folder; a `config.json` beside them tells the family.
        axes: The axis of K by name of weight, over the conventions above.

    Yields:
        One candidate for each tensor of rank 2 or more that can be a weight.

    Raises:
        SparsepassError: A file cannot be read, lacks weights that the index puts into it, or `axes` gives an axis that a
            weight lacks.
    """
    found: list[_StoredTensor] = []
    index = weights_entry(paths[0].parent) if len(paths) > 1 else None
    promised = {} if index is None else weights_files(index)
    for path in paths:
        handle = _open(path)
        held = set(handle.keys())
        absent = [name for name in promised.get(path, ()) if name not in held]
        if absent and index is not None:
            raise SparsepassError(
                f"{path} is incomplete or of another version: {index.name} puts {len(absent)} weights into it that it does not "
                f"hold, such as {absent[0]!r}. Copy the folder again."
            )
        for name in sorted(held):
            piece = handle.get_slice(name)
            found.append(
                _StoredTensor(
                    file=path.name,
                    name=name,
                    shape=tuple(piece.get_shape()),
                    dtype=str(piece.get_dtype()),
                    key=(path, name),
                    tensor=partial(_read, path, handle, name),
                )
            )
    yield from _candidates(found, _families(paths[0].parent), axes)


def tensor_candidates(
    tensors: Mapping[str, torch.Tensor], axes: Mapping[str, int], config: Mapping[str, Any] | None = None
) -> Iterator[Candidate]:
    """Find the weights among tensors in memory, such as a state dict, by the same conventions.

    Args:
        tensors: Tensors by name.
        axes: The axis of K by name of weight, over the conventions.
        config: The configuration of the model that they are of, where it is known.

    Yields:
        One candidate for each tensor of rank 2 or more that can be a weight.

    Raises:
        SparsepassError: `axes` gives an axis that a weight lacks.

    >>> [c.axis for c in tensor_candidates({"proj.weight": torch.ones(2, 4), "proj.bias": torch.ones(2)}, {})]
    [1]
    """
    found = [
        _StoredTensor(
            file="",
            name=name,
            shape=tuple(tensor.shape),
            dtype=_DTYPES.get(tensor.dtype, str(tensor.dtype)),
            key=(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype),
            tensor=partial(_plain, tensor),
        )
        for name, tensor in tensors.items()
    ]
    yield from _candidates(found, _named_families(config or {}), axes)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


@dataclass(frozen=True, kw_only=True)
class _StoredTensor:
    """A tensor that has not been read yet."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    key: object
    tensor: Callable[[], torch.Tensor]


def _candidates(stored: Sequence[_StoredTensor], families: set[str], axes: Mapping[str, int]) -> Iterator[Candidate]:
    stored = _unpacked(stored)
    all_names = {each.name for each in stored}
    by_shape = _axes_by_shape({each.name: each.shape for each in stored})
    # Nothing is small that is as large as most weights of the file.
    sizes = sorted(math.prod(each.shape) for each in stored if len(each.shape) == 2 and each.name.endswith(".weight"))
    large = min(_LARGE, max(sizes[len(sizes) // 2], _SMALL)) if sizes else _SMALL
    patterns = NamePatterns(axes)
    for each in stored:
        candidate = _candidate(each, all_names, families, axes, patterns, by_shape.get(each.name), large)
        if candidate is not None:
            yield candidate


def _unpacked(stored: Sequence[_StoredTensor]) -> list[_StoredTensor]:
    """The tensors, weights in the place of the words that they are stored in."""
    tensors = {each.name: each.tensor for each in stored}
    words = [each for each in stored if each.name.endswith(PACKED) and each.dtype == "I32"]
    found = {each.name: packed for each in words if (packed := packed_integers(each.name, each.shape, tensors)) is not None}
    parts = {part for packed in found.values() for part in packed.parts}
    kept = [each for each in stored if each.name not in parts]
    for each in words:
        if (packed := found.get(each.name)) is not None:
            kept.append(replace(each, name=f"{packed.layer}.weight", shape=packed.shape, dtype="I8", tensor=packed.read))
    return kept


def _axes_by_shape(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The axis of K of stacked experts whose two matrices fit together in one way: gate and up in one, and down.

    ``[E, 2 I, H]`` with ``[E, H, I]`` reduce their last axis, ``[E, H, 2 I]`` with ``[E, I, H]`` the one before.
    """
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        beside = name.replace("gate_up_proj", "down_proj")
        if beside != name and len(shape) == 3 and len(down := shapes.get(beside, ())) == 3:
            if shape[1:] == (2 * down[2], down[1]):
                found |= {name: 2, beside: 2}
            elif shape[1:] == (down[2], 2 * down[1]):
                found |= {name: 1, beside: 1}
    return found


def _candidate(
    stored: _StoredTensor,
    all_names: Collection[str],
    families: set[str],
    axes: Mapping[str, int],
    patterns: NamePatterns,
    by_shape: int | None,
    large: int,
) -> Candidate | None:
    """Judge one tensor by its name, shape and type; None for what cannot be a weight."""
    name, shape, dtype = stored.name, stored.shape, stored.dtype
    module, _, last = name.rpartition(".")
    given = next((axes[pattern] for pattern in patterns.matching((name, name.removesuffix(".weight")))), None)
    problem = aside = None
    if name.endswith(_QUANTIZER_DATA):
        return None
    if name.endswith(_PACKED):
        problem = "packed or compressed; check the model before that, or its ONNX export"
    elif dtype not in _HAS_SIGN:
        if last != "weight" and _is_buffer(name, shape, dtype):
            return None
        problem = f"stored as {dtype}, which holds no plain weights"
    elif len(shape) < 2:
        if math.prod(shape) < _LARGE_VECTOR:
            return None
        problem = "one long vector, perhaps of several weights; save the model with save_pretrained"
    elif _has_zero_points(name, all_names):
        problem = "quantized with zero points, which are not read from checkpoints; check its ONNX export"
    axis = None if problem else by_shape or _axis(name, shape, families)
    if axis is None and given is None and not problem:
        problem = "a convolution or a stack of matrices, which its name does not tell; give its axis to have it judged"
    if given is not None and not problem:
        if not -len(shape) <= given < len(shape):
            raise SparsepassError(
                f"axes gives axis {given} for {name!r} of shape {list(shape)}: expected {-len(shape)} to {len(shape) - 1}."
            )
        axis = given % len(shape)
    elif not problem and len(shape) == 2 and _EMBEDDING.search(module if last == "weight" else name):
        aside = "an embedding"
    elif not problem and not (last.endswith("weight") or last.endswith("_proj") or ".experts." in name):
        said = "not named as a matmul weight is; give its axis to have it judged"
        is_coded = dtype in ("I8", "F8_E4M3", "F8_E5M2") and math.prod(shape) >= _SMALL
        if is_coded or (math.prod(shape) >= large and min(shape) > 1 and not _PARAMETER.search(name)):
            problem = f"{said}, or leave it out"
        else:
            aside = said
    elif axis is not None and shape[axis] == 1:
        aside = "K = 1: nothing is reduced"
    return Candidate(
        file=stored.file,
        node=module,
        op="tensor",
        weight=name,
        shape=shape,
        dtype=dtype.lower(),
        axis=axis,
        key=stored.key,
        read=None if problem else lambda: _bits(stored.tensor(), dtype),
        problem=problem,
        aside=aside,
    )


def _has_zero_points(name: str, all_names: Collection[str]) -> bool:
    """Whether zeros of a weight are stored as another number: ``weight_zero_point``, or ``zero_point`` of its module."""
    module = name.rpartition(".")[0]
    own = {f"{name}{mark}{word}" for mark in "_." for word in _ZERO_POINTS}
    return any(each in all_names for each in own | {f"{module}.{word}" for word in _ZERO_POINTS})


def _is_buffer(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor of a type without plain weights is none: positions, masks, counters, a little data of a quantizer."""
    if dtype == "BOOL" or _BUFFER.search(name):
        return True
    size = math.prod(shape)
    return size < _LARGE if dtype == "I64" else size < _SMALL if len(shape) < 2 else size <= max(shape)


def _axis(name: str, shape: tuple[int, ...], families: set[str]) -> int | None:
    """The axis of K by convention; None if there is none for such a tensor."""
    module, _, last = name.rpartition(".")
    if len(shape) == 2:
        if "dbrx" in families and name.endswith(".experts.mlp.w2"):
            return 0
        return 0 if families & _CONV1D_FAMILIES and _CONV1D_MODULES.search(module) and last == "weight" else 1
    if len(shape) != 3 or _CONVOLUTION.search(name):
        return 1
    if _EXPERTS.search(name):
        return 1 if families & _TRANSPOSED_EXPERT_FAMILIES else 2
    stacked = next((axis for family, axis in _STACKED_FAMILIES.items() if family in families), None)
    return stacked or (1 if shape[2] <= _LONGEST_KERNEL or not last.endswith("weight") else None)


def _families(folder: Path) -> set[str]:
    """The model types that a config.json beside the weights names, those of its parts included."""
    path = folder / "config.json"
    return _named_families(read_object(path, allowed=INFINITIES)) if path.exists() else set()


def _named_families(config: Mapping[str, Any]) -> set[str]:
    parts = [config, *config.values()]
    return {str(part["model_type"]) for part in parts if isinstance(part, dict) and "model_type" in part}


def _open(path: Path) -> Any:
    check_tensors(path)
    with read_by("safetensors", path, safetensors.SafetensorError, OSError):
        return safetensors.safe_open(native_path(path), framework="pt")


def _read(path: Path, handle: Any, name: str) -> torch.Tensor:
    with read_by("safetensors", path, safetensors.SafetensorError, OSError, RuntimeError):
        tensor: torch.Tensor = handle.get_tensor(name)
    return tensor


def _bits(tensor: torch.Tensor, dtype: str) -> BitView:
    return view_bits(tensor.view(_WORDS[tensor.element_size()]).numpy(), has_sign=_HAS_SIGN[dtype])
