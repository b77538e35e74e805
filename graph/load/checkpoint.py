"""What a checkpoint holds, and what is checked of it: its configuration, weights, model class, tokenizer and processor."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepass.graph.load.contents import check_plain
from sparsepass.graph.load.described import check_companions, check_numbers, explained
from sparsepass.graph.packed_folder import is_packed
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import (
    INFINITIES,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    SparsepassError,
    check_tensors,
    first_line,
    package_version,
    quiet_loading,
    read_object,
    weights_entry,
    weights_files,
)
from sparsepass.graph.texts import is_tokenizer_fault, panics_unseen, try_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(folder: Path, name: str, *, trust_remote_code: bool) -> "PretrainedConfig":
    """The configuration of a checkpoint.

    Raises:
        SparsepassError: If there is none, or it is of an adapter, a quantized model or one with code of its own.
    """
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
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
    document = read_object(path, allowed=INFINITIES)
    check_numbers(document, path)
    check_not_quantized(document.get("quantization_config") or document.get("compression_config"), name)
    known: Mapping[str, object] = getattr(configuration_auto, "CONFIG_MAPPING_NAMES")  # noqa: B009  # not declared public
    if not isinstance(document.get("auto_map", {}), dict):
        raise SparsepassError(f"{path}: auto_map is {document['auto_map']!r}, no table of classes; take the key out")
    if document.get("auto_map") and not trust_remote_code and document.get("model_type") not in known:
        raise SparsepassError(
            f"model {name} brings its own code ({document['auto_map']}); if you trust it, pass trust_remote_code"
        )
    if (folder / "adapter_config.json").is_file():
        raise SparsepassError(
            f"model {name} has a PEFT adapter beside its weights (adapter_config.json), which transformers attaches where peft "
            "is installed; merge it into the model (merge_and_unload, then save_pretrained), or move its files elsewhere"
        )
    _check_architectures(document, path)
    with quiet_loading(), explained(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return config


def _check_architectures(document: Mapping[str, Any], path: Path) -> None:
    named = document.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise SparsepassError(f"{path} names its architectures as {named!r}, where a list of class names is expected")


def check_not_quantized(quantization: object, name: str) -> None:
    """Refuse a checkpoint whose configuration says that it is quantized. One that is packed by us is taken, to be run."""
    if not quantization or is_packed(quantization) or is_plain(quantization):
        return
    settings = _settings(quantization)
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "an unknown method"))
    raise SparsepassError(
        f"model {name} is already quantized or compressed ({method}), and pruning needs the floating-point weights; "
        "start from the checkpoint it was made from"
    )


def is_plain(quantization: object) -> bool:
    """Whether compressed-tensors' configuration says that nothing is quantized, and that sparse weights are stored plainly.

    Example:
        >>> sparsity = {"format": "dense", "sparsity_structure": "2:4"}
        >>> is_plain({"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity})
        True
        >>> is_plain({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}})
        False
    """
    settings = _settings(quantization)
    method = getattr(settings.get("quant_method"), "value", settings.get("quant_method"))
    sparsity = settings.get("sparsity_config") or {}
    stored = (settings.get("format"), sparsity.get("format") if isinstance(sparsity, Mapping) else "unknown")
    is_known = method == "compressed-tensors" and not settings.get("config_groups") and not settings.get("kv_cache_scheme")
    return is_known and any(stored) and set(stored) <= {"dense", None}


def _settings(quantization: object) -> Mapping[str, Any]:
    return quantization if isinstance(quantization, Mapping) else getattr(quantization, "__dict__", {})


def check_weights(folder: Path, name: str, *, is_packed_already: bool = False) -> dict[str, int]:
    """Open every weights file's header, so that what is damaged or misread is named before anything is built.

    Args:
        folder: The checkpoint.
        name: The model's name.
        is_packed_already: Whether the folder is packed by us, so that its weights are not plain.

    Returns:
        File -> size in bytes.

    Raises:
        SparsepassError: If a file is missing or damaged, or its weights are not plain.
    """
    entry = weights_entry(folder)
    if entry is None:
        if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
            raise SparsepassError(
                f"model {name} has its weights in GGUF files ({', '.join(ggufs[:4])}); choose one with gguf_file (--gguf-file)"
            )
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise SparsepassError(
                f"model {name} has its weights only in pickle files ({', '.join(pickles[:4])}), which can run any "
                "code when read, so they are not. If you trust them, convert once: "
                "AutoModel...from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
            )
        raise SparsepassError(
            f"model {name} has no weights: expected {WEIGHTS_FILE} or {WEIGHTS_INDEX}. Checkpoints that are only pickled "
            "(.bin) are not read; convert them with AutoModel...from_pretrained(..., "
            "use_safetensors=False).save_pretrained(new_folder)"
        )
    shards = [str(path.relative_to(folder)) for path in weights_files(entry)]
    for shard in shards:
        check_tensors(folder / shard)
    if not is_packed_already:
        check_plain(folder, shards, name)
    return {shard: (folder / shard).stat().st_size for shard in shards}


def check_complete(info: Mapping[str, Any], class_name: str, name: str) -> list[str]:
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
        names = sorted(info["unexpected_keys"])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"{len(names)} weights of the checkpoint are not used by {class_name}: {', '.join(names[:3])}{more}")
    return notes


# Task -> the tables of transformers that name a model class for it, and the Auto class for models with code of their
# own.
TASKS: dict[str, tuple[tuple[str, str], ...]] = {
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


def choose_attention(config: "PretrainedConfig") -> str | None:
    """Let transformers choose among the implementations of attention that are always there, if a configuration names another.

    Args:
        config: Changed, with all that it contains.

    Returns:
        What it named, such as ``flash_attention_2``; None if it may stay.
    """
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    named = [
        one for part in (config, *parts) if (one := getattr(part, "_attn_implementation", None)) not in (None, "eager", "sdpa")
    ]
    if not named:
        return None
    for part in (config, *(part for part in parts if part is not None)):
        part._attn_implementation = None
    return str(named[0])


def model_class_of(config: "PretrainedConfig", task: str | None, name: str, *, trust_remote_code: bool) -> Any:
    """The class for the task, or the one that config.json names.

    Raises:
        SparsepassError: If there is none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    own_code: Mapping[str, str] = getattr(config, "auto_map", None) or {}
    if task is not None:
        for table, auto_class in TASKS[task]:
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


def companions_in(folder: Path, name: str, *, trust_remote_code: bool) -> tuple[Any, Any, list[str]]:
    """Return the tokenizer and the processor that lie in a folder, each None if it has none, and notes."""
    import transformers

    processor = None
    notes: list[str] = []
    tokenizer = tokenizer_in(folder, name, trust_remote_code=trust_remote_code)
    with quiet_loading(), explained(name, "its tokenizer or processor files"):
        kind = _processor_kind(folder, has_tokenizer=tokenizer is not None)
        if kind is not None:
            try:
                processor = getattr(transformers, kind).from_pretrained(
                    folder, trust_remote_code=trust_remote_code, local_files_only=True
                )
            except ImportError as error:
                # Images need Pillow, which neither capture nor pruning does.
                notes.append(f"its processor was not loaded: {first_line(error)}")
    return tokenizer, processor, notes


def tokenizer_in(folder: Path, name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that lies in a folder, None if none does.

    Args:
        folder: The model's.
        name: What the user calls it, for messages.
        trust_remote_code: Whether code that comes with it may run.

    Raises:
        SparsepassError: If its files are damaged.
    """
    import transformers

    check_companions(folder)
    found = [file for file in _TOKENIZER_FILES if (folder / file).is_file()]
    if not found:
        return None
    with quiet_loading(), tokenizer_explained(name, found):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        try_tokenizer(tokenizer)
    return tokenizer


@contextmanager
def tokenizer_explained(name: str, files: Sequence[str]) -> Iterator[None]:
    """Tell which files no tokenizer could be made of."""
    try:
        with panics_unseen():
            yield
    except BaseException as error:
        if not is_tokenizer_fault(error):
            raise
        versions = " and ".join(f"{package} {package_version(package)}" for package in ("transformers", "tokenizers"))
        raise SparsepassError(
            f"model {name}: no tokenizer can be made of {', '.join(files)}, its tokenizer or processor files: "
            f"{type(error).__name__}: {first_line(error)}. This is {versions}: the files may be of another version, or need "
            "another package (sentencepiece, tiktoken); install that, or copy the files again"
        ) from error


def _processor_kind(folder: Path, *, has_tokenizer: bool) -> str | None:
    """Return the Auto class for a folder's processor; AutoProcessor itself fails where only a part is there."""
    if (folder / "processor_config.json").is_file():
        return "AutoProcessor"
    if not (folder / "preprocessor_config.json").is_file():
        return None
    settings = read_object(folder / "preprocessor_config.json")
    if has_tokenizer and settings.get("processor_class"):
        return "AutoProcessor"
    return "AutoFeatureExtractor" if "sampling_rate" in settings else "AutoImageProcessor"
