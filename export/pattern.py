"""Does a file hold the N:M pattern, on the axis along which each matmul reduces? For ONNX and safetensors.

The checker reads what is stored and trusts nothing else: not a name, not a recipe, not a mask. For ONNX it knows from
the graph along which axis each weight is reduced; for safetensors it goes by the conventions of Hugging Face
checkpoints, which `axes` overrides.

What decides on `PatternReport.conforms`:

1. With `expected_sparse`, exactly those weights, in every use; all others are dense on purpose.
2. Without it, every constant weight of MatMul, Gemm and Conv (and their quantized and fused kin), less those that
   `ignore` and `expected_dense` name. One that is not eligible or not checkable is not proven, so it fails.
3. Weights that no N:M rule covers (ConvTranspose, recurrent) and products that reduce nothing (K = 1) are listed
   and decide nothing.
"""

import io
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal, final

import onnx
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from sparsepass.export.pattern_bits import GroupCount, count_groups, is_conforming
from sparsepass.export.pattern_candidates import Candidate, name_matches
from sparsepass.export.pattern_onnx import onnx_candidates
from sparsepass.export.pattern_onnx_data import onnx_files, read_onnx
from sparsepass.export.pattern_safetensors import safetensors_candidates, safetensors_files
from sparsepass.graph.errors import SparsepassError
from sparsepass.passes.pattern import NMPattern

__all__ = ["PatternEntry", "PatternReport", "check_pattern"]

Verdict = Literal["conforms", "violates", "not eligible", "not checkable", "missing", "left out"]
_VERDICTS: tuple[Verdict, ...] = ("violates", "missing", "not eligible", "not checkable", "conforms", "left out")
_COLOURS = {
    "violates": "red",
    "missing": "red",
    "not eligible": "yellow",
    "not checkable": "yellow",
    "conforms": "green",
}
_NUM_ROWS_SHOWN = 60
_NOTHING_COUNTED = GroupCount(num_groups=0, num_violations=0, first_violation=None, num_nonzeros=0, num_negative_zeros=0)


@final
@dataclass(frozen=True, kw_only=True)
class PatternEntry:
    """One use of one stored weight, judged.

    Attributes:
        file: File it stands in, relative to the source; "" for a model in memory.
        node: Operation that uses it; the module path in a safetensors file.
        op: Operation type, or "tensor" in a safetensors file.
        weight: Name under which the tensor is stored.
        parameter: The parameter it was in the model the file was exported from, where the file tells (torch.onnx notes
            it); else "".
        shape: Stored shape.
        dtype: Stored element type.
        axis: Axis of the stored tensor along which K runs, and so along which groups were counted; None if unknown.
        pattern: The pattern asked for, such as "2:4".
        verdict: "conforms", "violates", "not eligible" (K is not a multiple of M), "not checkable", "missing" (expected
            and not in the file), or "left out" (ignored, or dense on purpose; its data was not read).
        required: Whether it decides on `PatternReport.conforms`.
        reason: Why, in words; "" for a weight that conforms without remark.
        num_groups: Groups of M along the axis.
        num_violations: Groups with more than N nonzeros.
        first_violation: Index into the stored tensor of the first entry of the first such group.
        num_nonzeros: Entries that are not zero; a zero of either sign is zero.
        num_negative_zeros: Entries that are -0.0. They conform, but packers are known to trip over them.
        conforming_axes: For a weight that violates: other axes along which it would conform.
    """

    file: str
    node: str
    op: str
    weight: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    pattern: str
    verdict: Verdict
    required: bool
    reason: str = ""
    num_groups: int = 0
    num_violations: int = 0
    first_violation: tuple[int, ...] | None = None
    num_nonzeros: int = 0
    num_negative_zeros: int = 0
    conforming_axes: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@final
