"""report.json: what was done to a model, and how far it was verified, in a form that later stages add to.

The document is a JSON object with a header (schema, version, recipe, runs) and sections. Each stage adds the sections
it knows and leaves those of earlier stages as they are:

1. Adding a section, or a field to one, does not change the version: readers keep what they do not know.
2. Changing what a field means raises `SCHEMA_VERSION`. A reader refuses a newer version than its own.
3. `SECTIONS` is the one table: a section is a row here, a renderer in `report_page.py` and one in `report_html.py`, and a
   heading in docs/report.md.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from sparsepass.graph.support import SparsepassError

SCHEMA: Final = "sparsepass-report"
SCHEMA_VERSION: Final = 1
"""Version of the schema. It is raised when a field changes its meaning, not when one is added."""

REPORT_FILE, PAGE_FILE, HTML_FILE, RECIPE_FILE = "report.json", "report.md", "report.html", "recipe.txt"

_PACKAGES = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "peft", "safetensors", "numpy", "tensorrt",
    "tensorrt-rtx-cu13-bindings", "torch-tensorrt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a section: its type, and what it means.

    Attributes:
        kind: ``text``, ``integer``, ``number`` (which may be the text inf, -inf or nan), ``flag``, ``object`` or
            ``list``.
        meaning: One phrase for the documentation.
        optional: Whether it may be missing or null.
    """

    kind: str
    meaning: str
    optional: bool = False


HEADER: Final[Mapping[str, Field]] = {
    "schema": Field(kind="text", meaning=f"always `{SCHEMA}`"),
    "schema_version": Field(kind="integer", meaning=f"{SCHEMA_VERSION} today"),
    "recipe": Field(kind="text", meaning="the passes as one line of text, which `--passes` takes; empty if none ran"),
    "runs": Field(kind="list", meaning="one entry for each command that added to the report, in order"),
}
"""Fields of the document itself."""

RUN: Final[Mapping[str, Field]] = {
    "stage": Field(kind="text", meaning="`prune`, `retrain`, `eval`, `export`, `plan` or `verify` so far"),
    "command": Field(kind="text", meaning="the command line, or `python` for a call from Python"),
    "created": Field(kind="text", meaning="when it ended, ISO 8601, UTC"),
    "seconds": Field(kind="number", meaning="wall time, loading included"),
    "versions": Field(kind="object", meaning="sparsepass, Python and the libraries"),
    "machine": Field(kind="object", meaning="system, processor, cores, memory_bytes, accelerators"),
}
"""Fields of an entry of `runs`."""

