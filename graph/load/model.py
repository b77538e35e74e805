"""Loading what a user names: a folder, a hub id, a GGUF file, a saved program, or a model in memory."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import torch
from torch import nn

from sparsepass.graph.program import PROGRAM_FILE, Program
from sparsepass.graph.support import SparsepassError, closest, first_line, quiet_loading

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Kind = Literal["folder", "hub", "gguf", "program", "memory"]

# Task -> the tables of transformers that name a model class for it, and the Auto class for models with code of their
# own.
_TASKS: dict[str, tuple[tuple[str, str], ...]] = {
    "text-generation": (("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),),
    "feature-extraction": (("MODEL_MAPPING_NAMES", "AutoModel"),),
    "fill-mask": (("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),),
    "text-classification": (("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),),
    "token-classification": (("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification"),),
    "question-answering": (("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering"),),
    "text2text-generation": (("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),),
    "image-classification": (("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),),
    "image-text-to-text": (("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),),
    "zero-shot-image-classification": (
        ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForZeroShotImageClassification"),
    ),
    "audio-classification": (("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "AutoModelForAudioClassification"),),
    "automatic-speech-recognition": (
        ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
        ("MODEL_FOR_CTC_MAPPING_NAMES", "AutoModelForCTC"),
    ),
}

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

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "tekken.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with what came beside it.

    Args:
        model: The model in eval mode, of its own class; a Program if a saved program was named.
        tokenizer: Its tokenizer, if it has one.
        processor: Its image processor, feature extractor or whole processor, if it has one.
        source: What the user named.
        kind: Where it came from.
        provenance: JSON-ready facts for the report: class, dtype, parameters, files, versions, notes.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    processor: Any
    source: str
    kind: Kind
    provenance: Mapping[str, object]

    @property
    def program(self) -> Program | None:
        """The model, if it is a Program."""
        return self.model if isinstance(self.model, Program) else None


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
    if task is not None and task not in _TASKS:
        near = closest(task, _TASKS)
        raise SparsepassError(
            f"task {task!r} is not known{f'; did you mean {near!r}?' if near else ''}; known are {', '.join(_TASKS)}"
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
    elif isinstance(source, Path) or not _is_hub_id(name):
        raise SparsepassError(
            f"model {name} does not exist; expected a folder, a .gguf file, a saved program, or a hub id such as "
            "'organisation/name'"
        )
    else:
        folder, commit = _download(
            name, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code, token=token
        )
        kind = "hub"
    gguf_file = gguf_file or _lone_gguf(folder, name)
    facts: dict[str, object] = {"revision": revision, "commit": commit} if kind == "hub" else {}
    if gguf_file is not None:
        return _from_gguf(folder, gguf_file, name, dtype=dtype, task=task, facts=facts)
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
    _check_not_quantized(getattr(config, "quantization_config", None), name)
    kind: Kind = "program" if isinstance(model, Program) else "memory"
    return LoadedModel(model=model, tokenizer=None, processor=None, source=name, kind=kind, provenance=_origin(name, kind))


def _from_program(folder: Path, name: str) -> LoadedModel:
    program = Program.load(folder)
    program.eval()
    tokenizer, processor, notes = _companions(folder, name, trust_remote_code=False)
    return LoadedModel(
        model=program,
        tokenizer=tokenizer,
        processor=processor,
        source=name,
        kind="program",
        provenance=_origin(name, "program") | {"recipe": program.recipe, "files": _files(folder), "notes": notes},
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
    config = _read_config(folder, name, trust_remote_code=trust_remote_code)
    weights = _check_weights(folder, name)
    model_class = _model_class(config, task, name, trust_remote_code=trust_remote_code)
    with quiet_loading(), _explained(name):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    notes = _check_complete(info, type(model).__name__, name)
    # The name a user knows, not the place in the hub's cache, goes on into adapters and model cards.
    model.config.name_or_path = model.name_or_path = name
    tokenizer, processor, more_notes = _companions(folder, name, trust_remote_code=trust_remote_code)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        processor=processor,
        source=name,
        kind=kind,
        provenance=_origin(name, kind) | facts | {"files": weights, "notes": notes + more_notes},
    )


def _from_gguf(
    folder: Path, gguf_file: str, name: str, *, dtype: torch.dtype | None, task: str | None, facts: dict[str, object]
) -> LoadedModel:
    from transformers import AutoConfig, AutoTokenizer

    path = folder / gguf_file
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise SparsepassError(f"model {name} has no GGUF file {gguf_file}; the .gguf files there: {there}")
    if util.find_spec("gguf") is None:
        raise SparsepassError(f'model {name} is a GGUF file, and the package gguf is missing: pip install "sparsepass[gguf]"')
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise SparsepassError(f"{path} is not a GGUF file (it begins with {magic!r}); it is damaged, download it again")
    with (
        quiet_loading(),
        _explained(name, f"{path}: the file may be truncated, or of an architecture transformers cannot read"),
    ):
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
        model_class = _model_class(config, task or "text-generation", name, trust_remote_code=False)
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            gguf_file=gguf_file,
            dtype=dtype or torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
    notes = [
        *_check_complete(info, type(model).__name__, name),
        "weights were dequantized from GGUF: what is called dense here lies on the file's own grid",
    ]
    # The weights are plain floating-point now; left in place, these would mark the saved model as quantized.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.name_or_path = model.name_or_path = name
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        processor=None,
        source=name,
        kind="gguf",
        provenance=_origin(name, "gguf")
        | facts
        | {"gguf_file": gguf_file, "files": {gguf_file: path.stat().st_size}, "notes": notes},
    )


def _lone_gguf(folder: Path, name: str) -> str | None:
    if (folder / "config.json").is_file():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1:
        raise SparsepassError(f"model {name} holds several GGUF files ({', '.join(found)}); choose one with gguf_file")
    return found[0] if found else None


def _read_config(folder: Path, name: str, *, trust_remote_code: bool) -> "PretrainedConfig":
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise SparsepassError(
                f"model {name} is a PEFT adapter, not a model: load its base model{f' {base}' if base else ''}, or "
                "merge the adapter into it first (PeftModel.from_pretrained(...).merge_and_unload(), then "
                "save_pretrained)"
            )
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise SparsepassError(
            f"model {name} has no config.json (there is {there}); expected a folder written by save_pretrained, a "
            f"saved program ({PROGRAM_FILE}) or a .gguf file"
        )
    document = _read_json(path)
    _check_not_quantized(document.get("quantization_config") or document.get("compression_config"), name)
    known: Mapping[str, object] = getattr(configuration_auto, "CONFIG_MAPPING_NAMES")  # noqa: B009  # not declared public
    if document.get("auto_map") and not trust_remote_code and document.get("model_type") not in known:
        raise SparsepassError(
            f"model {name} brings its own code ({document['auto_map']}); if you trust it, pass trust_remote_code"
        )
    with quiet_loading(), _explained(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparsepassError(f"{path} is not readable as JSON ({error}); copy the model again") from error
    if not isinstance(document, dict):
        raise SparsepassError(f"{path} holds a {type(document).__name__} where an object is expected; copy the model again")
    return document


def _check_not_quantized(quantization: object, name: str) -> None:
    if not quantization:
        return
    settings = quantization if isinstance(quantization, Mapping) else getattr(quantization, "__dict__", {})
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "an unknown method"))
    raise SparsepassError(
        f"model {name} is already quantized or compressed ({method}), and pruning needs the floating-point weights; "
        "start from the checkpoint it was made from"
    )


def _check_weights(folder: Path, name: str) -> dict[str, int]:
    """Open every weights file's header, so that a damaged one is named before anything is built."""
    if (folder / _INDEX).is_file():
        shards = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise SparsepassError(
                f"model {name}: {_INDEX} names {len(shards)} files, and {', '.join(missing) or 'all'} are missing; "
                "copy or download the model again"
            )
    elif (folder / _SINGLE).is_file():
        shards = [_SINGLE]
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise SparsepassError(
                f"model {name} has its weights only in pickle files ({', '.join(pickles[:4])}), which can run any "
                "code when read, so they are not. If you trust them, convert once: "
                "AutoModel...from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
            )
        raise SparsepassError(
            f"model {name} has no weights: expected {_SINGLE} or {_INDEX}. Checkpoints that are only pickled (.bin) "
            "are not read; convert them with AutoModel...from_pretrained(..., "
            "use_safetensors=False).save_pretrained(new_folder)"
        )
    for shard in shards:
        try:
            with safetensors.safe_open(folder / shard, framework="pt") as file:
                file.keys()
        except (safetensors.SafetensorError, OSError) as error:
            raise SparsepassError(
                f"model {name}: weights file {folder / shard} is truncated or damaged ({error}); copy or download it again"
            ) from error
    return {shard: (folder / shard).stat().st_size for shard in shards}


