"""Reading and writing a report: report.json, and the pages that are rendered from it."""

import json
import math
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from sparsepass.export.report.pages import drawn_figures, render_html, render_markdown
from sparsepass.export.report.schema import SCHEMA, SCHEMA_VERSION, MachineEntry, ReportDocument, RunEntry, check_report
from sparsepass.export.report.sections import MeasurementEntry
from sparsepass.export.report.training import FOLDER as FIGURES
from sparsepass.export.report.view import report_view
from sparsepass.graph.support import (
    SparsepassError,
    as_utf8,
    check_place,
    checksums_follow,
    file_inside,
    package_version,
    read_json,
    replaced_file,
    replaced_folder,
    waiting_for,
)

REPORT_FILE, PAGE_FILE, HTML_FILE, RECIPE_FILE = "report.json", "report.md", "report.html", "recipe.txt"

PAGES: Final = (PAGE_FILE, HTML_FILE, FIGURES)
"""What is rendered from report.json: files, and the folder of the pictures."""

_PACKAGES: Final = (
    "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "peft", "safetensors", "numpy", "tensorrt",
    "tensorrt-rtx-cu13-bindings", "torch-tensorrt",
)  # fmt: skip

OF_FILES: Final = ("artifact", "verification", "samples", "sparsity", "speed", "pattern")
"""Sections that tell of files, and do not go along with the program that they were written from."""


def new_report() -> dict[str, Any]:
    """Return a report without runs and sections.

    Example:
        >>> check_report(new_report())["runs"]
        []
    """
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "recipe": "", "runs": []}


def measurement(name: str, found: Any) -> MeasurementEntry:
    """Turn a `Perplexity` into an entry of the section ``accuracy``.

    Args:
        name: What was measured, such as ``dense``.
        found: What `perplexity` returned.
    """
    fields = ("nll_mean", "num_tokens", "context", "stride", "bos", "dtype", "seconds")
    return MeasurementEntry(name=name, perplexity=found.value, **{field: getattr(found, field) for field in fields})


def read_report(place: str | Path) -> dict[str, Any]:
    """Read and check a report.

    Args:
        place: A report.json, or the folder it lies in.

    Raises:
        SparsepassError: If there is none, or it is damaged, invalid or of a newer schema.
    """
    path = Path(place)
    path = file_inside(path, REPORT_FILE, str(path)) if path.is_dir() else path
    return check_report(_json_of(path), str(path))


def find_report(folder: str | Path) -> dict[str, Any] | None:
    """Read the report of a folder; None if it has none. A file of that name that another tool wrote counts as none.

    Raises:
        SparsepassError: If it is ours, and damaged or of a newer schema.
    """
    path = file_inside(Path(folder), REPORT_FILE, str(folder))
    if not path.is_file():
        return None
    document = _json_of(path)
    is_ours = isinstance(document, dict) and document.get("schema") == SCHEMA
    return check_report(document, str(path)) if is_ours else None


def write_report(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, its pages (`write_pages`) and recipe.txt into a folder that the caller moves into place.

    Returns:
        The document as written: checked, and with infinities and NaN as text.

    Raises:
        SparsepassError: If the document breaks the schema.
    """
    plain = _write(folder, document)
    _replace_text(folder / RECIPE_FILE, plain["recipe"] + "\n")
    return plain


def write_pages(folder: Path, document: Mapping[str, Any]) -> None:
    """Render a checked report into a folder: report.html, report.md, and the pictures that report.md shows.

    Each file is written beside its place and moved over it.

    Args:
        folder: An existing folder.
        document: From `read_report` or `check_report`.

    Raises:
        SparsepassError: If pages of another kind stand there.
    """
    view = report_view(ReportDocument.parse(document))
    texts = {**drawn_figures(view), PAGE_FILE: render_markdown(view), HTML_FILE: render_html(view)}
    for name in (PAGE_FILE, HTML_FILE):
        check_place(folder / name, is_ours=_is_page)
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
    with changed_report(place, (*PAGES, REPORT_FILE)) as folder:
        document = find_report(folder) or document  # another process may have added to it meanwhile
        run = run_record(stage, command=command, seconds=seconds)
        return _write(folder, {**document, **sections, "runs": [*document["runs"], run]})


@contextmanager
def changed_report(folder: Path, parts: Collection[str]) -> Iterator[Path]:
    """Give a folder to write files of a report into, while others who write them wait.

    Args:
        folder: Where they are to be. A new or empty one is there when all of them are.
        parts: Their names. In a folder that stands, its checksums follow them.
    """
    if not _stands(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting_for(folder.parent):
            if not _stands(folder):
                with replaced_folder(folder, checksums=False) as beside:
                    yield beside
                return
    with checksums_follow(folder, parts):
        yield folder


def _stands(folder: Path) -> bool:
    """Whether there is a folder that holds something. Its parent is not locked then: a run keeps that for itself."""
    return folder.is_dir() and any(folder.iterdir())


def run_record(stage: str, *, command: str | None, seconds: float) -> RunEntry:
    """Describe one run: what was called, when, with which versions, on which machine; nothing names the machine or its user.

    Args:
        stage: Such as ``export``.
        command: The command line; None for a call from Python.
        seconds: Wall time.
    """
    import torch

    versions = {"sparsepass": package_version("sparsepass") or "unknown", "python": platform.python_version()}
    libraries = {package: package_version(package) for package in _PACKAGES}
    return RunEntry(
        stage=stage,
        command=command or "python",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        versions=versions | {package: version for package, version in libraries.items() if version is not None},
        machine=MachineEntry(
            system=f"{platform.system()} {platform.machine()}",
            processor=_processor(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            memory_bytes=_memory_bytes(),
            accelerators=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        ),
    )


def plain_json(value: Any) -> Any:
    """Turn sections, mappings, sequences and numbers into what JSON can hold; infinities and NaN become text.

    Example:
        >>> plain_json({"kl": float("inf"), "shape": (2, 3)})
        {'kl': 'inf', 'shape': [2, 3]}
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(value, Mapping):
        return {as_utf8(str(key)): plain_json(item) for key, item in value.items()}
    if isinstance(value, str):
        return as_utf8(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [plain_json(item) for item in value]
    if isinstance(value, Path):
        return as_utf8(str(value))
    raise TypeError(f"a report holds plain values, got {type(value).__name__} ({value!r})")


def _is_page(path: Path) -> bool:
    """Whether a page was rendered by this library."""
    try:
        return "sparsepass" in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _json_of(path: Path) -> Any:
    if not path.exists():
        raise SparsepassError(f"{path} does not exist; name a folder that sparsepass wrote")
    if not path.is_file():
        raise SparsepassError(f"{path} is no file; name a report.json, or a folder that sparsepass wrote")
    return read_json(path, advice="write the folder again")


def _write(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    plain = check_report(plain_json(document), "the report to be written")
    folder.mkdir(parents=True, exist_ok=True)
    write_pages(folder, plain)
    _replace_text(folder / REPORT_FILE, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return plain


def _replace_text(path: Path, text: str) -> None:
    """Write a file beside its place, and move it over what stands there. What UTF-8 cannot hold is written as an escape."""
    path.parent.mkdir(exist_ok=True)
    with replaced_file(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    named = re.search(r"^model name\s*:(.*)$", told, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