SECTIONS: Final[Mapping[str, Mapping[str, Field]]] = {
    "model": {
        "source": Field(kind="text", meaning="what the user named: folder, hub id, file"),
        "kind": Field(kind="text", meaning="`folder`, `hub`, `gguf`, `program` or `memory`"),
        "class": Field(kind="text", meaning="the model's class", optional=True),
        "dtype": Field(kind="text", meaning="type of the weights as loaded"),
        "num_parameters": Field(kind="integer", meaning="parameters, tied ones counted once"),
    },
    "passes": {
        "num_sites": Field(kind="integer", meaning="linear layers found"),
        "num_sparse": Field(kind="integer", meaning="of these, how many are N:M sparse now"),
        "skipped": Field(kind="object", meaning="layer -> why it is not sparse; every layer that is not is in it"),
        "passes": Field(
            kind="list",
            meaning="one entry a pass: `text` (all options), `promise` (`exact` or `approximate`), `outcomes` "
            "(layer by layer, with reasons and measured facts), `validation` (how far the outputs moved), "
            "`calibration`, `seconds`",
        ),
        "layers": Field(
            kind="object",
            meaning="sparse layer -> `pattern`, `zeros` (counted share of zeros, as the passes left it), `branch_k`",
            optional=True,
        ),
    },
    "retraining": {
        "runs": Field(
            kind="list",
            meaning="one entry for each time the program was trained: `method`, `settings`, `num_steps`, `num_tokens`, "
            "`seconds`, `tokens_per_second`, `step_of_weights` (the step whose weights were kept), `teacher`, `data`, "
            "`validations`, `flips_since_first` (share of all mask entries of these weights that differ from the first mask), "
            "`flips_by_layer` (the same, weight by weight), `decided` and `kept_norm` (of learned masks), "
            "`curve` (column -> at most 200 values)",
        ),
    },
    "accuracy": {
        "text": Field(kind="text", meaning="name of the evaluation text"),
        "measurements": Field(
            kind="list",
            meaning="entries `name` (`dense`, `sparse`, ...), `perplexity`, `nll_mean`, `num_tokens`, `context`, "
            "`stride`, `bos`, `dtype`, `seconds`; all of one text and setting, so that they compare",
        ),
    },
    "artifact": {
        "target": Field(kind="text", meaning="`onnx`, `hf`, `tensorrt` or `torch` so far"),
        "files": Field(kind="object", meaning="file -> bytes, the evidence beside it left out"),
        "size_bytes": Field(kind="integer", meaning="sum of these"),
        "expected_sparse": Field(
            kind="object",
            meaning="file (empty: the folder) -> stored weight -> pattern; every other weight is dense on purpose",
        ),
        "axes": Field(
            kind="object",
            meaning="file -> stored weight -> axis along which the pattern runs, where the file does not tell",
            optional=True,
        ),
        "dtype": Field(kind="text", meaning="type of the written weights"),
        "notes": Field(kind="list", meaning="what a reader should know of the files"),
        "details": Field(kind="object", meaning="the target's own record"),
    },
    "sparsity": {
        "runtime": Field(
            kind="text",
            meaning="what built the engines: `tensorrt`, `tensorrt-rtx` or `torch-tensorrt`; `torch` where torch itself runs "
            "the layers",
        ),
        "runtime_version": Field(kind="text", meaning="its version"),
        "gpus": Field(kind="list", meaning="GPUs of the machine that built them; empty if it has none"),
        "engines": Field(
            kind="list",
            meaning="entries `name`, `file`, `log`, `graph`, `profiles`, `targets` (compute capabilities), `size_bytes`, "
            "`num_layers`, `seconds`, `flag_requested`, `num_eligible` and `num_chosen` (as the log counts)",
        ),
        "layers": Field(
            kind="list",
            meaning="one entry for each weight in each engine: `engine`, `layer`, `op`, `weight`, `shape`, `dtype`, `axis`; "
            "the states `conforms`, `flag_requested`, `eligible` and `chosen`, and what follows, `ran_sparse`, each `yes`, "
            "`no` or `unknown`; `reason`, `tactic`, `dense_ms`, `sparse_ms`",
        ),
        "counts": Field(kind="object", meaning="how often each state has each value, in `total` and engine by engine"),
        "measured": Field(
            kind="object",
            meaning="on a GPU: `points` (`batch`, `sequence`, `dense_ms`, `sparse_ms`) and `break_even` of each engine",
            optional=True,
        ),
    },
    "verification": {
        "held": Field(kind="flag", meaning="whether every check held; null if verification was switched off", optional=True),
        "checks": Field(kind="list", meaning="entries `name`, `held` (null if it could not be checked), `summary`, `details`"),
    },
    "pattern": {
        "conforms": Field(kind="flag", meaning="whether the pattern holds in all files"),
        "reports": Field(
            kind="list",
            meaning="one entry a file: `source`, `pattern`, `conforms`, `counts`, `causes`, and `entries` (weight by weight: "
            "verdict, reason, shape, axis, what was counted)",
        ),
    },
    "plan": {
        "model": Field(kind="text", meaning="what was planned for"),
        "device": Field(kind="object", meaning="the GPU, with its figures"),
        "runtime": Field(kind="object", meaning="the model of its kernels"),
        "dtype": Field(kind="text", meaning="type of the weights"),
        "pays": Field(kind="flag", meaning="whether 2:4 is predicted to gain anything"),
        "points": Field(
            kind="list",
            meaning="one entry a workload: `batch`, `seq`, `new_tokens`, predicted times and `speedup` of `prefill`, `decode` "
            "(null without one) and `request`, bytes of cache and of all",
        ),
        "memory": Field(kind="list", meaning="bytes of the weights for each type: dense, as recommended, all 2:4"),
        "layers": Field(
            kind="list",
            meaning="one entry a layer: shape, `decision`, `reason`, predicted times of `prefill` and `decode`, intensities, "
            "`pays_at`",
        ),
        "ignore": Field(kind="list", meaning="layers to leave dense, as patterns for the passes"),
        "passes": Field(kind="text", meaning="recommended passes; null if none pays", optional=True),
        "notes": Field(kind="list", meaning="what is not covered, and what was assumed"),
    },
    "samples": {
        "file": Field(kind="text", meaning="safetensors file with `inputs/NAME` and `outputs/NAME`"),
        "inputs": Field(kind="object", meaning="name -> `{shape, dtype}`"),
        "outputs": Field(kind="object", meaning="name -> `{shape, dtype}`, as the program gives them in torch"),
    },
}
"""Section -> its fields. Sections are optional, their fields are not (unless they say so)."""

