"""What a user may train on, and how it is read: names, files, folders and Python objects, each found and opened."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from sparsepass.graph.support import SparsepassError, first_line
from sparsepass.graph.texts import CHAT_COLUMN, TEXT_COLUMN, TEXT_SUFFIXES, RecordError, arrow_schema, path_kind, records
from sparsepass.passes.data import PYTHON_DOCS, check_one_split, data_set_name, load_data_set, locate
from sparsepass.retrain.data.tokens import IDS, LABELS, MASK

FORMS = (
    f"the path of a .txt, .jsonl or .parquet file, several of one kind, a folder, the name of a hub data set ('name', "
    f"'name:config' or 'name:config:split'), {PYTHON_DOCS!r}, a datasets.Dataset or IterableDataset, a list of texts or of "
    "rows, or a tensor of token ids"
)


@final
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how it is read; the ``data`` section of a recipe.

    Args:
        source: The path of a .txt, .jsonl or .parquet file, several files of one kind, a folder, the name of a hub data
            set (``name``, ``name:config`` or ``name:config:split``; the split is "train" if not said; ``name`` may be a
            folder), or "python-docs", text that is always there. None if a Python object is given instead.
        beside: Another source that is mixed in, such as text that the teacher wrote. None mixes nothing in.
        beside_share: The part of the training sequences that come from it. Of both sources as many are used, spread evenly,
            as make the largest mixture of that share.
        validation: Another source; or what is held out of the training source: a fraction (a float between 0 and 1) or a
            number of sequences; or None.
        validation_limit: At most so many validation sequences, spread evenly, unless their number was given. None means
            no limit.
        text_column: The column that holds text or chats, unless the data has ``input_ids``; where there is no column text,
            chats in ``messages``. Chats go through the tokenizer's chat template.
        context: Tokens of a sequence.
        packing: Join rows and cut them into full sequences. False keeps every row apart: padded to ``context``, longer
            ones cut (the report says how many); ``labels`` and ``attention_mask`` are kept either way.
        streaming: Read data sets, folders and files as they are needed, from their beginning, instead of tokenizing all
            of them at first. Python objects are what they are: an IterableDataset is streamed.
        shuffle: False keeps the order of the data.
        shuffle_buffer: Sequences that a stream is shuffled among. It holds all of them in memory, and as many are read
            again on resuming.
        max_tokens: Use at most so many tokens of the data, over and over: of a table spread evenly over it, of a stream
            the first ones.
        seed: Chooses the orders.

    Raises:
        SparsepassError: If a value is out of range.
    """

    source: str | tuple[str, ...] | None = None
    beside: str | tuple[str, ...] | None = None
    beside_share: float = 0.5
    validation: str | tuple[str, ...] | int | float | None = 0.02
    validation_limit: int | None = 256
    text_column: str = "text"
    context: int = 512
    packing: bool = True
    streaming: bool = False
    shuffle: bool = True
    shuffle_buffer: int = 4096
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("source", "beside", "validation"):
            if isinstance(getattr(self, name), list):  # as a recipe file gives it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("context", "shuffle_buffer", "validation_limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SparsepassError(f"data: {name} has to be at least 1, and {value} was given")
        if not 0 < self.beside_share < 1:
            raise SparsepassError(
                f"data: beside_share is the part of the sequences that come from beside, between 0 and 1, and "
                f"{self.beside_share} was given; to train on that source alone, make it the source"
            )
        if self.beside is not None and (self.streaming or not self.packing):
            raise SparsepassError(
                "data: a source is mixed in (beside) where all is tokenized at first and packed: leave streaming and packing as"
                " they are by default, or mix the files yourself"
            )
        held_out = self.validation
        if isinstance(held_out, float) and not 0 < held_out < 1:
            raise SparsepassError(
                f"data: validation as a fraction has to lie between 0 and 1, and {held_out} was given; a number of sequences "
                "is a whole number, and None means no validation"
            )
        if isinstance(held_out, int) and (held_out is True or held_out is False or held_out < 1):
            raise SparsepassError(
                f"data: validation as a number of sequences has to be at least 1, and {held_out} was given; None means no "
                "validation"
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


def open_source(given: object, config: DataConfig, what: str) -> Source:
    """Find and open what the user names or brings.

    Args:
        given: One of the forms in ``FORMS``.
        config: Tells whether hub data sets, folders and files are streamed, and which column holds text.
        what: "training data" or "validation data", for messages.

    Raises:
        SparsepassError: If it is of no known form, missing, empty, or cannot be read.
    """
    import datasets

    if isinstance(given, (str, Path)):
        return _from_name(str(given), config, what)
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
        return _from_files([str(name) for name in given], config, what)
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


def _from_name(name: str, config: DataConfig, what: str) -> Source:
    import datasets

    if name == PYTHON_DOCS:
        return Source(name=name, kind="text", keys=frozenset({name}), texts=(name,))
    path = locate(name, what=what, forms=FORMS)
    if path is not None and not path.is_dir():
        return _from_files([name], config, what)
    if path is not None and (texts := _texts_in(path)):
        keys = frozenset(texts)
        return Source(name=name, kind=f"folder of {len(texts)} text files", keys=keys, texts=tuple(texts))
    data = load_data_set(name, what=what, streaming=config.streaming)
    place, part, split = data_set_name(name)
    place = str(Path(place).resolve()) if Path(place).is_dir() else place
    keys = frozenset({f"{place}:{part or 'default'}:{split}"})
    kind = "streamed data set" if isinstance(data, datasets.IterableDataset) else "data set"
    return Source(name=name, kind=kind, keys=keys, data=data)


def _texts_in(folder: Path) -> list[str]:
    """Return a folder's text files if it holds no data beside them: `datasets` would read each line as a document."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if any(path.suffix in (".jsonl", ".json", ".parquet", ".csv", ".arrow", ".py") for path in files):
        return []
    return [str(path.resolve()) for path in files if path.suffix in TEXT_SUFFIXES[1:] and path.stat().st_size]


def _from_files(names: list[str], config: DataConfig, what: str) -> Source:
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
        data = _rows_of_files(files, config)
    except RecordError as error:
        raise SparsepassError(f"{what} {label} could not be read as {kind}: {error}") from error
    return Source(name=label, kind=f"{kind} files", keys=frozenset(files), data=data)


def _rows_of_files(files: list[str], config: DataConfig) -> Any:
    """Open .jsonl or .parquet files as a data set; of their columns the ones that training reads, if there are any.

    Raises:
        RecordError: If a file is damaged, or files have other columns than the first one.
    """
    import datasets

    wanted = (config.text_column, IDS, LABELS, MASK)
    found = [next(records(file), None) for file in files]
    columns: tuple[str, ...] = ()
    for file, row in zip(files, found, strict=True):
        if row is None:
            continue
        here = tuple(name for name in row if name in wanted)
        if not here and config.text_column == TEXT_COLUMN and CHAT_COLUMN in row:
            here = (CHAT_COLUMN,)
        here = here or tuple(row)
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
    if config.streaming:
        return datasets.IterableDataset.from_generator(_file_rows, gen_kwargs=options)
    schema = arrow_schema(files[0], columns)
    features = None if schema is None else datasets.Features.from_arrow_schema(schema)
    try:
        return datasets.Dataset.from_generator(_file_rows, features=features, gen_kwargs=options)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if not isinstance(cause, RecordError):
            cause = RecordError(f"{type(cause).__name__}: {first_line(cause)}")
        raise cause from error


def _file_rows(
    files: list[str], stamps: list[Any], columns: tuple[str, ...], absent: tuple[str, ...]
) -> Iterator[Mapping[str, Any]]:
    for file in files:
        yield from records(file, columns=columns, absent=absent)
