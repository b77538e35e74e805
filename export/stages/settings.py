"""Settings that Python, recipe files and the command line share: which model, calibrated on what, measured on what.

Nothing heavy is imported up here: the command line makes its options of these classes, and `--help` has to come at once.
"""

import logging
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparsepass.graph.load import LoadedModel
    from sparsepass.graph.perplexity import Perplexity

_EVALUATION_FORMS = (
    "a text file (.txt, .jsonl, .parquet), a data set folder or hub data set name (name:config:split), or python-docs for the "
    "text that is always there"
)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model, and how it is loaded.

    Attributes:
        source: Folder, hub id, .gguf file, or folder written by `sparsepass prune`.
        dtype: Load the weights as float32, bfloat16 or float16; by default as they are stored.
        task: What the model is for, such as text-generation; by default its configuration tells.
        gguf_file: Name of the .gguf file, if the folder holds several.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let code that comes with the checkpoint run. Off unless you ask for it.
    """

    source: str
    dtype: str | None = None
    task: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise unless the model is there and can be loaded as is asked, without loading it; see `check_model`."""
        from sparsepass.graph.load import check_model, parse_dtype

        if self.dtype is not None:
            parse_dtype(self.dtype)
        check_model(self.source, gguf_file=self.gguf_file, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load(self, device: "torch.device | str | None" = None) -> "LoadedModel":
        """Load it; see `load_model` for what can go wrong."""
        from sparsepass.graph.load import load_model

        _LOG.info("loading %s", self.source)
        return load_model(**asdict(self), device=device)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What passes are calibrated on. The fields are those of `apply_passes`, and ``data`` may be all that it takes.

    Attributes:
        data: Text file (.txt, .jsonl, .parquet), data set folder or hub data set name (name:config:split), or 'python-docs'
            for text that is always there. nm_sparsify prunes by SparseGPT with it, by magnitude without. A tuple of names is
            several files, which give as many sequences each.
        num_sequences: Calibration sequences to use at most.
        context: Tokens in a calibration sequence; by default 2048 or the model's limit.
        batch_size: Calibration sequences at once: memory and speed only.
        seed: Chooses where in the calibration data the sequences lie.
        text_column: Column of calibration rows that holds text; by default text, or else chats in messages.
        compute: Precision of calibration's matmuls; auto is bfloat16 where the processor computes in it.
    """

    data: Any = None
    num_sequences: int | None = 128
    context: int | None = None
    batch_size: int = 8
    seed: int = 0
    text_column: str | None = None
    compute: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    @property
    def is_python_docs(self) -> bool:
        """Whether the data is the text that is always there."""
        return _is_python_docs(self.data)

    def check(self, what: str = "calibration") -> None:
        """Raise unless a file that is named can be read, before anything expensive runs. What is not named is not looked at.

        Args:
            what: What it is called in a message.

        Raises:
            SparsepassError: If it does not exist, is of another kind, is empty or lacks the column that is named, or a number
                is too small.
        """
        from sparsepass.graph.support import SparsepassError
        from sparsepass.graph.texts import check_text_file, path_kind
        from sparsepass.passes.data import LONGEST_NAME, locate

        for name in ("num_sequences", "context", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SparsepassError(f"{name} has to be at least 1, and {value} was given")
        if isinstance(self.data, tuple):
            for name in self.data:
                replace(self, data=Path(name)).check(what)
            return
        text = str(self.data) if isinstance(self.data, Path) else self.data
        if not isinstance(text, str) or self.is_python_docs or "\n" in text or len(text) > LONGEST_NAME:
            return
        forms = "a text file (.txt, .jsonl, .parquet), a folder, the name of a hub data set, or python-docs"
        path = locate(text, what=what, forms=forms)
        kind = None if path is None else path_kind(path, text, what=what, forms=forms)
        if path is not None and kind != "folder":
            if not path.stat().st_size:
                raise SparsepassError(f"{what} file {text} is empty; name one that holds text")
            if self.text_column is not None:
                check_text_file(path, what, column=self.text_column)

    def keywords(self) -> dict[str, Any]:
        """The same as keywords of `apply_passes`, with the text that a name stands for."""
        from sparsepass.passes.data import default_text

        data = default_text("calibration") if self.is_python_docs else self.data
        if isinstance(data, tuple):
            data = [Path(name) for name in data]
        return {"calibration": data, **{name: value for name, value in vars(self).items() if name != "data"}}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How perplexity is measured. The fields are those of `perplexity`; ``text`` may be token ids, too.

    Attributes:
        text: Text file (.txt, .jsonl, .parquet), data set folder or hub data set name (name:config:split), or 'python-docs' for
            text that is always there. A tuple of names is several, of which as many tokens each are taken.
        context: Tokens in an evaluation window.
        stride: Tokens by which the window moves on; by default all of it.
        bos: Begin each window with the BOS token; by default as the tokenizer does.
        max_tokens: Use only so many tokens of the evaluation text.
        text_column: Column of evaluation rows that holds text; by default text, or else chats in messages.
        batch_size: Windows at once: speed only.
    """

    text: Any
    context: int = 512
    stride: int | None = None
    bos: bool | None = None
    max_tokens: int | None = None
    text_column: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.text, list):
            object.__setattr__(self, "text", self.text[0] if len(self.text) == 1 else tuple(self.text))

    @property
    def name(self) -> str:
        """What the report calls the text."""
        if isinstance(self.text, tuple):
            return ", ".join(replace(self, text=one).name for one in self.text)
        if _is_python_docs(self.text):
            return "Python's documentation topics (evaluation part)"
        return str(self.text) if isinstance(self.text, str | Path) else f"{self.text.numel()} token ids"

    def each(self) -> "tuple[Evaluation, ...]":
        """How each of several texts is measured by itself, on its share of the tokens.

        Example:
            >>> [(one.text, one.max_tokens) for one in Evaluation(text=["a.txt", "b.txt"], max_tokens=4096).each()]
            [('a.txt', 2048), ('b.txt', 2048)]
        """
        texts = self.text if isinstance(self.text, tuple) else (self.text,)
        share = None if self.max_tokens is None else self.max_tokens // len(texts)
        return tuple(replace(self, text=one, max_tokens=share) for one in texts)

    def check(self) -> None:
        """Raise unless the text is there and can be read, before anything expensive runs.

        Raises:
            SparsepassError: If the file does not exist, is of another kind, or lacks the text column. Data sets are not looked
                at before they are read.
        """
        from sparsepass.graph.perplexity import check_settings
        from sparsepass.graph.support import SparsepassError
        from sparsepass.graph.texts import check_text_file

        check_settings(context=self.context, stride=self.stride, batch_size=self.batch_size, max_tokens=self.max_tokens)
        if isinstance(self.text, tuple):
            if not self.text:
                raise SparsepassError(f"there is no evaluation text; name {_EVALUATION_FORMS}")
            if self.max_tokens is not None and self.max_tokens < len(self.text):
                raise SparsepassError(
                    f"max_tokens is {self.max_tokens}, and there are {len(self.text)} evaluation texts; one each at least"
                )
            for one in self.text:
                replace(self, text=one).check()
            return
        if not isinstance(self.text, str | Path) or _is_python_docs(self.text):
            return
        place = self._path()
        if place is not None and not place.is_dir():
            check_text_file(place, "evaluation text", column=self.text_column)

    def _path(self) -> Path | None:
        """Where the text lies; None for the name of a data set."""
        from sparsepass.passes.data import locate

        return locate(str(self.text), what="evaluation text", forms=_EVALUATION_FORMS)

    def content(self) -> Any:
        """What `perplexity` takes: the text that is always there, the path of a file, rows of a data set, or token ids."""
        from sparsepass.graph.texts import Rows
        from sparsepass.passes.data import default_text, load_data_set

        if isinstance(self.text, tuple):
            return tuple(replace(self, text=one).content() for one in self.text)
        if _is_python_docs(self.text):
            return default_text("evaluation")
        if not isinstance(self.text, str | Path):
            return self.text
        place = self._path()
        if place is not None and not place.is_dir():
            return place
        name = str(self.text)
        return Rows(name=name, rows=load_data_set(name, what="evaluation text", streaming=True))

    def measure(self, model: "nn.Module", tokenizer: Any, device: "torch.device | str | None" = None) -> "Perplexity":
        """Measure a model or program.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            device: See `perplexity`.

        Raises:
            SparsepassError: If the text is not there, or cannot be used.
        """
        from sparsepass.graph.perplexity import perplexity
        from sparsepass.graph.support import count_progress

        self.check()
        with count_progress("perplexity") as progress:
            how = vars(self) | {"text": self.content(), "device": device, "progress": progress}
            return perplexity(model, tokenizer=tokenizer, **how)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What a benchmark measures.

    Attributes:
        batches: Sequences at once.
        prompt_tokens: Tokens of each prompt that is decoded from.
        new_tokens: Tokens to decode for each of them, after the first.
        prefill_tokens: Tokens of the prompt that prefill is timed on; as many as a forward pass gets of a model that does not
            generate.
        repeats: Timed runs of each measurement, after one that does not count. Medians are shown.
        threads: Threads to compute with; by default torch's own number.
        device: Where to compute, such as cpu or cuda.
        memory: By default memory is measured too, in a process of its own for each model; with --no-memory it is not.

    Raises:
        SparsepassError: If a number is too small.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 32
    new_tokens: int = 32
    prefill_tokens: int = 512
    repeats: int = 5
    threads: int | None = None
    device: str = "cpu"
    memory: bool = True

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if type(value) is int}
        numbers["batches"] = min(self.batches, default=0)
        for name, value in numbers.items():
            if value < 1:
                from sparsepass.graph.support import SparsepassError

                raise SparsepassError(f"{name} of a benchmark is {value}; expected at least 1")


def inputs_of(*settings: Any) -> tuple[str, ...]:
    """What is read by these settings, as far as they name files and folders: no output may be one of them.

    Args:
        settings: Models, texts and data as they are given here; passes and targets, whose options may name files; paths; None.

    Example:
        >>> inputs_of(ModelSource(source="model"), Evaluation(text="held.txt"), None)
        ('model', 'held.txt')
    """
    found: list[str] = []
    for each in settings:
        if isinstance(each, str | Path):
            found.append(str(each))
        elif isinstance(each, tuple | list):
            found += inputs_of(*each)
        elif isinstance(each, ModelSource):
            found.append(each.source)
        elif isinstance(each, Calibration):
            found += inputs_of(each.data)
        elif isinstance(each, Evaluation):
            found += inputs_of(each.text)
        elif is_dataclass(each) and not isinstance(each, type):
            named = [value for value in vars(each).values() if isinstance(value, str | Path) and Path(value).is_file()]
            found += inputs_of(*named)
    return tuple(found)


def _is_python_docs(text: Any) -> bool:
    from sparsepass.passes.data import PYTHON_DOCS

    return isinstance(text, str) and text == PYTHON_DOCS
