"""The command `verify`: does a file, a folder or a saved program hold the N:M pattern?"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import complain, print_json, say, show, stdout
from sparsepass.export.cli.report import AddTo, add_to, check_report

if TYPE_CHECKING:
    from sparsepass.export.pattern import PatternReport
    from sparsepass.export.targets.torch import Record
    from sparsepass.graph.support import FileChange

__all__ = ["check_folder", "verify_command"]

_NUM_SHOWN = 20
_ON_PURPOSE = "dense on purpose"


def verify_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER_OR_FILE",
            help="A folder that sparsepass wrote, an .onnx or .safetensors file, or a folder with such files.",
            show_default=False,
        ),
    ],
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", help="Pattern to check; by default the report's, or 2:4.", show_default=False),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Weights that may be dense: name, glob or 're:...'. May be repeated."),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every weight, and not only what is amiss in a long list.")
    ] = False,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew",
            help="After an edit of yours, such as of README.md: write the folder's checksums anew, if all else holds.",
        ),
    ] = False,
    report: AddTo = None,
    as_json: support.AsJson = False,
) -> None:
    """Check in the stored weights that the N:M pattern holds, along the axis in which each is summed.

    A folder that sparsepass wrote holds checksums of its files, in sparsepass.sha256.json: every file has to be as it was
    written.

    In a folder that sparsepass wrote, report.json tells which weights have to be sparse and which are dense on purpose;
    elsewhere every linear weight has to be sparse, less those that --ignore names.

    Exit code: 0 it holds, 1 it does not, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.stages import folder_contradictions
    from sparsepass.graph.support import write_checksums

    check_report(report)
    started = time.perf_counter()
    if path.is_file() and path.suffix == ".safetensors" and _is_sound_pack(path):
        return
    changes = _changes(path, renew=renew)
    reports = check_folder(path, pattern=pattern, ignore=tuple(ignore or ()))
    record = _record(path)
    contradictions = folder_contradictions(path)
    conforms = all(each.conforms for each in reports) and not contradictions
    is_renewed = renew and conforms
    code = support.HELD if conforms and (is_renewed or not changes) else support.FAILED
    if is_renewed:
        write_checksums(path)
    if as_json:
        document: dict[str, Any] = {"conforms": conforms, "reports": [each.to_dict() for each in reports]}
        document["files"] = {"changed": {change.file: change.kind for change in changes}, "renewed": is_renewed}
        document["contradictions"] = list(contradictions)
        if record is not None:
            document["torch_semi_structured"] = record.to_dict()
        print_json("verify", document, exit_code=code)
    else:
        for each in reports:
            _show(each, show_all=show_all)
        if record is not None:
            stdout().print(f"  torch's 2:4 kernels: {record.summary()}", highlight=False, markup=False)
        for line in contradictions:
            complain(f"{path}: {line}")
        _show_changes(path, changes, is_renewed=is_renewed)
    unused = set.intersection(*({*each.unused} for each in reports))
    for name in sorted(unused):
        say(f"Note: --ignore {name!r} means no weight here; is it misspelled?")
    conforms = conforms and (is_renewed or not changes)
    add_to(report, "verify", {"pattern": {"conforms": conforms, "reports": [each.to_dict() for each in reports]}}, started)
    support.finish(code)


def _is_sound_pack(path: Path) -> bool:
    """Say that a mask pack is as it was written, if a file is one.

    Raises:
        SparsepassError: If it is one, and is not.
    """
    from sparsepass.passes.masks import MaskPack, describe, is_mask_pack

    if not is_mask_pack(path):
        return False
    known = describe(MaskPack.load(path))
    held = f"{known['num_masks']} masks, {', '.join(known['patterns'])}"
    stdout().print(f"{path}: a mask pack as it was written, of {held}", highlight=False, markup=False)
    return True


def _changes(path: Path, *, renew: bool) -> "tuple[FileChange, ...]":
    """The files of a folder, or the one file, that are not as they were written."""
    from sparsepass.graph import SparsepassError
    from sparsepass.graph.support import CHECKSUMS_FILE, changed_files

    folder = path if path.is_dir() else path.parent
    if renew and not (path / CHECKSUMS_FILE).is_file():
        raise SparsepassError(f"{path} holds no {CHECKSUMS_FILE} that could be renewed; name a folder that sparsepass wrote")
    return changed_files(folder, None if path.is_dir() else (path.name,))


def _show_changes(path: Path, changes: "tuple[FileChange, ...]", *, is_renewed: bool) -> None:
    from sparsepass.graph.support import CHECKSUMS_FILE

    out = stdout()
    for change in changes:
        out.print(f"  {path}: {change}", highlight=False, markup=False)
    if is_renewed:
        out.print(f"  {CHECKSUMS_FILE} was written anew", highlight=False, markup=False)
    elif changes:
        out.print("  If the edit is yours, --renew takes it on; otherwise get the folder anew.", highlight=False)


def _record(path: Path) -> "Record | None":
    """What a folder of the target torch says of its layers."""
    from sparsepass.export.targets.torch import RECORD_FILE, read_record

    return read_record(path) if (path / RECORD_FILE).is_file() else None


def _show(report: "PatternReport", *, show_all: bool) -> None:
    out = stdout()
    if show_all:
        show(report.table(all_entries=True))
    else:
        out.print(report.summary(), highlight=False, markup=False)
    if report.stated:
        _show_stated(report)
    if not show_all:
        for entry in report.failures[:_NUM_SHOWN]:
            shape = f" [{'x'.join(map(str, entry.shape))}, summed along axis {entry.axis}]" if entry.shape else ""
            use = f" in {entry.op} {entry.node}" if not entry.shape and entry.op else ""
            out.print(f"  {entry.label}{shape}{use}: {entry.reason}", highlight=False, markup=False)
        if (more := len(report.failures) - _NUM_SHOWN) > 0:
            out.print(f"  and {more} more; --all shows every weight")
    if advice := report.advice():
        out.print("Likely causes, and what to do:", highlight=False)
        for line in advice.splitlines():
            out.print(f"  {line}", highlight=False, markup=False)


