"""What a user may train on: names, files, folders and Python objects, each found and opened."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import numpy as np
from torch import Tensor

from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.passes.data import TEXT_SUFFIXES, default_text, load_data_set, locate, path_kind

PYTHON_DOCS = "python-docs"
FORMS = (
    f"the path of a .txt, .jsonl or .parquet file, several of one kind, a folder, the name of a hub data set ('name', "
    f"'name:config' or 'name:config:split'), {PYTHON_DOCS!r}, a datasets.Dataset or IterableDataset, a list of texts or of "
    "rows, or a tensor of token ids"
)
# Characters read at a time from a text file, and how many may pass without a place to cut.
_PIECE, _LONGEST_PIECE = 1 << 16, 1 << 20


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source.

    Args:
        name: For reports and messages.
        kind: What it is, in words.
        keys: What tells whether two sources are the same.
        texts: The text files to read, if it is made of them.
        data: Otherwise: a ``datasets.Dataset`` or ``IterableDataset``, or a tensor of token ids.
    """

    name: str
    kind: str
    keys: frozenset[str]
    texts: tuple[str, ...] = ()
    data: Any = None


def open_source(given: object, *, what: str, streaming: bool) -> Source:
    """Find and open what the user names or brings.

    Args:
        given: One of the forms in ``FORMS``.
        what: "training data" or "validation data", for messages.
        streaming: Whether hub data sets, folders and files are streamed.

    Raises:
        SparsepassError: If it is of no known form, missing, empty, or cannot be read.
    """
    import datasets

    if isinstance(given, (str, Path)):
        return _from_name(str(given), what, streaming)
    if isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise SparsepassError(
            f"{what} is a data set with the splits {', '.join(given)}: choose one, such as data[{next(iter(given), 'train')!r}]"
        )
    keys = frozenset({f"object {id(given)}"})
    if isinstance(given, datasets.IterableDataset):
        return Source(name="IterableDataset", kind="streamed data set", keys=keys, data=given)
    if isinstance(given, datasets.Dataset):
        return Source(name=f"Dataset of {len(given)} rows", kind="data set", keys=keys, data=given)
    if isinstance(given, (Tensor, np.ndarray)):
        return Source(name=f"shape {list(given.shape)}", kind="token ids", keys=keys, data=_token_ids(given, what))
    if isinstance(given, Sequence) and not given:
        raise SparsepassError(f"{what} is empty; expected {FORMS}")
    if isinstance(given, tuple) or (isinstance(given, list) and isinstance(given[0], Path)):
        return _from_files([str(name) for name in given], what, streaming)
    if isinstance(given, list):
        return _from_list(given, what, keys)
    raise SparsepassError(
        f"{what} of type {type(given).__name__} is not understood; expected {FORMS}. A generator is given as "
        "datasets.IterableDataset.from_generator(...), so that a stopped run can find its place again"
    )


def _token_ids(given: Any, what: str) -> Any:
    ids = given.cpu().numpy() if isinstance(given, Tensor) else given
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise SparsepassError(
            f"{what} has to be integer token ids of shape [tokens] or [sequences, tokens], and is {ids.dtype} of shape "
            f"{list(ids.shape)}"
        )
    return ids


def _from_list(items: list[Any], what: str, keys: frozenset[str]) -> Source:
    import datasets

    kind = str if isinstance(items[0], str) else Mapping
    for index, item in enumerate(items):
        if not isinstance(item, kind):
            raise SparsepassError(
                f"{what}: item {index} of the list is of type {type(item).__name__}; expected texts, or rows such as "
                '{"input_ids": [...]}, and only one of them. Several files are given as a tuple'
            )
    if kind is str:
        return Source(name=f"{len(items)} texts", kind="texts", keys=keys, data=datasets.Dataset.from_dict({"text": items}))
    return Source(name=f"{len(items)} rows", kind="rows", keys=keys, data=datasets.Dataset.from_list(items))


