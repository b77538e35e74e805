"""Running a recipe: its stages one after the other, each in a folder of its own, and only those that are not done yet.

Rules:
1. A stage is done when its folder was moved into place and ``stages.json`` says so, with the same settings and after the same
   stages. It is not run again then.
2. A stage that was interrupted is run again; a training goes on from its checkpoints.
3. Where settings have changed, or a folder is gone, that is said, and nothing runs unless it is forced: then the stage and all
   that follow it are run anew.
4. What was exported is measured last. That stage has no folder of its own: it adds to the report of a target.
5. Of several processes (``accelerate launch``) the first one runs everything, and the others take part in the training.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from sparsepass.export.report import find_report, new_report, plain_json, read_report, run_record, write_report
from sparsepass.export.stages.exporting import export
from sparsepass.export.stages.measuring import measure_export
from sparsepass.export.stages.perplexities import Measured, accuracy
from sparsepass.export.stages.preparing import prepare, stage_name, write_program
from sparsepass.export.stages.recipe import ExportSection, Recipe, check_named
from sparsepass.export.stages.retraining import clear_run_folder, default_run_folder, retrain_program
from sparsepass.export.stages.settings import ModelSource, inputs_of
from sparsepass.export.stages.stage_records import (
    Stage,
    changes,
    forget_stage,
    is_done,
    read_records,
    record_stage,
    recorded_state,
)
from sparsepass.export.targets import State
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import alone_in, check_apart, check_free, check_writable, replaced_folder
from sparsepass.passes import parse_pipeline
from sparsepass.retrain.run import is_first_process, trains_on_processor

_LOG = logging.getLogger(__name__)
_WAIT_SECONDS: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a stage.

    Attributes:
        name: The stage's.
        folder: Its output.
        ran: Whether it was run now; otherwise it was done already.
        state: What verification came to; None where nothing was verified.
        seconds: How long it took, when it ran.
    """

    name: str
    folder: Path
    ran: bool
    state: State | None
    seconds: float


def run_recipe(
    recipe: Recipe,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
    device: str | None = None,
) -> list[Outcome]:
    """Run a recipe's stages, or what of them is not done yet.

    Args:
        recipe: From `read_recipe`.
        force: Whether stages whose settings have changed, and those after them, are run anew.
        trust_remote_code: See `load_model`.
        command: The command line, for the reports.
        device: Where stages compute; see `trains_on_processor`. It is no setting: on another one a run goes on.

    Returns:
        What became of each stage; empty in all processes but the first.

    Raises:
        SparsepassError: If settings have changed and ``force`` is false, or a stage cannot be run. Stages before it stay.
        TrainingStoppedError: If a signal asked to stop; the same call goes on later.

    Example:
        >>> from sparsepass.export.stages.recipe import read_recipe
        >>> run_recipe(read_recipe("smollm2-cpu", out="out"))  # doctest: +SKIP
    """
    trains_on_processor(device)
    stages = stages_of(recipe, trust_remote_code=trust_remote_code, command=command, device=device)
    if not is_first_process():
        _take_part(recipe.out, stages)
        return []
    _check_all(recipe, trust_remote_code)
    with alone_in(recipe.out):
        _make_ready(recipe.out, stages, force=force)
        outcomes = []
        for stage in stages:
            known = read_records(recipe.out).get(stage.name, {})
            if is_done(stage, known):
                _LOG.info("%s is done: %s", stage.name, stage.folder)
                outcomes.append(
                    Outcome(
                        name=stage.name, folder=stage.folder, ran=False, state=recorded_state(known), seconds=known["seconds"]
                    )
                )
                continue
            started = time.perf_counter()
            record_stage(recipe.out, stage, done=False)
            _LOG.info("stage %s", stage.name)
            state = stage.run()
            seconds = round(time.perf_counter() - started, 1)
            record_stage(recipe.out, stage, done=True, state=state, seconds=seconds)
            outcomes.append(Outcome(name=stage.name, folder=stage.folder, ran=True, state=state, seconds=seconds))
    return outcomes


def stages_of(
    recipe: Recipe, *, trust_remote_code: bool = False, command: str | None = None, device: str | None = None
) -> list[Stage]:
    """The stages of a recipe, in the order in which they run.

    Args:
        recipe: From `read_recipe`.
        trust_remote_code: See `load_model`.
        command: See `run_recipe`.
        device: See `run_recipe`.

    Example:
        >>> from sparsepass.export.stages.recipe import read_recipe
        >>> [stage.name for stage in stages_of(read_recipe("smollm2-cpu"))]
        ['prune', 'retrain', 'eval', 'export.onnx']
    """
    return list(_Stages(recipe, trust_remote_code, command, device).all())