OF_FILES: Final = ("artifact", "verification", "samples", "sparsity", "pattern")
"""Sections that tell of files, and do not go along with the program that they were written from."""

_ENTRIES: Final[Mapping[tuple[str, str], Mapping[str, Field]]] = {
    ("retraining", "runs"): {
        "method": Field(kind="text", meaning=""),
        "settings": Field(kind="object", meaning=""),
        "num_steps": Field(kind="integer", meaning=""),
        "num_tokens": Field(kind="integer", meaning=""),
        "seconds": Field(kind="number", meaning=""),
        "tokens_per_second": Field(kind="number", meaning=""),
        "step_of_weights": Field(kind="integer", meaning=""),
        "teacher": Field(kind="object", meaning=""),
        "data": Field(kind="object", meaning=""),
        "validations": Field(kind="list", meaning=""),
        "flips_since_first": Field(kind="number", meaning=""),
        "flips_by_layer": Field(kind="object", meaning=""),
        "decided": Field(kind="number", meaning="", optional=True),
        "kept_norm": Field(kind="number", meaning="", optional=True),
        "curve": Field(kind="object", meaning=""),
    },
    ("accuracy", "measurements"): {
        "name": Field(kind="text", meaning=""),
        "perplexity": Field(kind="number", meaning=""),
        "num_tokens": Field(kind="integer", meaning=""),
        "context": Field(kind="integer", meaning=""),
        "stride": Field(kind="integer", meaning=""),
        "bos": Field(kind="flag", meaning=""),
        "dtype": Field(kind="text", meaning=""),
    },
    ("sparsity", "engines"): {
        "name": Field(kind="text", meaning=""),
        "file": Field(kind="text", meaning=""),
        "size_bytes": Field(kind="integer", meaning=""),
        "flag_requested": Field(kind="flag", meaning=""),
        "num_eligible": Field(kind="integer", meaning="", optional=True),
        "num_chosen": Field(kind="integer", meaning="", optional=True),
    },
    ("sparsity", "layers"): {
        name: Field(kind="text", meaning="")
        for name in ("engine", "layer", "weight", "conforms", "flag_requested", "eligible", "chosen", "ran_sparse", "reason")
    },
    ("passes", "passes"): {
        "text": Field(kind="text", meaning=""),
        "promise": Field(kind="text", meaning=""),
        "outcomes": Field(kind="list", meaning=""),
        "seconds": Field(kind="number", meaning=""),
    },
    ("pattern", "reports"): {
        "source": Field(kind="text", meaning=""),
        "pattern": Field(kind="text", meaning=""),
        "conforms": Field(kind="flag", meaning=""),
        "counts": Field(kind="object", meaning=""),
        "entries": Field(kind="list", meaning=""),
    },
    ("plan", "points"): {
        "batch": Field(kind="integer", meaning=""),
        "seq": Field(kind="integer", meaning=""),
        "prefill": Field(kind="object", meaning=""),
        "decode": Field(kind="object", meaning="", optional=True),
    },
    ("plan", "layers"): {
        "name": Field(kind="text", meaning=""),
        "out_features": Field(kind="integer", meaning=""),
        "in_features": Field(kind="integer", meaning=""),
        "decision": Field(kind="text", meaning=""),
        "reason": Field(kind="text", meaning=""),
    },
    ("verification", "checks"): {
        "name": Field(kind="text", meaning=""),
        "held": Field(kind="flag", meaning="", optional=True),
        "summary": Field(kind="text", meaning=""),
        "details": Field(kind="object", meaning=""),
    },
}


