"""From a saved program to a retrained one in a folder of its own: what `sparsepass retrain` and a recipe have in common."""

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from torch import nn

from sparsepass.export.report import (
    OF_FILES,
    ReportDocument,
    find_report,
    new_report,
    plain_json,
    retraining_run,
    run_record,
    write_report,
)
from sparsepass.export.stages.perplexities import Measured, accuracy
from sparsepass.export.stages.preparing import stage_name
from sparsepass.export.stages.recipe import RetrainSection, check_named, check_retrain, is_cached
from sparsepass.export.stages.settings import Evaluation, ModelSource, inputs_of
from sparsepass.graph import Program, SparsepassError
from sparsepass.graph.limits import position_limit
from sparsepass.graph.load import LoadedModel, save_companions
from sparsepass.graph.packed_folder import FOR_INFERENCE, is_packed_module
from sparsepass.graph.saved import PROGRAM_FILE
from sparsepass.graph.support import (
    NON_FINITE,
    check_apart,
    check_free,
    check_writable,
    path_named,
    read_object,
    replaced_folder,
    write_text,
)
from sparsepass.retrain.config import RetrainConfig
from sparsepass.retrain.data import TrainingData, open_data
from sparsepass.retrain.grids import check_quantize
from sparsepass.retrain.loop import retrain
from sparsepass.retrain.masks import check_method
from sparsepass.retrain.restart import program_of_checkpoint
from sparsepass.retrain.run import (
    CHECKPOINTS,
    METRICS,
    Checkpoints,
    is_first_process,
    leave_processes,
    local_device,
    read_metrics,
    trains_on_processor,
)
from sparsepass.retrain.teacher import Teacher, offline_teacher, sample_to_file

ORIGIN_FILE: Final = "origin.json"
"""In a run folder: the program and the teacher that its checkpoints belong to."""

_LOG = logging.getLogger(__name__)
_WAIT_SECONDS: Final = 0.5