@dataclass(frozen=True, kw_only=True)
class PatternReport:
    """What `check_pattern` found; `str()` gives a table.

    Attributes:
        source: What was checked.
        pattern: The pattern asked for.
        entries: One entry per operation and constant weight, in file order; a weight used twice has two.
        stated: The caller stated which weights are sparse or dense, so that finding nothing to check is no failure.
    """

    source: str
    pattern: str
    entries: tuple[PatternEntry, ...]
    stated: bool = field(default=False, repr=False)

    @property
    def conforms(self) -> bool:
        """Every required weight conforms, and there was at least one to check unless the caller said otherwise."""
        required = [entry for entry in self.entries if entry.required]
        return all(entry.verdict == "conforms" for entry in required) and (bool(required) or self.stated)

    @property
    def exit_code(self) -> int:
        """0 when the source conforms, 1 when it does not; a source that cannot be read (2) is an error instead."""
        return 0 if self.conforms else 1

    @property
    def counts(self) -> dict[str, int]:
        """Number of entries for each verdict; all verdicts are present."""
        found = Counter(entry.verdict for entry in self.entries)
        return {verdict: found[verdict] for verdict in _VERDICTS}

    @property
    def failures(self) -> tuple[PatternEntry, ...]:
        """The required entries that do not conform."""
        return tuple(entry for entry in self.entries if entry.required and entry.verdict != "conforms")

    @property
    def num_negative_zeros(self) -> int:
        """Entries that are -0.0 in all weights checked, each stored weight counted once."""
        return sum({(e.file, e.weight): e.num_negative_zeros for e in self.entries}.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "source": self.source,
            "pattern": self.pattern,
            "conforms": self.conforms,
            "exit_code": self.exit_code,
            "counts": self.counts,
            "num_negative_zeros": self.num_negative_zeros,
            "entries": [entry.to_dict() for entry in self.entries],
        }

    def summary(self) -> str:
        """Return one line: the verdict and the counts."""
        said = ", ".join(f"{number} {verdict}" for verdict, number in self.counts.items() if number) or "no weight found"
        if not self.conforms and not self.failures:
            said += "; nothing was required to conform, so nothing is proven"
        return f"{self.source}: {self.pattern} {'holds' if self.conforms else 'does NOT hold'} ({said})"

    def table(self, *, all_entries: bool = False) -> Table:
        """Return a rich table, failures first.

        Args:
            all_entries: Show every entry; otherwise a long report only counts those that conform or are left out.
        """
        rank = {verdict: i for i, verdict in enumerate(_VERDICTS)}
        rows = sorted(self.entries, key=lambda e: (not e.required or e.verdict == "conforms", rank[e.verdict]))
        shown = rows
        if not all_entries and len(rows) > _NUM_ROWS_SHOWN:
            shown = [e for e in rows if e.verdict not in ("conforms", "left out")][:_NUM_ROWS_SHOWN]
        table = Table(title=self.summary(), title_justify="left", caption_justify="left")
        for heading in ("verdict", "weight", "used by", "stored shape", "axis of K", "why"):
            table.add_column(heading, overflow="fold")
        for e in shown:
            colour = _COLOURS.get(e.verdict, "dim") if e.required else "dim"
            axis, shape = "" if e.axis is None else str(e.axis), "x".join(map(str, e.shape))
            weight = f"{e.weight} ({e.parameter})" if e.parameter not in ("", e.weight) else e.weight
            cells = (weight, f"{e.op} {e.node}", f"{shape} {e.dtype}".strip(), axis, e.reason)
            table.add_row(e.verdict, *(cell.replace("[", r"\[") for cell in cells), style=colour)
        if len(shown) < len(rows):
            table.caption = f"{len(rows) - len(shown)} more entries are not shown"
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=160, no_color=True).print(self.table())
        return out.getvalue()


