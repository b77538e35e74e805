"""The target `hf`: a checkpoint that plain transformers loads, with the SLoRB branch beside it as a PEFT LoRA adapter.

The folder holds the model with masks folded into its weights, strictly N:M. A branch cannot be folded (the weight would
no longer be N:M), but it has the shape of a LoRA of rank in/k: A is the projection X, B is S, scaling is 1. It goes to
the folder `adapter/` in peft's own format: two small files, written here and not by peft, so that peft is not needed
for it, and they hold no option that an older peft does not know.

Tensor shape legend: O out features, I in features, R rank = I / k.
"""

import contextlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sparsepass.export.pattern import check_pattern
from sparsepass.export.pattern_safetensors import safetensors_files
from sparsepass.graph.difference import difference
from sparsepass.graph.errors import SparsepassError
from sparsepass.graph.model import to_model
from sparsepass.graph.program import Program
from sparsepass.graph.records import SparseState
from sparsepass.passes.pattern import NMPattern, num_violations
from sparsepass.passes.slorb_math import fixed_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ADAPTER_FOLDER", "HfArtifact", "auto_class", "lower_hf", "verify_hf"]

ADAPTER_FOLDER = "adapter"
_MAX_SHARD = "5GB"
_PREFIX = "base_model.model."
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
_PEFT_TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
}
# Largest relative error of the outputs. The model's own attention kernels differ from the captured ones, and a checkpoint
# in a smaller dtype than the program's differs by its rounding. The weights themselves are compared bit by bit.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON; paths are relative to the folder."""
        return {
            "adapter": self.adapter.name if self.adapter else None,
            "model_class": self.model_class,
            "auto_class": self.auto_class,
            "dtype": self.dtype,
            "num_sparse": self.num_sparse,
            "num_branches": self.num_branches,
            "files": dict(self.files),
        }


