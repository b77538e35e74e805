"""One table of criteria: what each makes of a model, with what error, in what time and memory, on the same calibration."""

import hashlib
import json
import logging
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter

from sparsepass.export.report import markdown_table
from sparsepass.export.stages.settings import Calibration, Evaluation, ModelSource
from sparsepass.graph import SparsepassError
from sparsepass.graph.support import NON_FINITE, check_as, find_device, nearest, read_object, write_text
from sparsepass.passes import apply_passes
from sparsepass.passes.criteria import criteria_table as criteria_table_of_passes
from sparsepass.passes.data import PYTHON_DOCS
from sparsepass.passes.maths import NMPattern
from sparsepass.passes.table import parse_pipeline, pipeline_to_text

# Ctrl-C reaches all processes of a terminal. The parent ends this one, and tells it in one line.
_CHILD = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
_CHILD += "from sparsepass.export.stages.criteria import measure_to_file as m; sys.exit(m(*sys.argv[1:]))"
_LOG = logging.getLogger(__name__)

SCHEMA = 1
CRITERIA_TITLE: Final = "# Criteria\n"
"""How the table begins in a file of its own."""
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class CriteriaSettings:
    """What all rows have in common.

    Attributes:
        model: The model.
        calibration: What is pruned on.
        evaluation: What perplexity is measured on.
        device: Where all is computed; see `find_device`.
    """

    model: ModelSource
    calibration: Calibration
    evaluation: Evaluation
    device: str = "cpu"

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "CriteriaSettings":
        """The settings that `dataclasses.asdict` made plain values of."""
        data = plain["calibration"]["data"]
        several = {"data": tuple(data)} if isinstance(data, list) else {}  # as JSON gives them
        return cls(
            model=ModelSource(**plain["model"]),
            calibration=Calibration(**plain["calibration"] | several),
            evaluation=Evaluation(**plain["evaluation"]),
            device=plain["device"],
        )

    def to_dict(self) -> dict[str, Any]:
        """All that a row depends on, as JSON."""
        found = asdict(self.evaluation) | asdict(self.calibration) | asdict(self.model)
        for name in ("text", "data", "source", "batch_size", "trust_remote_code", "text_column"):
            del found[name]
        # Where none is named, rows are those of the time before there were any to name.
        columns = {"text_column": self.calibration.text_column, "eval_text_column": self.evaluation.text_column}
        found |= {name: column for name, column in columns.items() if column is not None}
        if (place := find_device(self.device)).type != "cpu":
            found["device"] = place.type
        given = {"calibration": self.calibration.data, "eval_text": self.evaluation.text}
        named = {name: list(one) if isinstance(one, tuple) else one for name, one in given.items()}
        named["model"] = self.model.source
        return named | {"eval_context": self.evaluation.context} | found


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What the table shows of a row."""

    name: str
    perplexity: float
    by_text: dict[str, float] = field(default_factory=dict)
    relative_error: float | None
    kl: float | None
    num_sparse: int
    num_tokens: int
    eval_dtype: str
    threads: int
    seconds: float
    peak_bytes: int


_ROW: Final = TypeAdapter(_Row)


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
        criteria: Names from the table of criteria, those of other packages included; all of them if empty.
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
    known = criteria_table_of_passes()
    for name in criteria or list(known):
        if name not in known:
            raise SparsepassError(f"unknown criterion {name!r}{nearest(name, list(known))}")
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
) -> dict[str, Any]:
    """Measure the dense model and every job, each in a process of its own, so that its peak memory is its own.

    Args:
        settings: What the rows have in common.
        jobs: The rows, from `jobs_of`.
        work: Folder where each finished row is kept; a row that is there is not measured again. By default a temporary one.

    Returns:
        The table as JSON: settings, machine, versions, and the rows, the dense one first.

    Raises:
        SparsepassError: If the texts are not there, ``work`` holds rows of other settings, or a row fails. Finished rows stay
            in ``work``.
    """
    settings.evaluation.check()
    settings.calibration.check()
    settings.model.check()
    find_device(settings.device)
    common = settings.to_dict() | {"digests": _digests(settings), "schema": SCHEMA}
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
                _LOG.info("row %d of %d: %s%s", number, len(queue), job.name, estimate)
                started = time.perf_counter()
                _measure(settings, job, _row_file(place, job))
                spent.append(time.perf_counter() - started)
            row = _read_row(_row_file(place, job))
            rows.append(row | {"times_dense": row["perplexity"] / rows[0]["perplexity"] if rows else 1.0})
            _LOG.info("%s: perplexity %.2f", job.name, row["perplexity"])
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
    facts, headings, cells = criteria_rows(document)
    return "\n".join([*facts, "", markdown_table(headings, cells), ""])


def criteria_rows(document: dict[str, Any]) -> tuple[list[str], tuple[str, ...], list[tuple[Any, ...]]]:
    """What a page and the terminal show: sentences on how it was measured, headings, and rows."""
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
    ]
    texts = list(rows[0].get("by_text", {}))
    texts = texts if len(texts) > 1 else []
    cells = [
        (
            row["name"],
            f"{row['perplexity']:.2f}",
            *(f"{row['by_text'][text]:.2f}" for text in texts),
            f"{row['times_dense']:.2f}",
            "" if row["relative_error"] is None else f"{row['relative_error']:.3f}",
            "" if row["kl"] is None else f"{row['kl']:.3f}",
            row["num_sparse"],
            f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        )
        for row in rows
    ]
    headings = ("passes", "perplexity", *map(_name, texts), "times dense", "error", "KL", "layers", "seconds", "GiB")
    return head, headings, cells


def is_criteria_file(path: Path) -> bool:
    """Whether a file is a table that `sparsepass criteria` wrote, as Markdown or JSON."""
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if text.startswith("{") else None
    except (OSError, ValueError, RecursionError):
        return False
    return text.startswith(CRITERIA_TITLE) or (isinstance(document, dict) and {"schema", "settings", "rows"} <= document.keys())


def _measure(settings: CriteriaSettings, job: Job, out: Path) -> None:
    """Measure one row in a child process, which writes it to a file."""
    request = {"settings": asdict(settings), "job": asdict(job)}
    command = [sys.executable, "-P", "-c", _CHILD, json.dumps(request), str(out)]
    quiet = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, env=os.environ | quiet, check=False)
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
    known = read_object(file, allowed=NON_FINITE, advice="remove the folder, or choose another")
    for name, value in common.items():
        if known.get(name) != value:
            raise SparsepassError(
                f"{place} holds rows measured with {name} {known.get(name)!r}, and this run has {value!r}; rows compare only "
                "at the same settings: choose another folder with work=..., or give the same settings"
            )


def _read_row(file: Path) -> dict[str, Any]:
    """A row that was measured; what the page shows of it is checked."""
    advice = "remove it, and it is measured anew"
    row = read_object(file, allowed=NON_FINITE, advice=advice)
    check_as(_ROW, row, str(file), advice=advice)
    return row


def _row_file(place: Path, job: Job) -> Path:
    """Where a row is kept; its name tells the pipeline with all its options, so that a changed default is measured anew."""
    full = pipeline_to_text(parse_pipeline(job.passes)) if job.passes else DENSE
    word = re.sub(r"[^\w]+", "_", job.name).strip("_")[:60]
    return place / f"{word}-{hashlib.sha256(full.encode()).hexdigest()[:12]}.json"


def _digests(settings: CriteriaSettings) -> dict[str, str]:
    """Digests of the texts that are files."""
    found = {}
    for which in ("calibration", "eval_text"):
        named = settings.to_dict()[which]
        digests = [_digest(Path(name)) for name in (named if isinstance(named, list) else [named])]
        if any(digests):
            found[which] = " ".join(digests)
    return found


def _digest(path: Path) -> str:
    """Of a file; nothing for what is none, such as the name of a data set."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(text: str | list[str]) -> str:
    if isinstance(text, list):
        return ", ".join(map(_name, text))
    return "Python's documentation topics" if text == PYTHON_DOCS else Path(text).name


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def measure_to_file(request: str, out: str) -> int:
    """Measure the row that a request asks for and write it, or what went wrong: what the child process runs."""
    asked = json.loads(request)
    try:
        row = measure(CriteriaSettings.of(asked["settings"]), Job(**asked["job"]))
    except SparsepassError as error:
        Path(out).with_suffix(".error").write_text(str(error), encoding="utf-8")
        return 2
    write_text(Path(out), json.dumps(row, indent=1) + "\n")
    return 0