def planned(recipe: Recipe, *, trust_remote_code: bool = False, device: str | None = None) -> list[str]:
    """What `run_recipe` would do with each stage, one line a stage; nothing is run.

    Args:
        recipe: From `read_recipe`.
        trust_remote_code: See `load_model`.
        device: See `run_recipe`.

    Raises:
        SparsepassError: Where `run_recipe` would refuse before it begins, other than for settings that have changed.

    Example:
        >>> from sparsepass.export.stages.recipe import read_recipe
        >>> planned(read_recipe("smollm2-cpu", out="nowhere"))[0]  # doctest: +SKIP
        'prune: to be run, into nowhere/pruned'
    """
    trains_on_processor(device)
    _check_all(recipe, trust_remote_code)
    known = read_records(recipe.out)
    lines, stale = [], False
    for stage in stages_of(recipe):
        if stage.name not in known and not stage.adds:
            check_free(stage.folder)
        record = known.get(stage.name, {})
        found = changes(stage, record)
        stale = stale or bool(found)
        if is_done(stage, record):
            said = f"done, in {stage.folder}"
        elif stale and record:
            said = f"to be run anew with --force ({'; '.join(found) or 'what comes before it has changed'})"
        else:
            said = f"to be {'gone on with' if record else 'run'}, into {stage.folder}"
        lines.append(f"{stage.name}: {said}")
    return lines


def _check_all(recipe: Recipe, trust_remote_code: bool = False) -> None:
    """Refuse what this machine cannot do for want of a model, a package or a place, before anything runs."""
    replace(recipe.model, trust_remote_code=trust_remote_code).check()
    if recipe.retrain is not None:
        check_named(recipe.retrain, trust_remote_code)
    for section in recipe.export:
        section.target.check_here()
    if recipe.measure is not None:
        recipe.measure.check_here(trust_remote_code)
    check_writable(recipe.out)
    for stage in stages_of(recipe):
        check_apart(stage.folder, _read_by(recipe))