def new_report() -> dict[str, Any]:
    """Return a report without runs and sections.

    Example:
        >>> check_report(new_report())["runs"]
        []
    """
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "recipe": "", "runs": []}


def run_record(stage: str, *, command: str | None, seconds: float) -> dict[str, Any]:
    """Describe one run: what was called, when, with which versions, on which machine.

    Args:
        stage: Such as ``export``.
        command: The command line; None for a call from Python.
        seconds: Wall time.
    """
    return {
        "stage": stage,
        "command": command or "python",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Versions of sparsepass, Python, and the libraries that are installed."""
    found = {"sparsepass": _version("sparsepass") or "unknown", "python": platform.python_version()}
    for package in _PACKAGES:
        if version := _version(package):
            found[package] = version
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on; nothing that names the machine or its user."""
    import torch

    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "accelerators": accelerators,
    }


def measurement(name: str, found: Any) -> dict[str, Any]:
    """Turn a `Perplexity` into an entry of the section ``accuracy``.

    Args:
        name: What was measured, such as ``dense``.
        found: What `perplexity` returned.
    """
    return {
        "name": name,
        "perplexity": found.value,
        "nll_mean": found.nll_mean,
        "num_tokens": found.num_tokens,
        "context": found.context,
        "stride": found.stride,
        "bos": found.bos,
        "dtype": found.dtype,
        "seconds": found.seconds,
    }


def check_report(document: Any, where: str = "the report") -> dict[str, Any]:
    """Check a document against the schema.

    Args:
        document: What was read.
        where: Its name, for errors.

    Returns:
        The document.

    Raises:
        SparsepassError: If it is no report, of a newer schema, or a field is missing or of the wrong type.

    Example:
        >>> check_report({"schema": "sparsepass-report", "schema_version": 99})
        Traceback (most recent call last):
        ...
        sparsepass.SparsepassError: the report has report schema 99, and this sparsepass reads up to 1; ...
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise SparsepassError(f"{where} is no sparsepass report (expected an object with schema {SCHEMA!r}); check the path")
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SparsepassError(f"{where} has the schema_version {version!r}; expected an integer from 1 on")
    if version > SCHEMA_VERSION:
        raise SparsepassError(
            f"{where} has report schema {version}, and this sparsepass reads up to {SCHEMA_VERSION}; upgrade sparsepass"
        )
    _check_fields(document, HEADER, where)
    for index, run in enumerate(document["runs"]):
        _check_fields(run, RUN, f"{where}: runs[{index}]")
    for section, fields in SECTIONS.items():
        if section in document:
            _check_fields(document[section], fields, f"{where}: {section}")
    for (section, name), fields in _ENTRIES.items():
        for index, entry in enumerate(document.get(section, {}).get(name, ())):
            _check_fields(entry, fields, f"{where}: {section}.{name}[{index}]")
    return document


def read_report(place: str | Path) -> dict[str, Any]:
    """Read and check a report.

    Args:
        place: A report.json, or the folder it lies in.

    Raises:
        SparsepassError: If there is none, or it is damaged, invalid or of a newer schema.
    """
    path = Path(place)
    path = path / REPORT_FILE if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SparsepassError(f"{path} does not exist; name a folder that sparsepass wrote") from error
    except (OSError, ValueError) as error:
        raise SparsepassError(f"{path} cannot be read as JSON ({error}); write the folder again") from error
    return check_report(document, str(path))


def find_report(folder: str | Path) -> dict[str, Any] | None:
    """Read the report of a folder; None if it has none. A file of that name that another tool wrote counts as none.

    Raises:
        SparsepassError: If it is ours, and damaged or of a newer schema.
    """
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return read_report(path)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return None
    return check_report(document, str(path))


def write_report(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, its pages (`write_pages`) and recipe.txt into a folder that the caller moves into place.

    Returns:
        The document as written: checked, and with infinities and NaN as text.

    Raises:
        SparsepassError: If the document breaks the schema.
    """
    plain = check_report(plain_json(document), "the report to be written")
    write_pages(folder, plain)
    _replace_text(folder / RECIPE_FILE, plain["recipe"] + "\n")
    _replace_text(folder / REPORT_FILE, _text_of(plain))
    return plain


