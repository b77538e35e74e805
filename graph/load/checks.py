"""What is checked of a checkpoint: its configuration, the headers of its weights files, and that no weight is missing."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import SparsepassError, first_line, quiet_loading

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


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
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
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
    document = read_json(path)
    check_not_quantized(document.get("quantization_config") or document.get("compression_config"), name)
    known: Mapping[str, object] = getattr(configuration_auto, "CONFIG_MAPPING_NAMES")  # noqa: B009  # not declared public
    if document.get("auto_map") and not trust_remote_code and document.get("model_type") not in known:
        raise SparsepassError(
            f"model {name} brings its own code ({document['auto_map']}); if you trust it, pass trust_remote_code"
        )
    with quiet_loading(), explained(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        SparsepassError: If it cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SparsepassError(f"{path} is not readable as JSON ({error}); copy the model again") from error
    if not isinstance(document, dict):
        raise SparsepassError(f"{path} holds a {type(document).__name__} where an object is expected; copy the model again")
    return document


def check_not_quantized(quantization: object, name: str) -> None:
    """Refuse a checkpoint whose configuration says that it is quantized."""
    if not quantization:
        return
    settings = quantization if isinstance(quantization, Mapping) else getattr(quantization, "__dict__", {})
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "an unknown method"))
    raise SparsepassError(
        f"model {name} is already quantized or compressed ({method}), and pruning needs the floating-point weights; "
        "start from the checkpoint it was made from"
    )


def check_weights(folder: Path, name: str) -> dict[str, int]:
    """Open every weights file's header, so that a damaged one is named before anything is built."""
    if (folder / _INDEX).is_file():
        shards = sorted(set(read_json(folder / _INDEX).get("weight_map", {}).values()))
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
        notes.append(f"{len(info['unexpected_keys'])} weights of the checkpoint are not used by {class_name}")
    return notes


@contextmanager
def explained(name: str, what: str = "") -> Iterator[None]:
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
