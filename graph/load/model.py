"""Loading what a user names: a folder, a hub id, a GGUF file, a saved program, or a model in memory."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sparsepass.graph.load.checks import check_complete, check_not_quantized, check_weights, explained, read_config
from sparsepass.graph.load.classes import TASKS, model_class_of
from sparsepass.graph.load.companions import companions_in
from sparsepass.graph.load.gguf import from_gguf, lone_gguf
from sparsepass.graph.load.hub import download, is_hub_id
from sparsepass.graph.load.loaded import Kind, LoadedModel, origin_of
from sparsepass.graph.program import Program
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import SparsepassError, closest, first_line, quiet_loading

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def parse_dtype(dtype: "torch.dtype | str") -> torch.dtype:
    """Return the floating-point type of that name.

    Args:
        dtype: A torch dtype, or a name such as "bf16", "bfloat16", "fp16", "float32" (with "torch." or without).

    Raises:
        SparsepassError: If it is none of those.

    Example:
        >>> parse_dtype("bf16")
        torch.bfloat16
    """
    found = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype).lower().removeprefix("torch."))
    if found is None or found not in _DTYPES.values():
        raise SparsepassError(f"dtype {dtype} is not understood; expected float32, bfloat16, float16 or float64")
    return found


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
            written by ``Program.save``, or a model in memory.
        dtype: Type of the weights; None for the checkpoint's own (float32 for GGUF).
        device: Where to put the model; None for the CPU (a model in memory stays where it is).
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
    place = None if device is None else _device(device)
    if isinstance(source, nn.Module):
        loaded = _from_memory(source)
    else:
        loaded = _from_name(
            source,
            dtype=wanted,
            task=task,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
            token=token,
        )
    model = loaded.model
    if wanted is not None and any(p.dtype != wanted for p in model.parameters() if p.dtype.is_floating_point):
        model = model.to(dtype=wanted)
    if place is not None:
        model = model.to(device=place)
    return replace(loaded, model=model, provenance=loaded.provenance | _facts(model))  # type: ignore[operator]


def _from_name(
    source: "str | Path",
    *,
    dtype: torch.dtype | None,
    task: str | None,
    gguf_file: str | None,
    revision: str | None,
    trust_remote_code: bool,
    token: str | None,
) -> LoadedModel:
    name = str(source)
    path = Path(name).expanduser()
    kind: Kind
    commit = None
    if path.is_file():
        if path.suffix != ".gguf":
            raise SparsepassError(
                f"model {name} is a file; expected a folder, a hub id or a .gguf file. For a single weights file, "
                "name the folder it lies in"
            )
        folder, gguf_file, kind = path.parent, path.name, "gguf"
    elif path.is_dir():
        if (path / PROGRAM_FILE).is_file():
            return _from_program(path, name)
        folder, kind = path, "folder"
    elif isinstance(source, Path) or not is_hub_id(name):
        raise SparsepassError(
            f"model {name} does not exist; expected a folder, a .gguf file, a saved program, or a hub id such as "
            "'organisation/name'"
        )
    else:
        folder, commit = download(
            name, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code, token=token
        )
        kind = "hub"
    gguf_file = gguf_file or lone_gguf(folder, name)
    facts: dict[str, object] = {"revision": revision, "commit": commit} if kind == "hub" else {}
    if gguf_file is not None:
        return from_gguf(folder, gguf_file, name, dtype=dtype, task=task, facts=facts)
    return _from_folder(folder, name, kind, dtype=dtype, task=task, trust_remote_code=trust_remote_code, facts=facts)


def _from_memory(model: nn.Module) -> LoadedModel:
    name = f"{type(model).__module__}.{type(model).__qualname__} in memory"
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        raise SparsepassError(
            f"model {name} is wrapped by PEFT; merge the adapter first (model.merge_and_unload()), or give its base "
            "model (model.get_base_model())"
        )
    config = getattr(model, "config", None)
    check_not_quantized(getattr(config, "quantization_config", None), name)
    kind: Kind = "program" if isinstance(model, Program) else "memory"
    return LoadedModel(model=model, tokenizer=None, processor=None, source=name, kind=kind, provenance=origin_of(name, kind))


def _from_program(folder: Path, name: str) -> LoadedModel:
    program = Program.load(folder)
    program.eval()
    tokenizer, processor, notes = companions_in(folder, name, trust_remote_code=False)
    return LoadedModel(
        model=program,
        tokenizer=tokenizer,
        processor=processor,
        source=name,
        kind="program",
        provenance=origin_of(name, "program") | {"recipe": program.recipe, "files": _files(folder), "notes": notes},
    )


def _from_folder(
    folder: Path,
    name: str,
    kind: Kind,
    *,
    dtype: torch.dtype | None,
    task: str | None,
    trust_remote_code: bool,
    facts: dict[str, object],
) -> LoadedModel:
    config = read_config(folder, name, trust_remote_code=trust_remote_code)
    weights = check_weights(folder, name)
    model_class = model_class_of(config, task, name, trust_remote_code=trust_remote_code)
    with quiet_loading(), explained(name):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    notes = check_complete(info, type(model).__name__, name)
    # The name a user knows, not the place in the hub's cache, goes on into adapters and model cards.
    model.config.name_or_path = model.name_or_path = name
    tokenizer, processor, more_notes = companions_in(folder, name, trust_remote_code=trust_remote_code)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        processor=processor,
        source=name,
        kind=kind,
        provenance=origin_of(name, kind) | facts | {"files": weights, "notes": notes + more_notes},
    )


def _device(device: "torch.device | str") -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise SparsepassError(f"device {device} cannot be used here ({first_line(error)}); try device='cpu'") from error
    return place


def _facts(model: nn.Module) -> dict[str, object]:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    model_class = model.origin.model_class if isinstance(model, Program) else type(model).__qualname__
    return {
        "class": model_class,
        "dtype": "+".join(dtypes),
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