def _model_class(config: "PretrainedConfig", task: str | None, name: str, *, trust_remote_code: bool) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    own_code: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    if task is not None:
        for table, auto_class in _TASKS[task]:
            if trust_remote_code and auto_class in own_code:
                return getattr(transformers, auto_class)
            found = getattr(modeling_auto, table).get(config.model_type)
            if found is not None:
                return getattr(transformers, found if isinstance(found, str) else found[0])
        raise SparsepassError(
            f"model {name} is a {config.model_type} model, and transformers {transformers.__version__} has no class "
            f"for the task {task} of such a model; leave the task out to load the class that config.json names"
        )
    architectures = config.architectures or []
    for architecture in architectures:
        model_class = getattr(transformers, architecture, None)
        if model_class is not None:
            return model_class
    if trust_remote_code:
        for reference in own_code:
            if reference.startswith("AutoModel"):
                return getattr(transformers, reference)
    if architectures:
        raise SparsepassError(
            f"model {name} is of the class {', '.join(architectures)}, which transformers {transformers.__version__} "
            "does not have; upgrade transformers, or pass trust_remote_code if the checkpoint brings its own code and "
            "you trust it"
        )
    raise SparsepassError(
        f"config.json of model {name} does not name the model's class (architectures); say which with task, for "
        "example text-generation"
    )