def lower_hf(
    program: Program,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    base_name: str | None = None,
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
        tokenizer: Saved beside the model.
        processor: Saved beside the model.
        base_name: What the adapter names as its base model, ``base_model_name_or_path``: a hub id, or the folder's path
            as its reader will write it, because peft resolves it against the working directory. Only peft's Auto
            classes, which load both at once, need it; no relative path (such as ``..``) would do for all readers, so
            by default none is named.

    Returns:
        What was written.

    Raises:
        SparsepassError: If the program was not captured from a class of transformers, or has a branch that no LoRA
            layer can stand for.

    Exactness: the weights are the program's, bit by bit (rounded to `dtype` if that is given).

    Source: SLoRB as a LoRA: AST, arXiv 2407.20584, eqs. 5 and 6.
    """
    if program.origin.model_class is None or program.origin.config is None:
        raise SparsepassError(
            "the target hf writes a checkpoint for a class of transformers, and this program was captured from a plain "
            "nn.Module (or from code outside transformers); use the target onnx, or keep it as a program (program.save)"
        )
    branched = _branched(program)
    with _quiet():
        model: PreTrainedModel = to_model(_without_branches(program))  # type: ignore[assignment]
        _settle_config(model, dtype)
        _save(model, folder)
        for companion in (tokenizer, processor):
            if companion is not None:
                companion.save_pretrained(folder)
    loads_with = auto_class(type(model), model.config)
    adapter = None
    if branched:
        adapter = folder / ADAPTER_FOLDER
        _write_adapter(program, model, adapter, base_name=base_name, task=_PEFT_TASKS.get(loads_with))
    stored = _stored(program, model, folder)
    kept_in = str(model.dtype).removeprefix("torch.")
    (folder / "README.md").write_text(_card(program, loads_with, kept_in), encoding="utf-8")
    return HfArtifact(
        folder=folder,
        adapter=adapter,
        model_class=type(model).__name__,
        auto_class=loads_with,
        dtype=kept_in,
        num_sparse=len(program.sparse),
        num_branches=len(branched),
        expected_sparse=stored.expected_sparse,
        axes=stored.axes,
        files={str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
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


def verify_hf(program: Program, folder: Path, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Load a written checkpoint with plain transformers (and peft), and check what was kept.

    1. Every sparse weight is N:M on the right axis, in the files as they are on disk and in the model as it is loaded.
    2. Every loaded weight is the program's, bit by bit, after rounding to the checkpoint's dtype.
    3. The outputs (through the adapter, if there is one) equal the program's within a tolerance. Without peft, the
       adapter is applied by the definition of LoRA, and the result says so.

    Args:
        program: What was lowered.
        folder: Where it was written.
        inputs: What to run; the program's example inputs if none are given.

    Returns:
        Findings as JSON: ``holds``, ``failures`` (one sentence each), and the figures behind them.
    """
    given = {name: t.to(program.device) for name, t in (inputs or program.example_inputs).items()}
    with _quiet():
        model = _load(folder).to(program.device)
    failures: list[str] = []
    pattern = _check_files(program, model, folder)
    if not pattern["conforms"]:
        failures.append(f"the N:M pattern does not hold in the files: {pattern['summary']}")
    memory = _check_weights(program, model)
    failures.extend(memory.pop("failures"))
    adapter = folder / ADAPTER_FOLDER
    read_by = None
    with torch.no_grad():
        if (adapter / "adapter_config.json").is_file():
            runs, read_by = _with_adapter(model, adapter)
        else:
            runs = model
            if _branched(program):
                failures.append(f"the program has SLoRB branches, and {folder} holds no {ADAPTER_FOLDER}/ for them")
        expected = _flat_outputs(program, program(**given))
        found = difference(expected, _flat_outputs(program, runs(**given)))
    tolerance = max(_TOLERANCES.get(dtype, 1e-5) for dtype in (model.dtype, next(iter(expected.values())).dtype))
    if not found.relative_error <= tolerance:
        failures.append(
            f"the outputs differ from the program's: relative error {found.relative_error:.3g}, allowed {tolerance:g}"
        )
    return {
        "holds": not failures,
        "failures": failures,
        "loaded_by": auto_class(type(model), model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "pattern": pattern,
        "weights": memory,
        "outputs": {**found.to_dict(), "tolerance": tolerance},
        "adapter_read_by": read_by,
        "versions": {name: _version(name) for name in ("torch", "transformers", "safetensors", "peft")},
    }


def _branched(program: Program) -> dict[str, SparseState]:
    return {weight: state for weight, state in program.sparse.items() if state.branch is not None}


def _without_branches(program: Program) -> Program:
    """The same graph and tensors, said to have no branches: `to_model` then gives the plain class."""
    bare = {
        weight: SparseState(pattern=state.pattern, axis=state.axis, mask=state.mask) for weight, state in program.sparse.items()
    }
    return Program(
        program.graph_module,
        output_structure=program.output_structure,
        example_inputs=program.example_inputs,
        dynamic_axes=program.dynamic_axes,
        aliases=program.aliases,
        origin=program.origin,
        sparse=bare,
    )


def _settle_config(model: "PreTrainedModel", dtype: torch.dtype | None) -> None:
    if dtype is not None:
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


def _save(model: "PreTrainedModel", folder: Path) -> None:
    """Save the model. transformers loads some generation settings that it refuses to save: they are kept as they came."""
    settings = model.generation_config if model.can_generate() else None
    as_it_came = None
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            as_it_came = settings.to_json_string()
            model.generation_config = type(settings)()
    model.save_pretrained(folder, max_shard_size=_MAX_SHARD)
    if as_it_came is not None:
        (folder / "generation_config.json").write_text(as_it_came, encoding="utf-8")


def _write_adapter(program: Program, model: nn.Module, folder: Path, *, base_name: str | None, task: str | None) -> None:
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed: set[bool] = set()
    for weight, state in _branched(program).items():
        branch = state.branch
        assert branch is not None
        path = weight.removesuffix(".weight")
        module: Any = modules.get(path)
        kind = type(module).__name__
        if not isinstance(module, nn.Linear) and kind != "Conv1D":
            raise SparsepassError(
                f"{weight} has a SLoRB branch, and its layer is a {kind}: a LoRA adapter stands beside nn.Linear and "
                "GPT-2's Conv1D only; apply slorb with this layer among ignore, or use the target onnx"
            )
        transposed.add(kind == "Conv1D")
        dtype = module.weight.dtype
        s_OR = program.tensor(branch.weight).detach().to(dtype)
        if branch.projection is None:
            x_RI = fixed_projection(s_OR.shape[1] * branch.k, branch.k, dtype=dtype)
        else:
            x_RI = program.tensor(branch.projection).detach().to(dtype)
        ranks[path] = s_OR.shape[1]
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = x_RI.cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = s_OR.cpu().contiguous()
    if len(transposed) > 1:
        raise SparsepassError(
            "some layers with a SLoRB branch are nn.Linear and some GPT-2's Conv1D, which one LoRA adapter cannot hold "
            "(fan_in_fan_out is one setting); apply slorb to one kind by targets=('Linear',) or targets=('Conv1D',)"
        )
    folder.mkdir()
    document = _adapter_config(ranks, modules, base_name=base_name, task=task, fan_in_fan_out=transposed == {True})
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(_ADAPTER_CARD, encoding="utf-8")


def _adapter_config(
    ranks: Mapping[str, int],
    modules: Mapping[str, nn.Module],
    *,
    base_name: str | None,
    task: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The configuration of a LoRA with scaling 1 on exactly these layers."""
    common, _ = Counter(ranks.values()).most_common(1)[0]
    # Patterns are regular expressions that may match a longer path's end; anchored and escaped, each means one layer.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    # A name in a list of targets means every module whose path ends in it.
    ambiguous = [name for name in modules if name not in ranks and any(name.endswith(f".{path}") for path in ranks)]
    targets: list[str] | str = "|".join(map(re.escape, ranks)) if ambiguous else sorted(ranks)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _load(folder: Path) -> Any:
    """What a user would do: the Auto class that goes with the configuration, and nothing else."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    (architecture,) = config.architectures
    name = auto_class(getattr(transformers, architecture), config)
    return getattr(transformers, name).from_pretrained(folder).eval()


@dataclass(frozen=True, kw_only=True)
class _Stored:
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


def _stored(program: Program, model: Any, folder: Path) -> _Stored:
    sizes = _stored_sizes(folder)
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
    return _Stored(
        expected_sparse={name: pattern for name, pattern in patterns.items() if name not in partly},
        axes={name: axis for name, axis in axes.items() if name not in partly},
        fused_with_dense=tuple(partly),
    )


def _check_files(program: Program, model: Any, folder: Path) -> dict[str, Any]:
    stored = _stored(program, model, folder)
    report = check_pattern(folder, expected_sparse=stored.expected_sparse, axes=stored.axes)
    return {
        "conforms": report.conforms,
        "summary": report.summary(),
        "num_checked": sum(entry.required for entry in report.entries),
        "num_negative_zeros": report.num_negative_zeros,
        "fused_with_dense": list(stored.fused_with_dense),
        "failures": [entry.to_dict() for entry in report.failures],
    }


def _stored_sizes(folder: Path) -> dict[str, int]:
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


def _check_weights(program: Program, model: nn.Module) -> dict[str, Any]:
    masks = {weight: state.mask for weight, state in program.sparse.items() if state.mask is not None}
    failures, num_equal, violations = [], 0, 0
    for name, loaded in model.named_parameters():
        own = program.aliases.get(name, name)
        expected = program.tensor(own).detach()
        if own in masks:
            expected = torch.ops.sparsepass.masked_weight(expected, program.tensor(masks[own]))
        if torch.equal(loaded.detach(), expected.to(loaded.dtype)):
            num_equal += 1
        else:
            failures.append(f"the loaded weight {name} is not the program's")
        if own in program.sparse:
            state = program.sparse[own]
            broken = num_violations(loaded.detach(), NMPattern.parse(state.pattern), state.axis)
            violations += broken
            if broken:
                failures.append(f"the loaded weight {name} breaks {state.pattern} in {broken} groups")
    return {"num_equal": num_equal, "num_violations": violations, "failures": failures}


def _with_adapter(model: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    if util.find_spec("peft") is None:
        _hook_adapter(model, folder)
        return model, "the definition of LoRA, because peft is not installed"
    from peft import PeftModel

    with _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 calls what transformers 5.23 has renamed
        return PeftModel.from_pretrained(model, folder).eval(), f"peft {_version('peft')}"


def _hook_adapter(model: nn.Module, folder: Path) -> None:
    """Apply an adapter by definition: ``y += (alpha / r) B A x``."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors", device=str(next(model.parameters()).device))
    document = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for key, a_RI in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        b_OR = tensors[key.replace(".lora_A.", ".lora_B.")]
        anchored = f"^{re.escape(path)}"
        alpha = document["alpha_pattern"].get(anchored, document["lora_alpha"])
        rank = document["rank_pattern"].get(anchored, document["r"])
        model.get_submodule(path).register_forward_hook(_lora_hook(a_RI, b_OR, alpha / rank))


def _lora_hook(a_RI: Tensor, b_OR: Tensor, scaling: float) -> Any:
    def add(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + scaling * nn.functional.linear(nn.functional.linear(args[0], a_RI), b_OR)

    return add


def _flat_outputs(program: Program, outputs: Any) -> dict[str, Tensor]:
    """The outputs that the program has, by flat name, out of a model's."""
    found = {}
    for name in program.output_names:
        value = outputs
        for part in name.split("."):
            if isinstance(value, Tensor):
                break
            value = value[int(part)] if part.isdigit() else value[part]
        found[name] = value
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the bars and reports of transformers: what they tell is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_ADAPTER_CARD = """\
---
library_name: peft
tags:
- sparsepass
- slorb
---

# SLoRB branches as a LoRA adapter

The branches that stand beside the N:M sparse layers of the model in the folder above, in the form of a LoRA adapter: rank
in/k for each layer, A sums (or projects) k input features, B is trained, scaling 1.

Do **not** merge it (`merge_and_unload`, `fuse_lora`): a merged adapter fills the zeros, and the model is no longer sparse.
"""


def _card(program: Program, loads_with: str, dtype: str) -> str:
    report = program.report()
    patterns = Counter(state.pattern for state in program.sparse.values())
    said = ", ".join(f"{number} weights {pattern}" for pattern, number in patterns.items()) or "no sparse weight"
    branched = _branched(program)
    skipped = Counter(report.skipped().values())
    lines = [
        "---",
        "library_name: transformers",
        *([f"pipeline_tag: {_PIPELINES[loads_with]}"] if loads_with in _PIPELINES else []),
        "tags:",
        "- sparsepass",
        "- sparse",
        *(f'- "{pattern}"' for pattern in patterns),
        "---",
        "",
        f"# {(program.origin.model_class or '').removeprefix('transformers.')}, N:M sparse",
        "",
        f"Made by sparsepass. {report.num_sparse} of {len(report.sites)} linear layers are sparse ({said}; N:M along the",
        f"input features of each layer); the zeros are in the weights. Type of the weights: {dtype}.",
        "",
        "Recipe (takes a dense model to this one, with the same calibration data):",
        "",
        "```",
        program.recipe or "(no pass was applied)",
        "```",
        "",
        *(["Layers left dense:", "", *(f"- {number}: {reason}" for reason, number in skipped.most_common()), ""]),
        "## Loading",
        "",
        "```python",
        f"from transformers import {loads_with}",
        "",
        f'model = {loads_with}.from_pretrained("PATH/OF/THIS/FOLDER")',
        "```",
        "",
    ]
    if branched:
        k = sorted({state.branch.k for state in branched.values() if state.branch is not None})
        lines += [
            f"That alone is the model **without** its SLoRB branches ({len(branched)} layers, k = {', '.join(map(str, k))}),",
            "and less accurate than what was measured. With them:",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(model, "PATH/OF/THIS/FOLDER/{ADAPTER_FOLDER}")',
            "```",
            "",
            "**Do not merge the adapter** (`merge_and_unload` and the like): it would fill the zeros, and the weights would",
            "no longer be N:M. Any other LoRA merged into these weights does the same.",
            "",
        ]
    lines += [
        "Fine-tuning without a mask fills the zeros again: mask the weights while training, or train an adapter and keep it",
        "apart.",
        "",
    ]
    return "\n".join(lines)
