"""From what a user names to a rewritten program and the report so far: what `prune` and `export` have in common."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

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
from sparsepass.export.stages.settings import Calibration, Evaluation, ModelSource, inputs_of
from sparsepass.graph import Program, capture
from sparsepass.graph.load import LoadedModel, load_model, save_companions
from sparsepass.graph.rewrite import without_branches
from sparsepass.graph.support import replaced_folder
from sparsepass.passes import Pass, apply_passes, parse_pipeline

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A program that is ready to be written.

    Attributes:
        program: The rewritten program.
        loaded: What it was made from, with tokenizer and processor.
        document: The report so far: recipe, model, passes, accuracy.
        started: When it began, by `time.perf_counter`.
        inputs: What was read, which no output may stand in for.
    """

    program: Program
    loaded: LoadedModel
    document: dict[str, Any] = field(repr=False)
    started: float
    inputs: tuple[str, ...] = ()

    def save_companions(self, folder: Path) -> None:
        """Write tokenizer and processor into a folder, and copy what else goes with the model: its licence, say."""
        loaded = self.loaded
        save_companions(folder, tokenizer=loaded.tokenizer, processor=loaded.processor, source=loaded.folder)


def prepare(
    source: "ModelSource | str | Path | nn.Module | LoadedModel",
    *,
    passes: "str | Pass | Iterable[str | Pass] | None",
    calibration: Calibration | None = None,
    evaluation: Evaluation | None = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    validate: bool = True,
    progress: bool | None = None,
) -> Prepared:
    """Load a model, rewrite it, and begin the report (or go on with the one of an earlier stage).

    Args:
        source: See `load_model`; or what it returned.
        passes: See `apply_passes`; None or empty for none.
        calibration: What the passes are calibrated on.
        evaluation: If given, perplexity is measured before and after (and with SLoRB branches switched off, if there are any).
        tokenizer: Stands in for the one beside the model.
        example_inputs: What to capture the model with.
        validate: See `apply_passes`.
        progress: See `apply_passes`.

    Returns:
        The program and the report. A model in memory is left as it was.

    Raises:
        SparsepassError: See `load_model`, `apply_passes` and `perplexity`.
    """
    started = time.perf_counter()
    pipeline = parse_pipeline(passes) if passes else ()
    settings = calibration or Calibration()
    settings.check()
    if evaluation is not None:
        evaluation.check()
    # Nobody else holds a model that is loaded here, so its memory is taken over.
    inplace = isinstance(source, str | Path | ModelSource)
    loaded = load(source)
    if tokenizer is not None:
        loaded = replace(loaded, tokenizer=tokenizer)
    document = _earlier(loaded) or new_report()
    document.setdefault("model", plain_json(loaded.provenance))
    known = ReportDocument.parse(document).passes
    measured = []
    before = loaded.program
    if evaluation is not None and pipeline:
        _LOG.info("measuring perplexity on %s", evaluation.name)
        name = "dense" if before is None or not before.sparse else "before these passes"
        measured.append(measurement(name, evaluation.measure(loaded.model, loaded.tokenizer)))
    if pipeline:
        _LOG.info("applying %s", ", ".join(item.name for item in pipeline))
        program = apply_passes(
            loaded.model,
            pipeline,
            tokenizer=loaded.tokenizer,
            example_inputs=example_inputs,
            inplace=inplace,
            validate=validate,
            progress=progress,
            **settings.keywords(),
        )
    else:
        program = before or capture(loaded.model, example_inputs, inplace=inplace)
    document["recipe"] = program.recipe
    section = PassesSection.model_validate(plain_json(program.report().to_dict() | {"layers": layer_sparsity(program)}))
    _keep_names(section.passes, known.passes if known is not None else ())
    if pipeline:
        document.pop("accuracy", None)
        if settings.is_python_docs:
            _name_text(section.passes[-len(pipeline) :])
    document["passes"] = plain_json(section)
    if evaluation is not None:
        _LOG.info("measuring perplexity again")
        if any(state.branch is not None for state in program.sparse.values()):
            with without_branches(program):
                found = evaluation.measure(program, loaded.tokenizer)
            measured.append(measurement(f"{patterns(program)}, SLoRB switched off", found))
        measured.append(measurement(stage_name(program), evaluation.measure(program, loaded.tokenizer)))
        document["accuracy"] = plain_json(AccuracySection(text=evaluation.name, measurements=measured))
    inputs = inputs_of(source, loaded.folder, settings, evaluation, pipeline)
    return Prepared(program=program, loaded=loaded, document=document, started=started, inputs=inputs)


def load(source: "ModelSource | str | Path | nn.Module | LoadedModel") -> LoadedModel:
    """Load a model that is named; what is in memory stays as it is."""
    if isinstance(source, LoadedModel):
        return source
    if isinstance(source, nn.Module):
        return load_model(source)
    return (source if isinstance(source, ModelSource) else ModelSource(source=str(source))).load()


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
        SparsepassError: If ``out`` is not free, or is an input.
    """
    with replaced_folder(out, force=force, inputs=prepared.inputs) as staging:
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
