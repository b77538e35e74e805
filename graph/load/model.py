"""Loading what a user names: a folder, a hub id, a GGUF file, a saved program, or a model in memory."""

import copy
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sparsepass.graph.admission import check_has_values, is_dequantized
from sparsepass.graph.load.checkpoint import (
    TASKS,
    check_complete,
    check_not_quantized,
    check_weights,
    choose_attention,
    companions_in,
    model_class_of,
    read_config,
    tokenizer_explained,
)
from sparsepass.graph.load.contents import check_all_used
from sparsepass.graph.load.described import check_described, check_numbers, explained
from sparsepass.graph.load.dtypes import check_fits, check_read, parse_dtype
from sparsepass.graph.load.gguf import check_gguf, split_parts
from sparsepass.graph.load.hub import download, is_hub_id
from sparsepass.graph.packed_folder import is_packed, is_packed_module, num_parameters
from sparsepass.graph.program import Program
from sparsepass.graph.saved import PROGRAM_FILE, TENSORS_FILE
from sparsepass.graph.support import (
    ChecksumWarning,
    SparsepassError,
    as_utf8,
    changed_files,
    check_inside,
    check_tensors,
    closest,
    find_device,
    native_path,
    path_named,
    quiet_loading,
)
from sparsepass.graph.texts import try_tokenizer
from sparsepass.graph.widening import widened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKED_VALUES = 8
"""At most so many weights are held by an element of a packed folder: two 4-bit integers in a byte are those of four."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")

Kind = Literal["folder", "hub", "gguf", "program", "memory"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with what came beside it.

    Args:
        model: The model in eval mode, of its own class; a Program if a saved program was named.
        tokenizer: Its tokenizer, if it has one.
        processor: Its image processor, feature extractor or whole processor, if it has one.
        source: What the user named.
        kind: Where it came from.
        folder: Where its files lie; None for a model in memory.
        provenance: JSON-ready facts for the report: class, dtype, parameters, files, versions, notes.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None" = None
    processor: Any = None
    source: str
    kind: Kind
    folder: Path | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def program(self) -> Program | None:
        """The model, if it is a Program."""
        return self.model if isinstance(self.model, Program) else None


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A model that is to be read from files, and how; see `load_model`."""

    name: str
    dtype: torch.dtype | None
    task: str | None
    gguf_file: str | None
    revision: str | None
    trust_remote_code: bool
    token: str | None


