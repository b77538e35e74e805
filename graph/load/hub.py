"""Models on the Hugging Face hub: which names could mean one, and what is fetched of it."""

from pathlib import Path
from typing import Any

from sparsepass.graph.load.sidecars import OF_MODULES, SIDECARS, module_folders
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
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    gguf_file: str | None,
    trust_remote_code: bool,
    only: list[str] | None = None,
) -> Path:
    """Fetch a hub repository's configuration, tokenizer and safe weights, never a pickle; the commit names the folder."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", gguf_file or "model*.safetensors"]
    patterns += [*SIDECARS, *(["*.py"] if trust_remote_code else [])]
    asked: dict[str, Any] = {"revision": revision, "token": token}
    try:
        folder = huggingface_hub.snapshot_download(name, **asked, allow_patterns=only or patterns, ignore_patterns=["*/*"])
        if only is None and (modules := module_folders(Path(folder))):
            files = [f"{module}/*{suffix}" for module in modules for suffix in OF_MODULES]
            huggingface_hub.snapshot_download(name, **asked, allow_patterns=files)
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
    return Path(folder)