def _show_stated(report: "PatternReport") -> None:
    """Say which weights had to be sparse and which are dense on purpose."""
    required = {entry.weight for entry in report.entries if entry.required}
    dense: dict[str, list[str]] = {}
    for entry in report.entries:
        if entry.reason.startswith(_ON_PURPOSE) and entry.label not in dense.setdefault(entry.reason, []):
            dense[entry.reason].append(entry.label)
    out = stdout()
    out.print(f"  has to be sparse: {len(required)} weights", highlight=False)
    for reason, names in dense.items():
        shown = ", ".join(names[:_NUM_SHOWN]) + (f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else "")
        out.print(f"  {reason}: {shown}", highlight=False, markup=False)


def check_folder(path: Path, *, pattern: str | None = None, ignore: tuple[str, ...] = ()) -> "tuple[PatternReport, ...]":
    """Check a file, a saved program, or a folder, by its report if it has one.

    Args:
        path: What to check.
        pattern: Stands in for the report's patterns.
        ignore: Weights that may be dense.

    Returns:
        One report for each file that the folder's report names; else one.

    Raises:
        SparsepassError: If it cannot be read.
    """
    from sparsepass.export.pattern import check_pattern
    from sparsepass.export.report import ReportDocument, find_report, new_report
    from sparsepass.export.targets.packed import check_packed_folder, is_packed_folder
    from sparsepass.graph import SparsepassError
    from sparsepass.graph.saved import PROGRAM_FILE
    from sparsepass.graph.support import check_inside

    if not path.exists():
        raise SparsepassError(f"{path} does not exist; name a folder, an .onnx file or a .safetensors file")
    if path.is_dir():
        check_inside(path)
    if path.is_dir() and (path / PROGRAM_FILE).is_file():
        return (_check_program(path, pattern, ignore),)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and is_packed_folder(path):
        found = ReportDocument.parse(find_report(folder) or new_report()).passes
        return (_with_reasons(check_packed_folder(path, pattern or "2:4", ignore=ignore), found.skipped if found else {}),)
    report = ReportDocument.parse(find_report(folder) or new_report())
    artifact = report.artifact
    expected, axes = ({}, {}) if artifact is None else (artifact.expected_sparse, artifact.axes or {})
    if not path.is_dir():
        expected, axes = _of_file(path, expected, axes)
    if not expected:
        return (check_pattern(path, pattern or "2:4", ignore=ignore),)
    reasons = {} if report.passes is None else report.passes.skipped
    return tuple(
        _with_reasons(
            check_pattern(
                folder / name if name else folder,
                pattern or "2:4",
                ignore=ignore,
                expected_sparse=weights if pattern is None else list(weights),
                axes=axes.get(name),
            ),
            reasons,
        )
        for name, weights in expected.items()
    )


def _of_file(
    path: Path, expected: Mapping[str, Mapping[str, str]], axes: Mapping[str, Mapping[str, int]]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, int]]]:
    """What a folder's report expects of one file in it: of a shard of a checkpoint, the weights that it holds."""
    from sparsepass.graph.support import check_tensors

    if path.name in expected:
        return {path.name: dict(expected[path.name])}, {path.name: dict(axes.get(path.name, {}))}
    if "" not in expected or path.suffix != ".safetensors":
        return {}, {}
    held = set(check_tensors(path))
    return (
        {path.name: {name: each for name, each in expected[""].items() if name in held}},
        {path.name: {name: axis for name, axis in axes.get("", {}).items() if name in held}},
    )


def _check_program(folder: Path, pattern: str | None, ignore: tuple[str, ...]) -> "PatternReport":
    """Check a saved program: what its graph reads is the weight with its mask, and no file holds that."""
    from sparsepass.export.pattern import check_pattern
    from sparsepass.graph import Program, SparsepassError
    from sparsepass.graph.fusion import split_siblings
    from sparsepass.graph.program import masked_weight

    program = Program.load(folder, check_patterns=False)
    if not program.sparse:
        raise SparsepassError(f"{folder} is a program without sparse weights; apply nm_sparsify first (sparsepass prune)")
    program = split_siblings(program)
    stored = program.tensors()
    weights = {site.weight: stored[site.weight] for site in program.sites() if site.weight in stored}
    axes = {}
    for name, state in program.sparse.items():
        weights[name], axes[name] = masked_weight(program, name), state.axis
    patterns = {name: pattern or state.pattern for name, state in program.sparse.items()}
    found = check_pattern(weights, ignore=ignore, expected_sparse=patterns, axes=axes)
    found = dataclasses.replace(found, source=str(folder), pattern="/".join(sorted(set(patterns.values()))))
    return _with_reasons(found, program.report().skipped())


def _with_reasons(report: "PatternReport", skipped: Mapping[str, Any]) -> "PatternReport":
    """Add to weights that are dense on purpose why the passes left them."""
    entries = []
    for entry in report.entries:
        if entry.reason == _ON_PURPOSE:
            named = (entry.weight, entry.parameter, entry.node)
            names = [name for each in named for name in (each, each.removesuffix(".weight"))]
            reason = next((skipped[name] for name in names if name in skipped), None)
            entry = dataclasses.replace(entry, reason=f"{_ON_PURPOSE}: {reason}" if reason else _ON_PURPOSE)
        entries.append(entry)
    return dataclasses.replace(report, entries=tuple(entries))