def load_model(
    source: "str | Path | nn.Module",
    *,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str | None" = None,
    task: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> LoadedModel:
    """Load a model and the tokenizer or processor beside it.

    The class is the one the checkpoint's configuration names, or the one transformers has for ``task``. Weights come
    from safetensors (or GGUF) only. Files are checked before anything is built.

    Args:
        source: A Hugging Face folder, a hub id, a .gguf file, a folder with one .gguf file and no config.json, a folder
            written by ``Program.save``, or a model in memory, which is not changed: where another dtype or device is asked
            for, a copy is.
        dtype: Type of the weights; None for the checkpoint's own (float32 for GGUF).
        device: Where to put the model, see `find_device`; None for the CPU (a model in memory stays where it is).
        task: Such as "text-generation"; None for the class in config.json.
        gguf_file: Name of the .gguf file within the folder or hub repository.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        token: Access token for the hub.

    Returns:
        The model in eval mode, its tokenizer or processor, and where it came from.

    Raises:
        SparsepassError: If nothing is there, a file is damaged or missing, the checkpoint is already quantized, is a
            PEFT adapter or only pickled, lacks weights that its class needs, or does not fit the task.

    Example:
        >>> loaded = load_model(nn.Linear(4, 4), dtype="bf16")
        >>> loaded.kind, loaded.model.weight.dtype
        ('memory', torch.bfloat16)
    """
    if task is not None and task not in TASKS:
        near = closest(task, TASKS)
        raise SparsepassError(
            f"task {task!r} is not known{f'; did you mean {near!r}?' if near else ''}; known are {', '.join(TASKS)}"
        )
    wanted = None if dtype is None else parse_dtype(dtype)
    place = None if device is None else find_device(device)
    if isinstance(source, nn.Module):
        loaded = _from_memory(source)
    else:
        asked = _Wanted(
            name=str(source),
            dtype=wanted,
            task=task,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            token=token,
        )
        loaded = _from_name(asked, is_path=isinstance(source, Path))
        _warn_of_changes(loaded)
    model = loaded.model
    if wanted is not None:
        if loaded.kind not in ("memory", "program"):
            check_read(model.state_dict(), wanted, loaded.source)
        if any(p.dtype != wanted for p in model.parameters() if p.dtype.is_floating_point):
            check_fits(model.state_dict(), wanted)
            if isinstance(source, nn.Module):
                model = copy.deepcopy(model)  # the given one is not changed
            model = widened(model, wanted) if isinstance(model, Program) else model.to(dtype=wanted)
    if place is not None:
        tensors = [*model.parameters(), *model.buffers()]
        if model is source and any(tensor.device != place for tensor in tensors):
            model = copy.deepcopy(model)
        model = model.to(device=place)
    origin = {
        "source": _lasting(loaded.source),
        "kind": loaded.kind,
        "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
    }
    return replace(loaded, model=model, provenance=origin | loaded.provenance | _facts(model))  # type: ignore[operator]


def check_model(
    source: str | Path, *, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Make sure that a model is there, without loading it: its files are looked at, and the hub gives a configuration only.

    Args:
        source: See `load_model`.
        gguf_file: See `load_model`.
        revision: See `load_model`.
        trust_remote_code: See `load_model`.

    Raises:
        SparsepassError: If nothing is there, or files are missing or damaged.
    """
    name, folder = str(source), path_named(str(source))
    if folder is None:
        asked = _Wanted(
            name=name,
            dtype=None,
            task=None,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            token=None,
        )
        _check_is_hub_id(name, is_path=isinstance(source, Path))
        _fetch(asked, only=["config.json"])
        return
    if folder.is_file():
        _check_is_gguf(folder, name)
        check_gguf(folder, name)
        return
    check_inside(folder)
    if not (folder / PROGRAM_FILE).is_file() and (gguf_file or _lone_gguf(folder, name)) is None:
        config = read_config(folder, name, trust_remote_code=trust_remote_code)
        check_weights(folder, name, is_packed_already=is_packed(getattr(config, "quantization_config", None)))


def _check_is_gguf(path: Path, name: str) -> None:
    if path.suffix != ".gguf":
        raise SparsepassError(
            f"model {name} is a file; expected a folder, a hub id or a .gguf file. For a single weights file, "
            "name the folder it lies in"
        )


def _check_is_hub_id(name: str, *, is_path: bool) -> None:
    if is_path or not is_hub_id(name):
        raise SparsepassError(
            f"model {name} does not exist; expected a folder, a .gguf file, a saved program, or a hub id such as "
            "'organisation/name'"
        )


def _from_name(wanted: _Wanted, *, is_path: bool) -> LoadedModel:
    name, path = wanted.name, native_path(Path(wanted.name).expanduser())
    kind: Kind = "folder"
    facts: dict[str, object] = {}
    if path.is_file():
        _check_is_gguf(path, name)
        folder, wanted = path.parent, replace(wanted, gguf_file=path.name)
    elif path.is_dir():
        check_inside(path)
        if (path / PROGRAM_FILE).is_file():
            return _from_program(path, name)
        folder = path
    else:
        _check_is_hub_id(name, is_path=is_path)
        folder, kind = _fetch(wanted), "hub"
        check_inside(folder)
        facts = {"revision": wanted.revision, "commit": folder.name}
    gguf_file = wanted.gguf_file or _lone_gguf(folder, name)
    if gguf_file is not None:
        return _from_gguf(folder, gguf_file, wanted, facts)
    return _from_folder(folder, kind, wanted, facts)


def _fetch(wanted: _Wanted, only: list[str] | None = None) -> Path:
    return download(
        wanted.name,
        revision=wanted.revision,
        token=wanted.token,
        gguf_file=wanted.gguf_file,
        trust_remote_code=wanted.trust_remote_code,
        only=only,
    )


def _warn_of_changes(loaded: LoadedModel) -> None:
    """Warn of files that are not as they were written. Those of a program itself are refused where they are read."""
    if loaded.folder is None or loaded.kind == "gguf":
        return
    changes = changed_files(loaded.folder, but=(PROGRAM_FILE, TENSORS_FILE) if loaded.kind == "program" else ())
    # The hub gives a part of a folder, and people add a tokenizer or a licence: `verify` tells of both.
    if changes := tuple(change for change in changes if change.kind == "changed"):
        warnings.warn(
            f"{loaded.source}: {'; '.join(map(str, changes))}; if you know why: `sparsepass verify --renew {loaded.folder}`",
            ChecksumWarning,
            stacklevel=3,
        )


def _from_memory(model: nn.Module) -> LoadedModel:
    name = f"{type(model).__module__}.{type(model).__qualname__} in memory"
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        raise SparsepassError(
            f"model {name} is wrapped by PEFT; merge the adapter first (model.merge_and_unload()), or give its base "
            "model (model.get_base_model())"
        )
    config = getattr(model, "config", None)
    if not is_dequantized(model):
        check_not_quantized(getattr(config, "quantization_config", None), name)
    check_has_values(model)
    return LoadedModel(model=model, source=name, kind="program" if isinstance(model, Program) else "memory")


def _from_program(folder: Path, name: str) -> LoadedModel:
    program = Program.load(folder)
    program.eval()
    tokenizer, processor, notes = companions_in(folder, name, trust_remote_code=False)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return LoadedModel(
        model=program,
        tokenizer=tokenizer,
        processor=processor,
        source=name,
        kind="program",
        folder=folder,
        provenance={"recipe": program.recipe, "files": files, "notes": notes},
    )


def _from_folder(folder: Path, kind: Kind, wanted: _Wanted, facts: Mapping[str, object]) -> LoadedModel:
    name, trust = wanted.name, wanted.trust_remote_code
    config = read_config(folder, name, trust_remote_code=trust)
    packed = is_packed(getattr(config, "quantization_config", None))
    if not packed and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # stored plainly, as `read_config` has found: no quantizer has to read it
    asked = choose_attention(config)
    weights = check_weights(folder, name, is_packed_already=packed)
    model_class = model_class_of(config, wanted.task, name, trust_remote_code=trust)
    headers = [check_tensors(folder / shard) for shard in weights]
    num_stored = sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
    if not trust:  # the class in a folder's own code is known only once it is loaded
        check_described(model_class, config, num_stored * (_PACKED_VALUES if packed else 1), name)
    options: dict[str, Any] = {"dtype": wanted.dtype or "auto", "use_safetensors": True}
    model, notes = _built(model_class, folder, name, trust_remote_code=trust, config=config, **options)
    if asked is not None:
        notes.append(f"the configuration names {asked}; attention is computed by {model.config._attn_implementation} here")
    tokenizer, processor, more_notes = companions_in(folder, name, trust_remote_code=trust)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        source=name,
        kind=kind,
        folder=folder,
        provenance={**facts, "files": weights, "notes": notes + more_notes + _packed_notes(model)},
    )


def _packed_notes(model: nn.Module) -> list[str]:
    if not is_packed(getattr(getattr(model, "config", None), "quantization_config", None)):
        return []
    number = sum(is_packed_module(module) for module in model.modules())
    return [f"{number} layers are packed, for inference; `sparsepass unpack` writes a plain folder"]


def _from_gguf(folder: Path, file: str, wanted: _Wanted, facts: Mapping[str, object]) -> LoadedModel:
    """Load a GGUF file; its weights are dequantized."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    name, path = wanted.name, folder / file
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise SparsepassError(f"model {name} has no GGUF file {file}; the .gguf files there: {there}")
    num_stored = check_gguf(path, name)
    doubt = f"{path}: the file may be truncated, or of an architecture transformers cannot read"
    with quiet_loading(), explained(name, doubt):
        config = AutoConfig.from_pretrained(folder, gguf_file=file, local_files_only=True, trust_remote_code=False)
    check_numbers(config.to_dict(), path)
    model_class = model_class_of(config, wanted.task or "text-generation", name, trust_remote_code=False)
    options: dict[str, Any] = {"gguf_file": file, "dtype": wanted.dtype or torch.float32}
    if (settings := getattr(transformers, "GgufConfig", None)) is not None:  # older versions always unpack the blocks
        options["quantization_config"] = settings(dequantize=True)
    check_described(model_class, config, num_stored, name)
    model, notes = _built(model_class, folder, name, doubt=doubt, config=config, **options)
    with quiet_loading(), tokenizer_explained(name, [file]):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True, trust_remote_code=False)
        try_tokenizer(tokenizer)
    notes.append("weights were dequantized from GGUF: what is called dense here lies on the file's own grid")
    # The weights are plain floating-point now; left in place, these would mark the saved model as quantized.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=name,
        kind="gguf",
        folder=folder,
        provenance={**facts, "gguf_file": file, "files": {file: path.stat().st_size}, "notes": notes},
    )