def measure(settings: CriteriaSettings, job: Job) -> dict[str, Any]:
    """One row: the passes applied, and the perplexity of what they made."""
    loaded, device = settings.model.load(), find_device(settings.device)
    model: torch.nn.Module = loaded.model
    facts: dict[str, Any] = {"passes": "", "num_sparse": 0, "relative_error": None, "kl": None, "calibration": None}
    seconds = 0.0
    if job.passes:
        pipeline = parse_pipeline(job.passes)
        started = time.perf_counter()
        model = program = apply_passes(
            loaded.model,
            pipeline,
            tokenizer=loaded.tokenizer,
            inplace=True,
            device=device,
            **settings.calibration.keywords(),
        )
        seconds = time.perf_counter() - started
        facts |= {"passes": program.recipe, "num_sparse": program.report().num_sparse}
        facts["calibration"] = next((dict(record.calibration) for record in program.history if record.calibration), None)
        if program.history[-1].validation is not None:
            facts |= {name: program.history[-1].validation[name] for name in ("relative_error", "kl")}
    peak_bytes = _peak_bytes(device)
    found = {one.name: one.measure(model, loaded.tokenizer, device) for one in settings.evaluation.each()}
    num_tokens = sum(one.num_tokens for one in found.values())
    return {
        "name": job.name,
        **facts,
        "perplexity": math.exp(sum(one.nll_mean * one.num_tokens for one in found.values()) / num_tokens),
        "by_text": {name: one.value for name, one in found.items()},
        "num_tokens": num_tokens,
        "eval_dtype": next(iter(found.values())).dtype,
        "seconds": seconds,
        "eval_seconds": sum(one.seconds for one in found.values()),
        "peak_bytes": peak_bytes,
        "threads": torch.get_num_threads(),
    }


def _peak_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: of the GPU where that computes, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
