"""One table of criteria: what each makes of a model, with what error, in what time and memory, on the same calibration."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsepass.export.report import markdown_table
from sparsepass.export.stages.preparing import PYTHON_DOCS, Evaluation, Tell, silent
from sparsepass.graph import SparsepassError
from sparsepass.graph.support import nearest, write_text
from sparsepass.passes.criteria import CRITERIA
from sparsepass.passes.maths import NMPattern
from sparsepass.passes.table import parse_pipeline, pipeline_to_text

SCHEMA = 1
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class CriteriaSettings:
    """What all rows have in common.

    Attributes:
        model: What `load_model` takes: folder, hub id, .gguf file.
        calibration: Path of a text file, name of a data set, or ``python-docs``.
        eval_text: Path of a text file, or ``python-docs``.
        num_sequences: Calibration sequences.
        context: Tokens in a calibration sequence.
        eval_context: Tokens in an evaluation window.
        max_tokens: Tokens of the evaluation text used at most.
        seed: Where in the calibration data the sequences lie.
        compute: Precision of the calibration's matmuls.
        dtype: Type in which the weights are loaded.
        gguf_file: Name of the .gguf file, if the model's folder holds several.
        revision: Branch, tag or commit on the hub.
    """

    model: str
    calibration: str
    eval_text: str
    num_sequences: int = 128
    context: int | None = None
    eval_context: int = 512
    max_tokens: int | None = None
    seed: int = 0
    compute: str = "auto"
    dtype: str | None = None
    gguf_file: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row to be measured.

    Attributes:
        name: What the table calls it.
        passes: The pipeline as text; empty for the dense model.
    """

    name: str
    passes: str


def jobs_of(
    criteria: Sequence[str] = (), *, pattern: str = "2:4", reconstruct: bool = False, pipelines: Iterable[str] = ()
) -> list[Job]:
    """The rows of a table: one for each criterion, each again with reconstruction, and one for each further pipeline.

    Args:
        criteria: Names from the table of criteria; all of them if empty.
        pattern: N:M.
        reconstruct: Whether each criterion has a second row with block-wise reconstruction after it.
        pipelines: Further rows, as pipeline text.

    Raises:
        SparsepassError: If a criterion or pass is unknown, or a row is there twice.

    Example:
        >>> [job.name for job in jobs_of(["wanda"], reconstruct=True)]
        ['wanda', 'wanda + reconstruct']
    """
    NMPattern.parse(pattern)
    jobs = []
    for name in criteria or list(CRITERIA):
        if name not in CRITERIA:
            raise SparsepassError(f"unknown criterion {name!r}{nearest(name, list(CRITERIA))}")
        passes = f"nm_sparsify{{pattern={pattern},criterion={name}}}"
        jobs.append(Job(name=name, passes=passes))
        if reconstruct:
            jobs.append(Job(name=f"{name} + reconstruct", passes=f"{passes},reconstruct"))
    for text in pipelines:
        parse_pipeline(text)
        jobs.append(Job(name=text, passes=text))
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SparsepassError(f"the row {twice[0]!r} is there twice; name each criterion and pipeline once")
    return jobs