def check_pattern(
    source: str | os.PathLike[str] | ir.Model | onnx.ModelProto,
    pattern: str | NMPattern = "2:4",
    *,
    ignore: Collection[str] = (),
    expected_sparse: Collection[str] | Mapping[str, str | NMPattern] | None = None,
    expected_dense: Collection[str] | None = None,
    axes: Mapping[str, int] | None = None,
) -> PatternReport:
    """Check that the weights of a file are N:M along the axis each is reduced over.

    Bound by reading the file: data is memory-mapped, counted on its raw bits, and weights left out are not read.

    Args:
        source: An .onnx file (with or without external data), an onnx_ir model, a ModelProto, a .safetensors file, or a
            folder with model.safetensors (or its shards and their index) or ONNX files (here or in `onnx/`); all found
            are checked.
        pattern: The pattern asked for: at most N nonzeros in M consecutive entries along K.
        ignore: Weights to leave out, by name of weight, module or node: exact, with globs, or a regular expression
            after "re:".
        expected_sparse: Weights that must be sparse, named in the same way; all others are then dense on purpose. A
            mapping gives each its own pattern. A name that no weight matches is reported as missing.
        expected_dense: Weights that are dense on purpose.
        axes: For safetensors, the axis along which K runs, by name of weight, where it is not what Hugging Face does.

    Returns:
        The report.

    Raises:
        SparsepassError: The source cannot be read, is cut off, or the expectations contradict each other.
        ValueError: The pattern is not an N:M pattern.

    Exactness:
        Bitwise; a value counts as zero if and only if it is +0.0 or -0.0 (or, quantized, equals its zero point).

    >>> from onnx import TensorProto, helper
    >>> weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], [1, 2, 3, 4, 0, 0, 0, 0])
    >>> info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 4]), ("y", [1, 2]))]
    >>> node = helper.make_node("MatMul", ["x", "w"], ["y"], "proj")
    >>> model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:], [weight]))
    >>> report = check_pattern(model)
    >>> report.conforms, report.entries[0].axis
    (True, 0)
    >>> check_pattern(model, "1:4").entries[0].reason
    'dense: every group of 4 has more than 1 nonzeros'
    """
    asked = _parse(pattern)
    ignored, dense = _as_names("ignore", ignore), _as_names("expected_dense", expected_dense or ())
    sparse: dict[str, NMPattern] | None = None
    if isinstance(expected_sparse, Mapping):
        sparse = {name: _parse(each) for name, each in expected_sparse.items()}
    elif expected_sparse is not None:
        sparse = dict.fromkeys(_as_names("expected_sparse", expected_sparse), asked)
    label, found = _open(source, axes or {})
    candidates = tuple(found)
    plans = [_plan(candidate, asked, ignored, sparse, dense) for candidate in candidates]

    # Uses that read the same bytes along the same axis are one piece of work.
    work = {
        (candidate.key, candidate.axis, plan.pattern): (candidate, plan.pattern)
        for candidate, plan in zip(candidates, plans, strict=True)
        if plan.finding is None
    }
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        findings = dict(zip(work, pool.map(_judge, *zip(*work.values(), strict=True)), strict=True)) if work else {}

    entries = [
        _entry(candidate, plan, plan.finding or findings[candidate.key, candidate.axis, plan.pattern])
        for candidate, plan in zip(candidates, plans, strict=True)
    ]
    used = [candidate.names for candidate in candidates]
    entries += [_missing(name, each) for name, each in (sparse or {}).items() if not any(name_matches(name, n) for n in used)]
    stated = expected_sparse is not None or expected_dense is not None
    return PatternReport(source=label, pattern=str(asked), entries=tuple(entries), stated=stated)


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What is known of one use: the verdict, and the counts where the weight was read."""

    verdict: Verdict
    reason: str = ""
    count: GroupCount | None = None
    conforming_axes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How a candidate is to be judged; `finding` is set where that is known without reading its data."""

    pattern: NMPattern
    required: bool
    finding: _Finding | None


def _plan(
    candidate: Candidate,
    asked: NMPattern,
    ignored: Collection[str],
    sparse: Mapping[str, NMPattern] | None,
    dense: Collection[str],
) -> _Plan:
    names = candidate.names
    expected = [each for name, each in (sparse or {}).items() if name_matches(name, names)]
    on_purpose = next((name for name in dense if name_matches(name, names)), None)
    if expected and on_purpose is not None:
        raise SparsepassError(
            f"weight {candidate.weight!r} is expected to be sparse and, by {on_purpose!r}, to be dense: "
            "take it out of expected_sparse or of expected_dense."
        )
    if len(set(expected)) > 1:
        raise SparsepassError(
            f"weight {candidate.weight!r} is expected to be {' and '.join(map(str, expected))} at once: "
            "make the names in expected_sparse more exact."
        )
    pattern = expected[0] if expected else asked
    skip = next((f"ignored by {name!r}" for name in ignored if name_matches(name, names)), None)
    if skip is None and not expected:
        if on_purpose is not None or sparse is not None:
            skip = "dense on purpose"
        elif candidate.problem is None:
            skip = candidate.aside
    if skip is not None:
        return _Plan(pattern=pattern, required=False, finding=_Finding(verdict="left out", reason=skip))
    required = bool(expected) or candidate.aside is None
    return _Plan(pattern=pattern, required=required, finding=_known(candidate, pattern))


def _known(candidate: Candidate, pattern: NMPattern) -> _Finding | None:
    """Judge what needs no data."""
    if candidate.problem is not None:
        return _Finding(verdict="not checkable", reason=candidate.problem)
    assert candidate.axis is not None, "a candidate without a problem knows its axis"
    num_in = candidate.shape[candidate.axis]
    if num_in % pattern.m:
        return _Finding(verdict="not eligible", reason=f"not eligible: K={num_in} is not a multiple of {pattern.m}")
    return None


