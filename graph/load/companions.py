"""The tokenizer and the processor that lie beside a model."""

from pathlib import Path
from typing import Any

from sparsepass.graph.load.checks import explained, read_json
from sparsepass.graph.support import first_line, quiet_loading

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

    tokenizer = processor = None
    notes: list[str] = []
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with quiet_loading(), explained(name, "its tokenizer or processor files"):
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
    settings = read_json(folder / "preprocessor_config.json")
    if has_tokenizer and settings.get("processor_class"):
        return "AutoProcessor"
    return "AutoFeatureExtractor" if "sampling_rate" in settings else "AutoImageProcessor"