def criteria_table(
    settings: CriteriaSettings,
    jobs: Sequence[Job],
    *,
    work: Path | None = None,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Measure the dense model and every job, each in a process of its own, so that its peak memory is its own.

    Args:
        settings: What the rows have in common.
        jobs: The rows, from `jobs_of`.
        work: Folder where each finished row is kept; a row that is there is not measured again. By default a temporary one.
        tell: Called with a line when a row begins, with the time that is left, and when it ends.

    Returns:
        The table as JSON: settings, machine, versions, and the rows, the dense one first.

    Raises:
        SparsepassError: If the texts are not there, ``work`` holds rows of other settings, or a row fails. Finished rows stay
            in ``work``.
    """
    Evaluation(text=settings.eval_text).check()
    common = asdict(settings) | {"digests": _digests(settings), "schema": SCHEMA}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sparsepass-criteria-") if work is None else nullcontext(str(work)) as folder:
        place = Path(folder)
        _claim(place, common)
        queue = [Job(name=DENSE, passes=""), *jobs]
        left = [job for job in queue if not _row_file(place, job).is_file()]
        spent: list[float] = []
        for number, job in enumerate(queue, start=1):
            if job in left:
                remaining = len(left) - len(spent)
                estimate = f", about {_time(sum(spent) / len(spent) * remaining)} left" if len(spent) > 1 else ""
                tell(f"row {number} of {len(queue)}: {job.name}{estimate}")
                started = time.perf_counter()
                _measure(settings, job, _row_file(place, job))
                spent.append(time.perf_counter() - started)
            row = json.loads(_row_file(place, job).read_text(encoding="utf-8"))
            rows.append(row | {"times_dense": row["perplexity"] / rows[0]["perplexity"] if rows else 1.0})
            tell(f"{job.name}: perplexity {row['perplexity']:.2f}")
    return {
        "schema": SCHEMA,
        "settings": common,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {rows[0]['threads']} threads",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }


def criteria_page(document: dict[str, Any]) -> str:
    """The table as Markdown."""
    settings, rows = document["settings"], document["rows"]
    context = f" of {settings['context']} tokens" if settings["context"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    head = [
        f"Model: {_name(settings['model'])}. Calibration: {_name(settings['calibration'])}, at most "
        f"{settings['num_sequences']} sequences{context}. Evaluation: {_name(settings['eval_text'])}, "
        f"{rows[0]['num_tokens']} tokens scored, context {settings['eval_context']}, no overlap, {rows[0]['eval_dtype']}.",
        f"Machine: {document['machine']}. {versions}. {document['date']}. Each row ran in a process of its own. Error: "
        "relative error of the model's outputs on the first calibration sequences. Memory: peak of the process while the "
        "passes ran, the model included. Time: the passes alone; of this run, and no claim.",
        "",
    ]
    cells = [
        (
            row["name"],
            f"{row['perplexity']:.2f}",
            f"{row['times_dense']:.2f}",
            "" if row["relative_error"] is None else f"{row['relative_error']:.3f}",
            "" if row["kl"] is None else f"{row['kl']:.3f}",
            row["num_sparse"],
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        )
        for row in rows
    ]
    headings = ("passes", "perplexity", "times dense", "error", "KL", "layers", "seconds", "GiB")
    return "\n".join([*head, markdown_table(headings, cells), ""])


def _measure(settings: CriteriaSettings, job: Job, out: Path) -> None:
    """Measure one row in a child process, which writes it to a file."""
    request = {"settings": asdict(settings), "job": asdict(job)}
    command = [sys.executable, "-P", "-m", "sparsepass.export.stages.criteria_child", json.dumps(request), str(out)]
    quiet = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=os.environ | quiet, check=False)
    error = out.with_suffix(".error")
    if error.is_file():
        message = error.read_text(encoding="utf-8")
        error.unlink()
        raise SparsepassError(f"{job.name}: {message}")
    if done.returncode or not out.is_file():
        cause = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
        hint = "; signal 9 is most often a lack of memory" if done.returncode == -9 else ""
        raise SparsepassError(f"{job.name}: the process that measured it {cause}{hint}; what it said stands above")


def _claim(place: Path, common: dict[str, Any]) -> None:
    """Make sure that the rows in a folder are of these settings."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "settings.json"
    if not file.is_file():
        write_text(file, json.dumps(common, indent=1) + "\n")
        return
    known = json.loads(file.read_text(encoding="utf-8"))
    for name, value in common.items():
        if known.get(name) != value:
            raise SparsepassError(
                f"{place} holds rows measured with {name} {known.get(name)!r}, and this run has {value!r}; rows compare only "
                "at the same settings: choose another folder for --work, or give the same settings"
            )


def _row_file(place: Path, job: Job) -> Path:
    """Where a row is kept; its name tells the pipeline with all its options, so that a changed default is measured anew."""
    full = pipeline_to_text(parse_pipeline(job.passes)) if job.passes else DENSE
    word = re.sub(r"[^\w]+", "_", job.name).strip("_")[:60]
    return place / f"{word}-{hashlib.sha256(full.encode()).hexdigest()[:12]}.json"


def _digests(settings: CriteriaSettings) -> dict[str, str]:
    """Digests of the texts that are files."""
    found = {}
    for which in ("calibration", "eval_text"):
        path = Path(getattr(settings, which))
        if path.is_file():
            with path.open("rb") as file:
                found[which] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _name(text: str) -> str:
    return "Python's documentation topics" if text == PYTHON_DOCS else Path(text).name


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
