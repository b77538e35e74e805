"""The target `hf`: a checkpoint that plain transformers loads, with the SLoRB branch beside it as a PEFT LoRA adapter.

The folder holds the model with masks folded into its weights, strictly N:M. A branch cannot be folded (the weight would
no longer be N:M), but it has the shape of a LoRA of rank in/k: A is the projection X, B is S, scaling is 1. It goes to
the folder `adapter/` in peft's own format.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from sparsepass.export.pattern import safetensors_files
from sparsepass.export.targets.hf.adapter import ADAPTER_FOLDER, branched, write_adapter
from sparsepass.export.targets.hf.card import hf_card, told_integers
from sparsepass.export.targets.hf.integers import IntegerLayer, integer_layers, quantization_config, with_integers
from sparsepass.export.targets.older import add_older_keys
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.load import check_fits, parse_dtype
from sparsepass.graph.model import skeleton, to_model
from sparsepass.graph.program import Program
from sparsepass.graph.records import SparseState
from sparsepass.graph.support import SparsepassError, check_tensors, open_tensors, quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_SHARD = "5GB"
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
# peft wraps these in classes of its own; for others its plain wrapper passes every argument through.
PEFT_TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}


@final
@dataclass(frozen=True, kw_only=True)
class HfArtifact:
    """What `lower_hf` wrote.

    Attributes:
        folder: Where the checkpoint is.
        adapter: Folder of the LoRA adapter that holds the SLoRB branches; None if the program has none.
        model_class: Class of the model, such as ``LlamaForCausalLM``.
        auto_class: The Auto class that loads it, such as ``AutoModelForCausalLM``; the model class itself if none does.
        dtype: Type of the weights, such as ``bfloat16``.
        num_sparse: Weights that are N:M.
        num_branches: Layers with a branch in the adapter.
        expected_sparse: Name of each sparse tensor in the files -> its pattern. transformers may store a weight under
            other names than the program's (MoE experts one by one).
        axes: Name of each sparse tensor in the files -> the axis along which the pattern runs there.
        files: Path of each file, relative to the folder -> its size in bytes.
        integers: The layers whose integers, or numbers of fp8, are stored, by compressed-tensors.
        rounded: Quantized weights that are stored as floating-point values on their grids.
    """

    folder: Path
    adapter: Path | None
    model_class: str
    auto_class: str
    dtype: str
    num_sparse: int
    num_branches: int
    expected_sparse: Mapping[str, str]
    axes: Mapping[str, int]
    files: Mapping[str, int]
    integers: tuple[IntegerLayer, ...] = ()
    rounded: tuple[str, ...] = ()

    @property
    def integers_note(self) -> str:
        """What a reader should know of layers that are stored as integers, and of those that are not."""
        grids = ", ".join(sorted({layer.grid.text for layer in self.integers}))
        said = []
        if self.integers:
            forms = ", ".join(sorted({layer.form for layer in self.integers}))
            said.append(
                f"{told_integers(self.integers)} ({grids}; compressed-tensors, {forms}): loading them needs "
                "`pip install compressed-tensors`, and nothing else"
            )
        if self.rounded:
            more = f" and {len(self.rounded) - 3} more" if len(self.rounded) > 3 else ""
            named = ", ".join(self.rounded[:3]) + more
            said.append(f"{named}: floating-point values on the grid, which take the room of floating-point values")
        return "; ".join(said)

    @property
    def adapter_note(self) -> str:
        """What a reader should know of the adapter."""
        assert self.adapter is not None
        return f"the SLoRB branches of {self.num_branches} layers are the PEFT adapter in {self.adapter.name}/"

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON; paths are relative to the folder."""
        return {
            "adapter": self.adapter.name if self.adapter else None,
            "model_class": self.model_class,
            "auto_class": self.auto_class,
            "dtype": self.dtype,
            "num_sparse": self.num_sparse,
            "num_branches": self.num_branches,
            "num_integers": len(self.integers),
            "files": dict(self.files),
        }


