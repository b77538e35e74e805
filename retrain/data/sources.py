"""What a user may train on: names, files, folders and Python objects, each found and opened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.passes.data import (
    PYTHON_DOCS,
    TEXT_SUFFIXES,
    RecordError,
    arrow_schema,
    check_one_split,
    data_set_name,
    load_data_set,
    locate,
    path_kind,
    records,
)
from sparsepass.retrain.data.tokens import IDS, LABELS, MASK

FORMS = (
    f"the path of a .txt, .jsonl or .parquet file, several of one kind, a folder, the name of a hub data set ('name', "
    f"'name:config' or 'name:config:split'), {PYTHON_DOCS!r}, a datasets.Dataset or IterableDataset, a list of texts or of "
    "rows, or a tensor of token ids"
)


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


def open_source(given: object, *, what: str, streaming: bool, text_column: str) -> Source:
    """Find and open what the user names or brings.

    Args:
        given: One of the forms in ``FORMS``.
        what: "training data" or "validation data", for messages.
        streaming: Whether hub data sets, folders and files are streamed.
        text_column: The column that holds text.

    Raises:
        SparsepassError: If it is of no known form, missing, empty, or cannot be read.
    """
    import datasets

    if isinstance(given, (str, Path)):
        return _from_name(str(given), what, streaming, text_column)
    check_one_split(given, what)
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
        return _from_files([str(name) for name in given], what, streaming, text_column)
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


def _from_name(name: str, what: str, streaming: bool, text_column: str) -> Source:
    if name == PYTHON_DOCS:
        return Source(name=name, kind="text", keys=frozenset({name}), texts=(name,))
    path = locate(name, what=what, forms=FORMS)
    if path is not None and not path.is_dir():
        return _from_files([name], what, streaming, text_column)
    if path is not None and (texts := _texts_in(path)):
        keys = frozenset(texts)
        return Source(name=name, kind=f"folder of {len(texts)} text files", keys=keys, texts=tuple(texts))
    data = load_data_set(name, what=what, streaming=streaming)
    place, config, split = data_set_name(name)
    place = str(Path(place).resolve()) if Path(place).is_dir() else place
    keys = frozenset({f"{place}:{config or 'default'}:{split}"})
    return Source(name=name, kind=_kind_of(data), keys=keys, data=data)


def _texts_in(folder: Path) -> list[str]:
    """Return a folder's text files if it holds no data beside them: `datasets` would read each line as a document."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if any(path.suffix in (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".py") for path in files):
        return []
    return [str(path.resolve()) for path in files if path.suffix in TEXT_SUFFIXES[1:] and path.stat().st_size]


def _from_files(names: list[str], what: str, streaming: bool, text_column: str) -> Source:
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
        data = _rows_of_files(files, streaming, text_column)
    except RecordError as error:
        raise SparsepassError(f"{what} {label} could not be read as {kind}: {error}") from error
    return Source(name=label, kind=f"{kind} files", keys=frozenset(files), data=data)


def _rows_of_files(files: list[str], streaming: bool, text_column: str) -> Any:
    """Open .jsonl or .parquet files as a data set; of their columns the ones that training reads, if there are any.

    Raises:
        RecordError: If a file is damaged, or files have other columns than the first one.
    """
    import datasets

    wanted = (text_column, IDS, LABELS, MASK)
    found = [next(records(file), None) for file in files]
    columns: tuple[str, ...] = ()
    for file, row in zip(files, found, strict=True):
        if row is None:
            continue
        here = tuple(name for name in row if name in wanted) or tuple(row)
        columns = columns or here
        if set(here) != set(columns):
            raise RecordError(f"file {file} has the columns {', '.join(here)}, and files before it {', '.join(columns)}")
    if not columns:
        return datasets.Dataset.from_dict({})
    # What tells that a file changed: the tokens of the same one are found again in the cache.
    stamps = [(Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    absent = tuple(name for name in wanted if name not in columns)
    # One shard for each file.
    options: dict[str, Any] = {"files": files, "stamps": stamps, "columns": columns, "absent": absent}
    if streaming:
        return datasets.IterableDataset.from_generator(_file_rows, gen_kwargs=options)
    schema = arrow_schema(files[0], columns)
    features = None if schema is None else datasets.Features.from_arrow_schema(schema)
    try:
        return datasets.Dataset.from_generator(_file_rows, features=features, gen_kwargs=options)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise (
            cause if isinstance(cause, RecordError) else RecordError(f"{type(cause).__name__}: {first_line(cause)}")
        ) from error


def _file_rows(
    files: list[str], stamps: list[Any], columns: tuple[str, ...], absent: tuple[str, ...]
) -> Iterator[Mapping[str, Any]]:
    for file in files:
        yield from records(file, columns=columns, absent=absent)


def _kind_of(data: Any) -> str:
    import datasets

    return "streamed data set" if isinstance(data, datasets.IterableDataset) else "data set"