def retrain_program(
    source: str | Path,
    section: RetrainSection,
    out: str | Path,
    *,
    run_folder: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    from_checkpoint: str | Path | None = None,
    evaluation: Evaluation | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
    progress: bool = True,
    device: str | None = None,
) -> dict[str, Any]:
    """Retrain a saved program and write it with tokenizer, recipe and report.

    Run by every process of `accelerate launch`; the first one writes.

    Args:
        source: Folder that `sparsepass prune` (or this) wrote.
        section: Settings, data and teacher. Without a teacher, the model that the program's report names.
        out: Folder to write.
        run_folder: Where checkpoints and ``metrics.jsonl`` go; by default beside ``out``, as ``out.run``. It stays, so that an
            interrupted run goes on from there.
        resume: See `retrain`.
        from_checkpoint: Run folder, or a checkpoint in it, of an earlier run of this program, whose weights and masks the
            training starts from instead; its settings may differ.
        evaluation: If given, perplexity is measured of the teacher, before and after.
        force: Whether a folder that stands at ``out`` is replaced.
        trust_remote_code: See `load_model`.
        command: The command line, for the report.
        progress: Whether to show a progress line.
        device: Where to train and to measure; see `trains_on_processor`.

    Returns:
        The report, as written.

    Raises:
        SparsepassError: If something cannot be read or does not fit; ``out`` is as it was then.
        TrainingStoppedError: If a signal asked to stop; the same call goes on later.
    """
    started = time.perf_counter()
    inputs = inputs_of(source, evaluation, section.inputs, from_checkpoint)
    check_free(out, force=force, inputs=inputs)
    if evaluation is not None:
        evaluation.check()
    check_retrain(section, "retrain")
    trains_on_processor(device)
    check_named(section, trust_remote_code, from_checkpoint)
    place = Path(run_folder) if run_folder is not None else default_run_folder(out)
    check_writable(place, inputs=inputs_of(source, section.teacher))
    _check_cache(section, source)
    if place.resolve().is_relative_to(Path(out).resolve()):
        raise SparsepassError(f"the run folder {place} lies in the output {out}, which is replaced as a whole; choose another")
    loaded = ModelSource(source=str(source), dtype="float32").load()
    document = find_report(source) or new_report()
    program = _program(loaded, source)
    if from_checkpoint is not None:
        if Path(from_checkpoint).resolve().is_relative_to(place.resolve()):
            raise SparsepassError(
                f"{from_checkpoint} lies in the run folder of this run, which would go on with its own settings; choose "
                "another output or run folder"
            )
        program, note = program_of_checkpoint(program, from_checkpoint, inplace=True)
        lost = section.train.behind != "original"
        _LOG.info("%s", note + ("; set train.behind=original to keep what stands behind the masks, too" if lost else ""))
    check_method(program, section.train.method)
    check_quantize(bool(program.quantized), section.train.quantize)
    source_of_teacher = _source_of_teacher(section, document, trust_remote_code)
    if source_of_teacher is not None:
        check_apart(out, [source_of_teacher.source])
        if not is_cached(section):
            source_of_teacher.check()
    before = stage_name(program)
    teacher_name = source_of_teacher.source if source_of_teacher else None
    if is_first_process():
        _check_origin(place, Path(source), teacher_name, section, resume, device)
    section = _with_sampled_text(
        section, place, document, trust_remote_code=trust_remote_code, progress=progress, device=device
    )
    _LOG.info("opening the data")
    data = _data(section, loaded, program)
    teacher = _teacher(section, source_of_teacher, data, device)
    _LOG.info("training")
    trained, document = retrain_and_report(
        program,
        teacher,
        data,
        section.train,
        document,
        teacher_name=teacher_name,
        run_folder=place,
        resume=resume,
        progress=progress,
        device=device,
    )
    del teacher
    leave_processes()
    if not is_first_process():
        return document
    trained.to("cpu")
    if evaluation is not None:
        # Everything is loaded again: training changed the one program, and may have sharded the teacher.
        dense: list[tuple[str, Measured]] = [("dense", source_of_teacher)] if source_of_teacher else []
        pruned = ModelSource(source=str(source), trust_remote_code=trust_remote_code)
        entries = [*dense, (before, pruned), (stage_name(trained), trained)]
        document["accuracy"] = accuracy(
            entries,
            evaluation,
            loaded.tokenizer,
            known=document.get("accuracy"),
            device=device,
        )
    _LOG.info("writing %s", out)
    with replaced_folder(out, force=force, inputs=inputs) as staging:
        trained.save_into(staging)
        save_companions(staging, tokenizer=loaded.tokenizer, processor=loaded.processor, source=loaded.folder)
        record = run_record("retrain", command=command, seconds=time.perf_counter() - started)
        document["runs"] = [*document["runs"], record]
        return write_report(staging, document)


def retrain_and_report(
    program: Program,
    teacher: nn.Module | Teacher | None,
    data: TrainingData,
    config: RetrainConfig,
    document: Mapping[str, Any],
    *,
    teacher_name: str | None = None,
    run_folder: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    progress: bool = True,
    device: str | None = None,
) -> tuple[Program, dict[str, Any]]:
    """Retrain a program in place, and add the run to a report.

    Args:
        program: See `retrain`; it is changed.
        teacher: See `retrain`.
        data: See `retrain`.
        config: See `retrain`.
        document: The report so far, such as `Prepared.document`.
        teacher_name: What the report calls the teacher.
        run_folder: See `retrain`; without one the report has no curve of the loss.
        resume: See `retrain`.
        progress: See `retrain`.
        device: See `retrain`.

    Returns:
        The retrained program, and the report with the run in its section ``retraining``. What it said of written files
        and of accuracy stays with the program as it was, so files are left out, and accuracy is the caller's to measure anew.

    Raises:
        SparsepassError: See `retrain`.
    """
    how: dict[str, Any] = {"run_folder": run_folder, "resume": resume, "progress": progress, "device": device}
    trained = retrain(program, teacher, data, config, inplace=True, **how)
    found = {name: part for name, part in document.items() if name not in OF_FILES}
    record = dict(trained.retraining[-1])
    if teacher_name is not None:
        record["teacher"] = {**record["teacher"], "source": teacher_name}
    metrics = [] if run_folder is None else read_metrics(Path(run_folder) / METRICS)
    runs = [*found.get("retraining", {}).get("runs", []), retraining_run(record, metrics)]
    return trained, found | {"recipe": trained.recipe, "retraining": {"runs": runs}}