def lower_hf(
    program: Program,
    folder: Path,
    *,
    dtype: "torch.dtype | str | None" = None,
    base_name: str | None = None,
    as_integers: bool = True,
) -> HfArtifact:
    """Write a program as a checkpoint that plain transformers loads.

    The folder gets the weights as safetensors (in shards beyond 5 GB), configuration, generation settings, tokenizer or
    processor files, and a model card, README.md. SLoRB branches go to `adapter/`, which
    ``PeftModel.from_pretrained(model, folder / "adapter")`` loads. Names and layouts are those of the model's family
    on disk: transformers writes fused MoE experts one by one.

    Args:
        program: Captured from a transformers model. It is not changed.
        folder: An existing, empty folder.
        dtype: Type of the written weights; None keeps the program's.
        base_name: What the adapter names as its base model, ``base_model_name_or_path``: a hub id, or the folder's path
            as its reader will write it, because peft resolves it against the working directory. Only peft's Auto
            classes, which load both at once, need it; no relative path (such as ``..``) would do for all readers, so
            by default none is named.
        as_integers: Whether weights that are quantized are stored as the numbers of their grids, integers or fp8; else as
            floating-point values.

    Returns:
        What was written.

    Raises:
        SparsepassError: If the program was not captured from a class of transformers, has a branch that no LoRA layer can
            stand for, or quantized weights that have no form as integers.

    Exactness: the weights are the program's, bit by bit (rounded to `dtype` if that is given); integers and scales too.

    Source: SLoRB as a LoRA: AST, arXiv 2407.20584, eqs. 5 and 6.
    """
    if program.origin.model_class is None or program.origin.config is None:
        raise SparsepassError(
            "the target hf writes a checkpoint for a class of transformers, and this program was captured from a plain "
            "nn.Module (or from code outside transformers); use the target onnx, or keep it as a program (program.save)"
        )
    program = split_siblings(program)
    branches = branched(program)
    integers: tuple[IntegerLayer, ...] = ()
    if as_integers and program.quantized:
        integers = integer_layers(program, skeleton(program))  # type: ignore[arg-type]
    with quiet_loading():
        model: PreTrainedModel = to_model(_without_branches(program))  # type: ignore[assignment]
        settle_config(model, None if dtype is None else parse_dtype(dtype))
        state = with_integers(program, model, integers, model.dtype) if integers else None
        if integers:
            model.config.quantization_config = quantization_config(model, integers)
        is_read_by_4 = save_model(model, folder, state)
    loads_with = auto_class(type(model), model.config)
    adapter = None
    if branches:
        adapter = folder / ADAPTER_FOLDER
        write_adapter(program, model, adapter, base_name=base_name, task=PEFT_TASKS.get(loads_with))
    stored = stored_weights(program, model, folder)
    kept_in = str(model.dtype).removeprefix("torch.")
    card = hf_card(program, folder, loads_with, kept_in, integers, is_read_by_4=is_read_by_4)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return HfArtifact(
        folder=folder,
        adapter=adapter,
        model_class=type(model).__name__,
        auto_class=loads_with,
        dtype=kept_in,
        num_sparse=len(program.sparse),
        num_branches=len(branches),
        expected_sparse=stored.expected_sparse,
        axes=stored.axes,
        files={str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
        integers=integers,
        rounded=tuple(name for name in program.quantized if name not in {layer.weight for layer in integers}),
    )


def _without_branches(program: Program) -> Program:
    """The same graph and tensors, said to have no branches: `to_model` then gives the plain class."""
    bare = {
        weight: SparseState(pattern=state.pattern, axis=state.axis, mask=state.mask) for weight, state in program.sparse.items()
    }
    return program.sharing(sparse=bare)


def settle_config(model: "PreTrainedModel", dtype: torch.dtype | None) -> None:
    """Make a model and its configuration those of a plain floating-point one, of a type if one is given."""
    if dtype is not None:
        check_fits(model.state_dict(), dtype)
        model.to(dtype)  # type: ignore[arg-type]
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    for part in parts:
        if part is None:
            continue
        # A model that came from a quantized file (GGUF) is plain floating-point now.
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
        if dtype is not None:
            part.dtype = dtype


def save_model(model: "PreTrainedModel", folder: Path, state: dict[str, Tensor] | None = None) -> bool:
    """Save a model. transformers loads some generation settings that it refuses to save: they are kept as they came.

    Args:
        model: The model.
        folder: Where to.
        state: Its tensors by name; by default those that it has.

    Returns:
        Whether transformers 4 reads the configuration, too; see `add_older_keys`.
    """
    settings = model.generation_config if model.can_generate() else None
    as_it_came = None
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            as_it_came = settings.to_json_string()
            model.generation_config = type(settings)()
    model.save_pretrained(folder, max_shard_size=_MAX_SHARD, state_dict=state)
    if as_it_came is not None:
        (folder / "generation_config.json").write_text(as_it_came, encoding="utf-8")
    return add_older_keys(folder)


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
    """Entries of each stored tensor; of a layer that is stored as integers too, as those of its weight."""
    sizes: dict[str, int] = {}
    for file in safetensors_files(folder):
        sizes |= {name: math.prod(entry["shape"]) for name, entry in check_tensors(file).items()}
        with open_tensors(file, advice="copy the folder again") as opened:
            shapes = [name for name in opened.keys() if name.endswith(".weight_shape")]  # noqa: SIM118 (it is no dict)
            sizes |= {name.removesuffix("_shape"): int(opened.get_tensor(name).prod()) for name in shapes}
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
