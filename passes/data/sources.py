"""Where data comes from, for calibration and for training: files, folders, data sets of the hub, and a tokenizer's ids."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepass.graph.support import SparsepassError, first_line, path_named
from sparsepass.graph.texts import tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def locate(name: str, *, what: str, forms: str) -> Path | None:
    """Tell a path from the name of a data set.

    Args:
        name: What the user wrote.
        what: What it is to be, for messages: "calibration".
        forms: The forms that are understood, for messages.

    Returns:
        The path of something that exists, or None for the name of a data set: ``name``, ``name:config`` or
        ``name:config:split``, where ``name`` is a hub name or a folder.

    Raises:
        SparsepassError: If it is empty, looks like a path and does not exist, or is neither a path nor a name.

    Example:
        >>> locate("wikitext:wikitext-2-raw-v1:train", what="calibration", forms="...")
        >>> locate("missing.txt", what="calibration", forms="a text file")
        Traceback (most recent call last):
        sparsepass.SparsepassError: calibration file missing.txt does not exist; expected a text file
    """
    if not name.strip():
        raise SparsepassError(f"{what} is an empty string; expected {forms}")
    path = path_named(name)
    if path is not None:
        return path
    folder, _, rest = name.partition(":")
    if (place := path_named(folder)) is not None and place.is_dir():
        return None
    if Path(name).suffix in (".txt", ".jsonl", ".parquet", ".json", ".csv") or name.startswith(("/", ".", "~")) or "\\" in name:
        raise SparsepassError(f"{what} file {name} does not exist; expected {forms}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", folder) or rest.count(":") > 1:
        raise SparsepassError(
            f"{what} {name[:80]!r} is neither a file here nor the name of a hub data set ('name', "
            "'name:config' or 'name:config:split'); a text itself is given as a list of strings"
        )
    return None


def data_set_name(name: str) -> tuple[str, str | None, str]:
    """Take ``name``, ``name:config`` or ``name:config:split`` apart.

    Returns:
        The name of the hub, or the path of a folder that exists; the config; and the split, "train" if not said.

    Example:
        >>> data_set_name("wikitext:wikitext-2-raw-v1"), data_set_name("wikitext::test")
        (('wikitext', 'wikitext-2-raw-v1', 'train'), ('wikitext', None, 'test'))
    """
    place, *rest = name.split(":")
    config, split = ([part or None for part in rest] + [None, None])[:2]
    folder = Path(place).expanduser()
    return str(folder) if folder.is_dir() else place, config, split or "train"


def check_one_split(data: Any, what: str) -> None:
    """Make sure that a data set is one, and not a mapping of several splits.

    Raises:
        SparsepassError: If it is a ``datasets.DatasetDict`` or ``IterableDatasetDict``.
    """
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise SparsepassError(
            f"{what} is a data set with the splits {', '.join(data)}: choose one, such as data[{next(iter(data), 'train')!r}]"
        )


def load_data_set(name: str, *, what: str, streaming: bool) -> Any:
    """Load a data set of the hub or a local folder, with ``datasets``.

    Args:
        name: ``name``, ``name:config`` or ``name:config:split``; the name of the hub, or a folder (also one that
            ``save_to_disk`` wrote). The split is "train" if not said; ``name::split`` leaves the config out.
        what: What it is to be, for messages.
        streaming: Read it as it is needed instead of preparing it whole.

    Returns:
        A ``datasets.IterableDataset`` if streaming, else a ``datasets.Dataset``. A folder that ``save_to_disk`` wrote is
        mapped into memory, so it is a ``Dataset`` either way.

    Raises:
        SparsepassError: If it cannot be loaded.
    """
    import datasets

    place, config, split = data_set_name(name)
    folder = Path(place)
    try:
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return datasets.load_from_disk(place)
        return datasets.load_dataset(place, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        kind = "folder" if folder.is_dir() else "hub data set"
        raise SparsepassError(
            f"{what} {name!r} could not be loaded as a {kind} (config {config or 'default'}, split {split}): "
            f"{type(error).__name__}: {first_line(error)}. Check the spelling ('name:config:split') and, for a hub name, the "
            "network and HF_HUB_OFFLINE; or pass the path of a .txt, .jsonl or .parquet file"
        ) from error


def special_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer itself puts before and after a text."""
    with tokenizing(tokenizer):
        body = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        full = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(full) - len(body) + 1):
        if full[start : start + len(body)] == body:
            return full[:start], full[start + len(body) :]
    return [], []
