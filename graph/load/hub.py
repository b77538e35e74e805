"""Models on the hub: which names are hub ids, and the download."""

from pathlib import Path

from sparsepass.graph.support import SparsepassError, first_line


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if name.endswith((".gguf", ".safetensors", ".bin")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def download(
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
