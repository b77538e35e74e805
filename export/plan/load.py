"""Programs for `plan`: captured from a configuration alone, so that no weights are needed or read."""

import tempfile
from importlib import util
from pathlib import Path

from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.fill import capture_without_weights
from sparsepass.graph.saved import PROGRAM_FILE


def load_for_plan(source: str | Path, *, gguf_file: str | None = None) -> Program:
    """Capture what a user names, on the meta device wherever that is possible.

    Args:
        source: A folder with a config.json (weights may be missing), a .json file that is a configuration, a .gguf file or
            a folder with one, a hub id, or a folder written by ``Program.save``, which comes with its masks and branches.
        gguf_file: Name of the .gguf file, if the folder holds several.

    Raises:
        SparsepassError: If there is no configuration, or the model cannot be captured.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / PROGRAM_FILE).is_file():
            return Program.load(path)
        if gguf_file is None and (path / "config.json").is_file():
            return capture_without_weights(path)
        return _from_gguf(_gguf(path, gguf_file))
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_file():
        if path.suffix != ".json":
            raise SparsepassError(f"{path} is a file; expected a folder, a configuration (.json), a .gguf file or a hub id")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_bytes(path.read_bytes())
            return capture_without_weights(folder)
    if isinstance(source, Path) or len(path.parts) != 2 or path.is_absolute():
        raise SparsepassError(
            f"model {source} does not exist; expected a folder with a config.json, a configuration (.json), a .gguf file, a "
            "saved program, or a hub id such as 'organisation/name'"
        )
    return capture_without_weights(str(source))


def _gguf(folder: Path, name: str | None) -> Path:
    found = sorted(folder.glob(name or "*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise SparsepassError(
            f"{folder} holds several GGUF files ({', '.join(p.name for p in found)}); choose one: --gguf-file"
        )
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise SparsepassError(
        f"{folder} has no config.json and no {name or '.gguf file'} (there is {there}); a plan needs the model's configuration"
    )


def _from_gguf(path: Path) -> Program:
    """Read the configuration in a GGUF file's header, and capture the causal language model that it describes."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not path.is_file():
        raise SparsepassError(f"model {path} does not exist; check the path")
    if util.find_spec("gguf") is None:
        raise SparsepassError(f'{path} is a GGUF file, and the package gguf is missing: pip install "sparsepass[gguf]"')
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise SparsepassError(f"{path} is not a GGUF file (it begins with {magic!r}); it is damaged, download it again")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise SparsepassError(f"{path}: its header cannot be read ({error}); it may be truncated, download it again") from error
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise SparsepassError(f"{path} holds a {config.model_type}, of which transformers has no causal language model")
    config.architectures = [name if isinstance(name, str) else name[0]]
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return capture_without_weights(folder)