def _read_by(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe reads that lies outside of it."""
    prune, retrain = recipe.prune, recipe.retrain
    found = inputs_of(recipe.model, recipe.eval, *(section.target for section in recipe.export))
    found += inputs_of(None if recipe.measure is None else recipe.measure.against)
    if prune is not None:
        found += inputs_of(prune.calibration, parse_pipeline(prune.passes))
    if retrain is not None:
        found += retrain.inputs
    return found


class _Stages:
    """Makes the stages of one recipe. Final."""

    def __init__(self, recipe: Recipe, trust_remote_code: bool, command: str | None, device: str | None) -> None:
        self._recipe, self._trust, self._command, self._device = recipe, trust_remote_code, command, device
        self._model = replace(recipe.model, dtype=recipe.dtype, trust_remote_code=trust_remote_code)
        self._programs = [] if recipe.prune else [Path(recipe.model.source).expanduser()]
        self._programs += [recipe.out / "pruned"] if recipe.prune else []
        self._programs += [recipe.out / "retrained"] if recipe.retrain else []

    def all(self) -> Iterator[Stage]:
        recipe, after = self._recipe, ""
        model = asdict(recipe.model)
        del model["trust_remote_code"]
        if recipe.prune is not None:
            settings = _named({"model": model, "dtype": recipe.dtype} | recipe.prune.settings)
            stage = Stage(name="prune", folder=recipe.out / "pruned", settings=settings, after=after, run=self._prune)
            yield stage
            after = stage.fingerprint
        if recipe.retrain is not None:
            settings = {} if recipe.prune else {"model": model}
            settings |= plain_json(asdict(recipe.retrain))
            settings["train"] = plain_json(recipe.retrain.train.computed)
            stage = Stage(
                name="retrain", folder=recipe.out / "retrained", settings=settings, after=after, run=self._retrain, shared=True
            )
            yield stage
            after = stage.fingerprint
        if recipe.eval is not None:
            settings = _named(asdict(recipe.eval))
            del settings["batch_size"]  # changes no figure
            stage = Stage(name="eval", folder=recipe.out / "eval", settings=settings, after=after, run=self._eval)
            yield stage
            after = stage.fingerprint
        exports = [
            Stage(
                name=f"export.{section.target.name}",
                folder=recipe.out / section.target.name,
                settings=plain_json(section.settings),
                after=after,
                run=lambda section=section: self._export(section),  # type: ignore[misc]
            )
            for section in recipe.export
        ]
        yield from exports
        if recipe.measure is not None:
            yield Stage(
                name="measure",
                folder=recipe.out / recipe.measure.target,
                settings=plain_json(asdict(recipe.measure)),
                after=" ".join(stage.fingerprint for stage in exports),
                run=self._measure,
                adds=True,
            )

    def _prune(self) -> None:
        section = self._recipe.prune
        assert section is not None
        prepared = prepare(
            self._model,
            passes=section.passes,
            calibration=section.calibration,
            validate=section.validate,
            device=self._device,
        )
        write_program(prepared, self._recipe.out / "pruned", command=self._command, force=True)

    def _retrain(self) -> None:
        section = self._recipe.retrain
        assert section is not None
        retrain_program(
            self._programs[-2],
            section,
            self._programs[-1],
            force=True,
            trust_remote_code=self._trust,
            command=self._command,
            device=self._device,
        )

    def _eval(self) -> None:
        section, started = self._recipe.eval, time.perf_counter()
        assert section is not None
        tokenizer = ModelSource(source=str(self._programs[-1])).load().tokenizer
        is_program = (Path(self._recipe.model.source).expanduser() / PROGRAM_FILE).is_file()
        entries: list[tuple[str, Measured]] = [] if is_program else [("dense", self._model)]
        entries += [
            (stage_name(Program.load(folder)), ModelSource(source=str(folder), trust_remote_code=self._trust))
            for folder in self._programs
        ]
        document = find_report(self._programs[-1]) or new_report()
        document["accuracy"] = accuracy(entries, section, tokenizer, device=self._device)
        record = run_record("eval", command=self._command, seconds=time.perf_counter() - started)
        document["runs"] = [*document["runs"], record]
        with replaced_folder(self._recipe.out / "eval", force=True) as staging:
            write_report(staging, document)

    def _export(self, section: ExportSection) -> State | None:
        sections = {}
        if self._recipe.eval is not None:
            sections["accuracy"] = read_report(self._recipe.out / "eval")["accuracy"]
        result = export(
            str(self._programs[-1]),
            section.target,
            self._recipe.out / section.target.name,
            verify=section.verify,
            force=True,
            trust_remote_code=self._trust,
            sections=sections,
            command=self._command,
        )
        return result.state if section.verify else None

    def _measure(self) -> None:
        section = self._recipe.measure
        assert section is not None
        measure_export(
            self._recipe.out / section.target,
            section,
            replace(self._recipe.model, trust_remote_code=self._trust),
            [self._recipe.out / one.target.name for one in self._recipe.export],
            program=self._programs[-1],
            command=self._command,
        )


def _take_part(out: Path, stages: Sequence[Stage]) -> None:
    """Wait for what the first process does before the training, and take part in that.

    If the first process fails, the launcher ends this one.
    """
    for stage in stages:
        if stage.shared:
            if not is_done(stage, read_records(out).get(stage.name, {})):
                stage.run()
            return
        while not is_done(stage, read_records(out).get(stage.name, {})):
            time.sleep(_WAIT_SECONDS)


def _make_ready(out: Path, stages: Sequence[Stage], *, force: bool) -> None:
    """Refuse what cannot be gone on with, or remove it if that is wanted, before anything runs."""
    known = read_records(out)
    found = [changes(stage, known.get(stage.name, {})) for stage in stages]
    first = next((index for index, lines in enumerate(found) if lines), None)
    stale = [] if first is None else [stage for stage in stages[first:] if stage.name in known]
    if stale and not force:
        raise SparsepassError(
            f"since {out} was begun, this has changed: {'; '.join(line for lines in found for line in lines)}. Pass "
            f"force=True to run {', '.join(stage.name for stage in stale)} anew, or choose another out"
        )
    for stage in stale:
        _LOG.info("%s is run anew", stage.name)
        forget_stage(out, stage.name)
        if stage.shared:
            clear_run_folder(default_run_folder(stage.folder))
    for stage in stages:
        if stage.name not in known and not stage.adds:
            check_free(stage.folder, force=force)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the column of texts where none is named: stages that were run before there was one to name stay done."""
    return {name: value for name, value in settings.items() if name != "text_column" or value is not None}
