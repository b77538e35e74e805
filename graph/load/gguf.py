"""Models in GGUF files."""

from importlib import util
from pathlib import Path

import torch

from sparsepass.graph.load.checks import check_complete, explained
from sparsepass.graph.load.classes import model_class_of
from sparsepass.graph.load.loaded import LoadedModel, origin_of
from sparsepass.graph.support import SparsepassError, quiet_loading


def from_gguf(
    folder: Path, gguf_file: str, name: str, *, dtype: torch.dtype | None, task: str | None, facts: dict[str, object]
) -> LoadedModel:
    """Load a GGUF file; its weights are dequantized.

    Raises:
        SparsepassError: If it is not there, is damaged, or cannot be read here.
    """
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
        explained(name, f"{path}: the file may be truncated, or of an architecture transformers cannot read"),
    ):
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, local_files_only=True)
        model_class = model_class_of(config, task or "text-generation", name, trust_remote_code=False)
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
        *check_complete(info, type(model).__name__, name),
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
        provenance=origin_of(name, "gguf")
        | facts
        | {"gguf_file": gguf_file, "files": {gguf_file: path.stat().st_size}, "notes": notes},
    )


def lone_gguf(folder: Path, name: str) -> str | None:
    """The one GGUF file of a folder without a config.json; None if there is none."""
    if (folder / "config.json").is_file():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1:
        raise SparsepassError(f"model {name} holds several GGUF files ({', '.join(found)}); choose one with gguf_file")
    return found[0] if found else None