def _from_name(name: str, what: str, streaming: bool) -> Source:
    if name == PYTHON_DOCS:
        return Source(name=name, kind="text", keys=frozenset({name}), texts=(name,))
    path = locate(name, what=what, forms=FORMS)
    if path is not None and not path.is_dir():
        return _from_files([name], what, streaming)
    if path is not None and (texts := _texts_in(path)):
        keys = frozenset(texts)
        return Source(name=name, kind=f"folder of {len(texts)} text files", keys=keys, texts=tuple(texts))
    data = load_data_set(name, what=what, streaming=streaming)
    folder, *rest = name.split(":")
    place = str(Path(folder).expanduser().resolve()) if Path(folder).expanduser().is_dir() else folder
    config, split = ([*rest, "", ""])[:2]
    return Source(
        name=name, kind=_kind_of(data), keys=frozenset({f"{place}:{config or 'default'}:{split or 'train'}"}), data=data
    )


def _texts_in(folder: Path) -> list[str]:
    """Return a folder's text files if it holds no data beside them: `datasets` would read each line as a document."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if any(path.suffix in (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".py") for path in files):
        return []
    return [str(path.resolve()) for path in files if path.suffix in TEXT_SUFFIXES[1:] and path.stat().st_size]


def _from_files(names: list[str], what: str, streaming: bool) -> Source:
    import datasets

    paths = [Path(name).expanduser().resolve() for name in names]
    kinds = {path_kind(path, name, what=what, forms=FORMS) for path, name in zip(paths, names, strict=True)}
    if len(kinds) > 1 or "folder" in kinds:
        raise SparsepassError(
            f"{what}: several names at once have to be files of one kind, and they are {', '.join(sorted(kinds))}; put them "
            "into one folder, or convert them"
        )
    files = [str(path) for path in paths]
    if len(set(files)) < len(files):
        raise SparsepassError(f"{what} names the same file twice: {', '.join(names)}")
    (kind,) = kinds
    label = ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"
    if kind == "text":
        return Source(name=label, kind="text files", keys=frozenset(files), texts=tuple(files))
    try:
        data = datasets.load_dataset("json" if kind == "jsonl" else kind, data_files=files, split="train", streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise SparsepassError(
            f"{what} {label} could not be read as {kind}: {type(cause).__name__}: {first_line(cause)}"
        ) from error
    return Source(name=label, kind=f"{kind} files", keys=frozenset(files), data=data)


def _kind_of(data: Any) -> str:
    import datasets

    return "streamed data set" if isinstance(data, datasets.IterableDataset) else "data set"


def piece_rows(files: Sequence[str], what: str = "training data") -> Iterator[dict[str, Any]]:
    """Read text files in pieces, so that a file of any size is tokenized in little memory.

    A piece ends behind a line break that stands between two characters which are no white space: the tokenizers of
    GPT-2, Llama and their kin never make a token across it, so that the ids are those of the whole text.

    Args:
        files: Paths, or "python-docs" for the calibration part of Python's documentation topics.
        what: For messages.

    Returns:
        Rows of ``text``, ``begins`` and ``ends``: whether the file, and so the document, begins and ends with it.

    Raises:
        SparsepassError: If a file is missing or not UTF-8.

    Example:
        >>> [len(row["text"]) > 60_000 for row in piece_rows(["python-docs"])][:2]
        [True, True]
    """
    for file in files:
        try:
            with _open(file) as text:
                yield from _pieces(text)
        except UnicodeDecodeError as error:
            raise SparsepassError(
                f"{what} {file} is not UTF-8 ({error.reason}); convert it, for example with `iconv -t UTF-8`"
            ) from error
        except OSError as error:
            raise SparsepassError(f"{what} {file} cannot be read: {error}") from error


def _open(file: str) -> IO[str]:
    if file == PYTHON_DOCS:
        return io.StringIO(default_text("calibration"))
    return Path(file).open(encoding="utf-8-sig")


def _pieces(text: IO[str]) -> Iterator[dict[str, Any]]:
    held, begins = "", True
    while new := text.read(_PIECE):
        held += new
        cut = _last_cut(held)
        if cut is None and len(held) >= _LONGEST_PIECE:
            cut = held.rfind("\n", 0, len(held) - 1) + 1 or len(held) - 1
        if cut:
            yield {"text": held[:cut], "begins": begins, "ends": False}
            held, begins = held[cut:], False
    yield {"text": held, "begins": begins, "ends": True}


def _last_cut(text: str) -> int | None:
    at = len(text) - 1
    while (at := text.rfind("\n", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    return None
