"""From what a user names to a rewritten program and the report so far: what `prune` and `export` have in common."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsepass.export.report import (
    OF_FILES,
    AccuracySection,
    PassEntry,
    PassesSection,
    ReportDocument,
    find_report,
    layer_sparsity,
    measurement,
    new_report,
    plain_json,
    run_record,
    write_report,
)
from sparsepass.graph import Program, SparsepassError, capture
from sparsepass.graph.load import LoadedModel, load_model, parse_dtype
from sparsepass.graph.perplexity import Perplexity, perplexity
from sparsepass.graph.rewrite import without_branches
from sparsepass.graph.support import replaced_folder
from sparsepass.passes import Pass, apply_passes, parse_pipeline
from sparsepass.passes.data import default_text
from sparsepass.passes.engine import ComputeDtype

Tell = Callable[[str], None]
"""Takes one line of news for a user who waits."""

PYTHON_DOCS = "python-docs"
"""Name that stands for the text that is always there: Python's own documentation topics."""


def silent(_: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What passes are calibrated on. The fields are those of `apply_passes`.

    Attributes:
        data: Whatever `apply_passes` takes, or ``"python-docs"``; None for passes that need none.
        num_sequences: Sequences used at most.
        context: Tokens in a sequence made from text; None for 2048 or the model's limit.
        batch_size: Sequences run at once.
        seed: Where in the data the sequences are taken.
        compute: Precision of the calibration's matmuls.
    """

    data: Any = None
    num_sequences: int | None = 128
    context: int | None = None
    batch_size: int = 8
    seed: int = 0
    compute: ComputeDtype = "auto"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How perplexity is measured. The fields are those of `perplexity`.

    Attributes:
        text: Path of a text file, token ids, or ``"python-docs"``.
        context: Tokens in a window.
        stride: Tokens by which it moves on; None for windows that do not overlap.
        bos: Whether windows begin with BOS; None for what the tokenizer does.
        max_tokens: Tokens of the text used at most.
    """

    text: str | Path | Tensor
    context: int = 512
    stride: int | None = None
    bos: bool | None = None
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """What the report calls the text."""
        if isinstance(self.text, Tensor):
            return f"{self.text.numel()} token ids"
        if self.text == PYTHON_DOCS:
            return "Python's documentation topics (evaluation part)"
        return str(self.text)

    def check(self) -> None:
        """Raise unless the text is there, before anything expensive runs.

        Raises:
            SparsepassError: If the file does not exist.
        """
        if not isinstance(self.text, Tensor) and self.text != PYTHON_DOCS and not Path(self.text).is_file():
            raise SparsepassError(
                f"evaluation text {self.text} does not exist; name a UTF-8 text file, or {PYTHON_DOCS} for the text "
                "that is always there"
            )

    def measure(self, model: nn.Module, tokenizer: Any) -> Perplexity:
        """Measure a model or program."""
        self.check()
        return perplexity(
            model,
            self.text if isinstance(self.text, Tensor) else evaluation_text(self.text),
            tokenizer,
            context=self.context,
            stride=self.stride,
            bos=self.bos,
            max_tokens=self.max_tokens,
        )


def evaluation_text(name: str | Path) -> str | Path:
    """What `perplexity` takes for a name: the text that is always there, or the path of a file."""
    return default_text("evaluation") if name == PYTHON_DOCS else Path(name)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A program that is ready to be written.

    Attributes:
        program: The rewritten program.
        loaded: What it was made from, with tokenizer and processor.
        document: The report so far: recipe, model, passes, accuracy.
        started: When it began, by `time.perf_counter`.
    """

    program: Program
    loaded: LoadedModel
    document: dict[str, Any] = field(repr=False)
    started: float

    def save_companions(self, folder: Path) -> None:
        """Write tokenizer and processor into a folder."""
        if self.loaded.processor is not None:
            self.loaded.processor.save_pretrained(folder)
        if self.loaded.tokenizer is not None:
            self.loaded.tokenizer.save_pretrained(folder)


def prepare(
    source: "str | Path | nn.Module | LoadedModel",
    *,
    passes: "str | Pass | Iterable[str | Pass] | None",
    calibration: Calibration | None = None,
    evaluation: Evaluation | None = None,
    tokenizer: Any = None,
    dtype: "torch.dtype | str | None" = None,
    task: str | None = None,
    example_inputs: Any = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    validate: bool = True,
    progress: bool | None = None,
    tell: Tell = silent,
) -> Prepared:
    """Load a model, rewrite it, and begin the report (or go on with the one of an earlier stage).

    Args:
        source: See `load_model`; or what it returned.
        passes: See `apply_passes`; None or empty for none.
        calibration: What the passes are calibrated on.
        evaluation: If given, perplexity is measured before and after (and with SLoRB branches switched off, if there are any).
        tokenizer: Stands in for the one beside the model.
        dtype: Type in which the model is loaded.
        task: See `load_model`.
        example_inputs: What to capture the model with.
        gguf_file: See `load_model`.
        revision: See `load_model`.
        trust_remote_code: See `load_model`.
        validate: See `apply_passes`.
        progress: See `apply_passes`.
        tell: Called with one line at the beginning of each step.

    Returns:
        The program and the report. A model in memory is left as it was.

    Raises:
        SparsepassError: See `load_model`, `apply_passes` and `perplexity`.
    """
    started = time.perf_counter()
    pipeline = parse_pipeline(passes) if passes else ()
    settings = calibration or Calibration()
    uses_python_docs = isinstance(settings.data, str) and settings.data == PYTHON_DOCS
    if evaluation is not None:
        evaluation.check()
    if isinstance(source, LoadedModel):
        loaded = source
    else:
        if not isinstance(source, nn.Module):
            tell(f"loading {source}")
        options = {"gguf_file": gguf_file, "revision": revision, "trust_remote_code": trust_remote_code}
        loaded = load_model(source, dtype=None if dtype is None else parse_dtype(dtype), task=task, **options)  # type: ignore[arg-type]
    if tokenizer is not None:
        loaded = replace(loaded, tokenizer=tokenizer)
    document = _earlier(loaded) or new_report()
    document.setdefault("model", plain_json(loaded.provenance))
    known = ReportDocument.parse(document).passes
    measured = []
    before = loaded.program
    if evaluation is not None and pipeline:
        tell(f"measuring perplexity on {evaluation.name}")
        name = "dense" if before is None or not before.sparse else "before these passes"
        measured.append(measurement(name, evaluation.measure(loaded.model, loaded.tokenizer)))
    # Nobody else holds a model that was loaded here, so its memory is taken over.
    inplace = loaded.kind != "memory" and not isinstance(source, nn.Module | LoadedModel)
    if pipeline:
        tell(f"applying {', '.join(item.name for item in pipeline)}")
        program = apply_passes(
            loaded.model,
            pipeline,
            calibration=default_text("calibration") if uses_python_docs else settings.data,
            tokenizer=loaded.tokenizer,
            num_sequences=settings.num_sequences,
            context=settings.context,
            batch_size=settings.batch_size,
            seed=settings.seed,
            compute=settings.compute,
            example_inputs=example_inputs,
            inplace=inplace,
            validate=validate,
            progress=progress,
        )
    else:
        program = before or capture(loaded.model, example_inputs, inplace=inplace)
    document["recipe"] = program.recipe
    section = PassesSection.model_validate(plain_json(program.report().to_dict() | {"layers": layer_sparsity(program)}))
    _keep_names(section.passes, known.passes if known is not None else ())
    if pipeline:
        document.pop("accuracy", None)
        if uses_python_docs:
            _name_text(section.passes[-len(pipeline) :])
    document["passes"] = plain_json(section)
    if evaluation is not None:
        tell("measuring perplexity again")
        if any(state.branch is not None for state in program.sparse.values()):
            with without_branches(program):
                found = evaluation.measure(program, loaded.tokenizer)
            measured.append(measurement(f"{patterns(program)}, SLoRB switched off", found))
        measured.append(measurement(stage_name(program), evaluation.measure(program, loaded.tokenizer)))
        document["accuracy"] = plain_json(AccuracySection(text=evaluation.name, measurements=measured))
    return Prepared(program=program, loaded=loaded, document=document, started=started)


def write_program(prepared: Prepared, out: str | Path, *, command: str | None = None, force: bool = False) -> dict[str, Any]:
    """Save a prepared program with tokenizer, recipe and report: what `sparsepass prune` writes.

    Args:
        prepared: From `prepare`.
        out: Folder to write.
        command: The command line, for the report.
        force: Whether a folder that stands at ``out`` is replaced.

    Returns:
        The report, as written.

    Raises:
        SparsepassError: If ``out`` is not free.
    """
    with replaced_folder(out, force=force) as staging:
        prepared.program.save_into(staging)
        prepared.save_companions(staging)
        record = run_record("prune", command=command, seconds=time.perf_counter() - prepared.started)
        return write_report(staging, prepared.document | {"runs": [*prepared.document["runs"], record]})


def stage_name(program: Program) -> str:
    """What a row of figures calls a program: ``dense``, ``2:4``, ``2:4 + SLoRB``, ``2:4, retrained``."""
    branch = " + SLoRB" if any(state.branch is not None for state in program.sparse.values()) else ""
    times = len(program.retraining)
    trained = "" if not times else ", retrained" if times == 1 else f", retrained {times} times"
    return patterns(program) + branch + trained


def patterns(program: Program) -> str:
    """The patterns of a program's weights, such as ``2:4``; ``dense`` if there are none."""
    return "/".join(sorted({state.pattern for state in program.sparse.values()})) or "dense"


def _earlier(loaded: LoadedModel) -> dict[str, Any] | None:
    """The report beside a saved program, without what it says of files that stay behind."""
    if loaded.kind != "program" or not Path(loaded.source).is_dir():
        return None
    document = find_report(loaded.source)
    if document is None:
        return None
    return {name: section for name, section in document.items() if name not in OF_FILES}


def _keep_names(records: Iterable[PassEntry], known: Iterable[PassEntry]) -> None:
    """Give the texts of earlier passes the names from the earlier report; a program does not know them."""
    for record, earlier in zip(records, known, strict=False):
        if record.text == earlier.text and record.calibration and earlier.calibration:
            record.calibration.source = earlier.calibration.source


def _name_text(records: Iterable[PassEntry]) -> None:
    for record in records:
        if record.calibration:
            record.calibration.source = "Python's documentation topics (calibration part)"