def write_cache(
    source: str | Path,
    section: RetrainSection,
    run_folder: str | Path,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> int:
    """Write the offline teacher's logits, or what is missing of them, and do not train.

    Args:
        source: See `retrain_program`.
        section: See `retrain_program`.
        run_folder: Of the training that follows; what the teacher samples for it lies there.
        trust_remote_code: See `load_model`.
        device: See `retrain`.

    Returns:
        Sequences that the run takes, all of which are there now.

    Raises:
        SparsepassError: If no folder is named, or something cannot be read or does not fit.
    """
    if section.teacher_cache is None:
        raise SparsepassError("no folder is named for the teacher's logits; give teacher_cache=FOLDER")
    trains_on_processor(device)
    check_named(section, trust_remote_code)
    check_writable(run_folder)
    loaded = ModelSource(source=str(source), dtype="float32").load()
    program = _program(loaded, source)
    document = find_report(source) or new_report()
    found = _source_of_teacher(section, document, trust_remote_code)
    _check_cache(section, source, found)
    section = _with_sampled_text(section, Path(run_folder), document, trust_remote_code=trust_remote_code, device=device)
    data = _data(section, loaded, program)
    _teacher(section, found, data, device)
    return section.train.num_steps(section.data.context) * section.train.batch_size


def default_run_folder(out: str | Path) -> Path:
    """The run folder beside an output folder.

    >>> default_run_folder("here/out").name
    'out.run'
    """
    target = Path(out)
    return target.with_name(f"{target.name}.run")


def clear_run_folder(run_folder: Path) -> None:
    """Remove what a training left in its run folder, but not the text that was sampled for it, which a new one may take."""
    for name in (CHECKPOINTS, METRICS, ORIGIN_FILE):
        found = run_folder / name
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def _check_cache(section: RetrainSection, *inputs: str | Path | ModelSource | None) -> None:
    """Make sure that the teacher's logits are written to no place that something else is read from."""
    if section.teacher_cache is not None:
        data = section.data
        read = inputs_of(*inputs, section.teacher, data.source, data.beside, data.validation)
        check_writable(section.teacher_cache, inputs=read)


def _program(loaded: LoadedModel, source: str | Path) -> Program:
    if any(is_packed_module(module) for module in loaded.model.modules()):
        raise SparsepassError(f"{source} is packed: {FOR_INFERENCE}")
    if loaded.program is None:
        raise SparsepassError(
            f"{source} is no saved program; write one with `sparsepass prune {source} -o pruned/`, and retrain that"
        )
    return loaded.program


def _source_of_teacher(section: RetrainSection, document: Mapping[str, Any], trust_remote_code: bool) -> ModelSource | None:
    if not section.train.kd_weight and not section.train.hidden_weight:
        return None
    return _dense_source(section, document, trust_remote_code)


def _dense_source(section: RetrainSection, document: Mapping[str, Any], trust_remote_code: bool) -> ModelSource:
    how: dict[str, Any] = {"dtype": section.teacher_dtype, "trust_remote_code": trust_remote_code}
    if section.teacher is not None:
        return ModelSource(source=section.teacher, **how)
    model = ReportDocument.parse(document).model
    is_file = model is not None and model.kind in ("folder", "gguf")
    if model is not None and is_file and not is_cached(section) and path_named(model.source) is None:
        raise SparsepassError(
            f"the report beside the program says that it was made from {model.source}, and nothing is there (from "
            f"{Path.cwd()}); name the dense model with teacher=..."
        )
    if model is not None and model.kind in ("folder", "hub", "gguf"):
        return ModelSource(source=model.source, gguf_file=model.gguf_file, revision=model.revision, **how)
    raise SparsepassError(
        "the report beside the program does not tell which dense model it was made from; name it with teacher=..., "
        "or set kd_weight: 0 and no sample to train on the text alone"
    )


def _with_sampled_text(
    section: RetrainSection,
    run_folder: Path,
    document: Mapping[str, Any],
    *,
    trust_remote_code: bool,
    progress: bool = True,
    device: str | None = None,
) -> RetrainSection:
    """The section with what the dense model was asked to write as ``data.beside``; the first process writes it, if need be."""
    if section.sample is None:
        return section
    dense = _dense_source(section, document, trust_remote_code)
    about = {"name": dense.source, "gguf_file": dense.gguf_file, "revision": dense.revision}
    path = run_folder / section.sample.file_name(json.dumps(about))
    if is_first_process() and not path.is_file():
        _LOG.info("sampling %d tokens of %s", section.sample.num_tokens, dense.source)
        loaded = dense.load()
        if loaded.tokenizer is None:
            raise SparsepassError(f"{dense.source} has no tokenizer, and sampled text is written as text too; leave sample out")
        model = loaded.model.to(local_device(device))
        run_folder.mkdir(parents=True, exist_ok=True)
        sample_to_file(model, loaded.tokenizer, path, section.sample, progress=progress)
    while not path.is_file():  # if the first process fails, the launcher ends this one
        time.sleep(_WAIT_SECONDS)
    return dataclasses.replace(section, data=dataclasses.replace(section.data, beside=str(path)), sample=None)


def _teacher(
    section: RetrainSection, source: ModelSource | None, data: TrainingData, device: str | None
) -> nn.Module | Teacher | None:
    if source is None:
        return None

    def model() -> nn.Module:
        return source.load().model.to(local_device(device))

    if section.teacher_cache is None:
        return model()
    about = {"teacher": source.source, "data": json.dumps(dataclasses.asdict(section.data), sort_keys=True)}
    return offline_teacher(section.teacher_cache, model, data, section.train, k=section.teacher_k, about=about, device=device)


def _check_origin(
    run_folder: Path,
    source: Path,
    teacher: str | None,
    section: RetrainSection,
    resume: Literal["auto", "never"],
    device: str | None,
) -> None:
    """Refuse to go on from checkpoints of another program (same layers, other weights) or of other settings.

    The file program.json tells programs apart: it holds what each pass did and measured. Settings are compared with the
    checkpoint's again when it is read; here that costs no sampled text and no loaded teacher.
    """
    config = section.train.resolve(local_device(device))
    settings = {f"train.{name}": plain_json(value) for name, value in config.computed.items()}
    found = {"program": hashlib.sha256((source / PROGRAM_FILE).read_bytes()).hexdigest(), "teacher": teacher} | settings
    path = run_folder / ORIGIN_FILE
    if Checkpoints(run_folder / CHECKPOINTS).newest() is not None:
        if resume == "never":
            raise SparsepassError(f"{run_folder} holds checkpoints of an earlier run; resume it, or give another run folder")
        there = read_object(path, allowed=NON_FINITE, advice="remove it to go on") if path.is_file() else {}
        if changed := [name for name in found if name in there and there[name] != found[name]]:
            raise SparsepassError(
                f"{run_folder} belongs to a run with another {' and another '.join(changed)}; give another run folder, or "
                "remove this one to start anew"
            )
        return
    run_folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found) + "\n")


def _data(section: RetrainSection, loaded: LoadedModel, program: Program) -> TrainingData:
    config = program.origin.config or {}
    vocab_size = config.get("vocab_size")
    return open_data(section.data, loaded.tokenizer, vocab_size=vocab_size, max_context=position_limit(config))