def _judge(candidate: Candidate, pattern: NMPattern) -> _Finding:
    """Read a weight and count."""
    n, m, axis = pattern.n, pattern.m, candidate.axis
    assert candidate.read is not None, "a candidate without a problem can be read"
    assert axis is not None, "a candidate without a problem knows its axis"
    view = candidate.read()
    count = count_groups(view, n, m, axis)
    if not count.num_violations:
        zeros = count.num_negative_zeros
        reason = f"{zeros} zeros are -0.0, which some packers refuse" if zeros else ""
        return _Finding(verdict="conforms", reason=reason, count=count)
    others = tuple(
        other
        for other, size in enumerate(candidate.shape)
        if other != axis and size and size % m == 0 and is_conforming(view, n, m, other)
    )
    if others:
        reason = f"{pattern} lies on axis {', '.join(map(str, others))}, but K is axis {axis}: wrong axis"
    elif count.num_violations == count.num_groups:
        reason = f"dense: every group of {m} has more than {n} nonzeros"
    else:
        reason = (
            f"{count.num_violations} of {count.num_groups} groups of {m} have more than {n} nonzeros, the first at "
            f"{list(count.first_violation or ())}"
        )
    return _Finding(verdict="violates", reason=reason, count=count, conforming_axes=others)


def _entry(candidate: Candidate, plan: _Plan, finding: _Finding) -> PatternEntry:
    count = finding.count or _NOTHING_COUNTED
    return PatternEntry(
        file=candidate.file,
        node=candidate.node,
        op=candidate.op,
        weight=candidate.weight,
        parameter=candidate.parameter,
        shape=candidate.shape,
        dtype=candidate.dtype,
        axis=candidate.axis,
        pattern=str(plan.pattern),
        verdict=finding.verdict,
        required=plan.required,
        reason=finding.reason,
        num_groups=count.num_groups,
        num_violations=count.num_violations,
        first_violation=count.first_violation,
        num_nonzeros=count.num_nonzeros,
        num_negative_zeros=count.num_negative_zeros,
        conforming_axes=finding.conforming_axes,
    )


def _missing(name: str, pattern: NMPattern) -> PatternEntry:
    return PatternEntry(
        file="",
        node="",
        op="",
        weight=name,
        parameter="",
        shape=(),
        dtype="",
        axis=None,
        pattern=str(pattern),
        verdict="missing",
        required=True,
        reason="expected to be sparse, and no constant matmul, Gemm or Conv weight has this name",
    )


def _parse(pattern: str | NMPattern) -> NMPattern:
    return pattern if isinstance(pattern, NMPattern) else NMPattern.parse(pattern)


def _as_names(argument: str, names: Collection[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise SparsepassError(f"{argument} has to be a collection of names, and {names!r} is one string: give [{names!r}].")
    return tuple(names)


def _open(
    source: str | os.PathLike[str] | ir.Model | onnx.ModelProto, axes: Mapping[str, int]
) -> tuple[str, Iterable[Candidate]]:
    """Name the source and find its candidates."""
    if isinstance(source, ir.Model | onnx.ModelProto):
        name = source.graph.name
        return f"model {name!r}" if name else "model", onnx_candidates(source)
    path = Path(source)
    if not path.exists():
        raise SparsepassError(f"{path} does not exist: expected an .onnx or .safetensors file, or a folder that holds some.")
    if path.is_file():
        if path.suffix == ".onnx":
            return str(path), onnx_candidates(read_onnx(path), file=path.name)
        if path.suffix == ".safetensors":
            return str(path), safetensors_candidates([path], axes)
        raise SparsepassError(f"{path} is neither an .onnx nor a .safetensors file: the pattern can be checked in these only.")
    checkpoints, graphs = safetensors_files(path), onnx_files(path)
    if not checkpoints and not graphs:
        raise SparsepassError(
            f"{path} holds nothing to check: expected model.safetensors, model.safetensors.index.json with its shards, "
            "or .onnx files (here or in onnx/)."
        )
    found = safetensors_candidates(checkpoints, axes) if checkpoints else iter(())
    return str(path), chain(found, *(onnx_candidates(read_onnx(f), file=str(f.relative_to(path))) for f in graphs))