def _check_complete(info: Mapping[str, Any], class_name: str, name: str) -> list[str]:
    """Refuse a model with random weights; a pooler that is not in the checkpoint is only noted."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"])
    poolers = [key for key in missing if "pooler" in key.split(".")]
    needed = [key for key in missing if key not in poolers] + mismatched
    if needed:
        raise SparsepassError(
            f"model {name} lacks {len(needed)} weights that {class_name} needs (such as {needed[0]}), and they would "
            "be random; choose the task the checkpoint was trained for, or copy the model again"
        )
    notes = []
    if poolers:
        notes.append(f"the checkpoint has no pooler, so {', '.join(poolers)} are random; its hidden states are whole")
    if info["unexpected_keys"]:
        notes.append(f"{len(info['unexpected_keys'])} weights of the checkpoint are not used by {class_name}")
    return notes


def _companions(folder: Path, name: str, *, trust_remote_code: bool) -> tuple[Any, Any, list[str]]:
    """Return the tokenizer and the processor that lie in a folder, each None if it has none, and notes."""
    import transformers

    tokenizer = processor = None
    notes: list[str] = []
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with quiet_loading(), _explained(name, "its tokenizer or processor files"):
        if any((folder / file).is_file() for file in _TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        kind = _processor_kind(folder, has_tokenizer=tokenizer is not None)
        if kind is not None:
            try:
                processor = getattr(transformers, kind).from_pretrained(folder, **options)
            except ImportError as error:
                # Images need Pillow, which neither capture nor pruning does.
                notes.append(f"its processor was not loaded: {first_line(error)}")
    return tokenizer, processor, notes


def _processor_kind(folder: Path, *, has_tokenizer: bool) -> str | None:
    """Return the Auto class for a folder's processor; AutoProcessor itself fails where only a part is there."""
    if (folder / "processor_config.json").is_file():
        return "AutoProcessor"
    if not (folder / "preprocessor_config.json").is_file():
        return None
    settings = _read_json(folder / "preprocessor_config.json")
    if has_tokenizer and settings.get("processor_class"):
        return "AutoProcessor"
    return "AutoFeatureExtractor" if "sampling_rate" in settings else "AutoImageProcessor"


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if name.endswith((".gguf", ".safetensors", ".bin")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _download(
    name: str, *, gguf_file: str | None, revision: str | None, trust_remote_code: bool, token: str | None
) -> tuple[Path, str]:
    """Fetch a hub repository's configuration, tokenizer and safe weights; never a pickle."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    patterns += [gguf_file] if gguf_file else ["model*.safetensors"]
    patterns += ["*.py"] if trust_remote_code else []
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else "the hub cannot be reached"
        raise SparsepassError(
            f"model {name} is no folder here, and as a hub id it is not in the local cache while {why}; check the "
            "spelling or the network, or name a local folder or .gguf file"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SparsepassError(
            f"model {name} is no folder here, and could not be downloaded from the hub: {type(error).__name__}: "
            f"{first_line(error)}. Check the spelling, the revision and, for gated models, the token"
        ) from error
    return Path(folder), Path(folder).name


def _device(device: "torch.device | str") -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise SparsepassError(f"device {device} cannot be used here ({first_line(error)}); try device='cpu'") from error
    return place


def _origin(name: str, kind: Kind) -> dict[str, object]:
    return {
        "source": name,
        "kind": kind,
        "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
    }


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


@contextmanager
def _explained(name: str, what: str = "") -> Iterator[None]:
    """Turn what transformers raises about a checkpoint into our error, keeping its own words."""
    try:
        yield
    except SparsepassError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
        IndexError,
        safetensors.SafetensorError,
    ) as error:
        raise SparsepassError(
            f"model {name} could not be loaded{f' ({what})' if what else ''}: {type(error).__name__}: {first_line(error)}"
        ) from error