def _lone_gguf(folder: Path, name: str) -> str | None:
    """The one GGUF file of a folder that holds no other weights; None if there is none."""
    if (folder / "config.json").is_file() and any(path for kind in _WEIGHTS for path in folder.glob(kind)):
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1 and split_parts(found):
        check_gguf(folder / found[0], name)
    if len(found) > 1:
        raise SparsepassError(f"model {name} holds several GGUF files ({', '.join(found)}); choose one with gguf_file")
    return found[0] if found else None


def _built(
    model_class: Any, folder: Path, name: str, *, doubt: str = "", trust_remote_code: bool = False, **options: Any
) -> tuple[Any, list[str]]:
    """A model in eval mode with the weights in a folder, and notes.

    Raises:
        SparsepassError: If a weight that its class needs is missing.
    """
    with quiet_loading(), explained(name, doubt):
        model, info = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
    # The name a user knows, not the place in the hub's cache, goes on into adapters and model cards.
    model.config.name_or_path = model.name_or_path = as_utf8(name)
    check_all_used(model, info, name)
    return model.eval(), check_complete(info, type(model).__name__, name)


def _lasting(source: str) -> str:
    """A source as it is found from any folder: the whole path of what lies here, and a hub id as it is."""
    there = path_named(source)
    return source if there is None else str(there.absolute())


def _facts(model: nn.Module) -> dict[str, object]:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    model_class = model.origin.model_class if isinstance(model, Program) else type(model).__qualname__
    return {
        "class": model_class,
        "dtype": "+".join(dtypes),
        "num_parameters": num_parameters(model),
    }