def write_pages(folder: Path, document: Mapping[str, Any]) -> None:
    """Render a checked report into a folder: report.html, report.md, and the pictures that report.md shows.

    Each file is written beside its place and moved over it.

    Args:
        folder: An existing folder.
        document: From `read_report` or `check_report`.
    """
    from sparsepass.export.report.figures import drawn_figures
    from sparsepass.export.report.html import render_html
    from sparsepass.export.report.page import render_page

    texts = drawn_figures(document["retraining"]) if "retraining" in document else {}
    texts |= {PAGE_FILE: render_page(document), HTML_FILE: render_html(document)}
    for name, text in texts.items():
        _replace_text(folder / name, text)


def add_to_report(
    folder: str | Path, sections: Mapping[str, Any], *, stage: str, command: str | None, seconds: float
) -> dict[str, Any]:
    """Add sections to the report of a folder that stands already, or begin a report in a new one.

    Files are written beside their places and moved over them, report.json last; recipe.txt is left alone.

    Args:
        folder: A folder with a report, or one that is new or empty.
        sections: Take the place of those of the same name.
        stage: What found them, such as ``verify``.
        command: The command line; None for a call from Python.
        seconds: How long it took.

    Returns:
        The report, as written.

    Raises:
        SparsepassError: If files of another kind lie there, or the report is damaged, of a newer schema, or breaks it.
    """
    place = Path(folder)
    document = find_report(place)
    if document is None:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise SparsepassError(
                f"{place} is not empty and holds no report; name a folder that sparsepass wrote, or a new one"
            )
        document = new_report()
    run = run_record(stage, command=command, seconds=seconds)
    document = {**document, **sections, "runs": [*document["runs"], run]}
    plain = check_report(plain_json(document), "the report to be written")
    place.mkdir(parents=True, exist_ok=True)
    write_pages(place, plain)
    _replace_text(place / REPORT_FILE, _text_of(plain))
    return plain


def plain_json(value: Any) -> Any:
    """Turn mappings, sequences and numbers into what JSON can hold; infinities and NaN become text.

    Example:
        >>> plain_json({"kl": float("inf"), "shape": (2, 3)})
        {'kl': 'inf', 'shape': [2, 3]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [plain_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a report holds plain values, got {type(value).__name__} ({value!r})")


def _replace_text(path: Path, text: str) -> None:
    """Write a file beside its place, and move it over what stands there. What UTF-8 cannot hold is written as an escape."""
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _text_of(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _check_fields(value: Any, fields: Mapping[str, Field], where: str) -> None:
    if not isinstance(value, dict):
        raise SparsepassError(f"{where} is a {type(value).__name__} where an object is expected; write the folder again")
    for name, field in fields.items():
        found = value.get(name)
        if found is None and field.optional:
            continue
        if name not in value:
            raise SparsepassError(f"{where} has no field {name!r}; write the folder again")
        if not _is_kind(found, field.kind):
            raise SparsepassError(f"{where}: field {name!r} is {found!r}, expected {field.kind}; write the folder again")


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "number":
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number or value in ("inf", "-inf", "nan")
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    types: dict[str, Any] = {"text": str, "flag": bool, "object": dict, "list": list}
    return isinstance(value, types[kind])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            return platform.machine()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
