"""Does a file hold the N:M pattern, on the axis along which each matmul reduces? For ONNX and safetensors.

The checker trusts the stored values only: no name, no recipe, no mask. In an ONNX file, the graph tells along which axis
each weight is reduced. In a safetensors file, the conventions of Hugging Face tell it, and `axes` overrides them.

`PatternReport.conforms` depends on these weights:

1. With `expected_sparse`: exactly those weights, in every use. All others are dense on purpose.
2. Without it: every constant weight of MatMul, Gemm and Conv (and of their quantized and fused variants), less those that
   `ignore` and `expected_dense` name. A weight that is not eligible or not checkable is not proven, so it fails.
3. Weights without an N:M rule (ConvTranspose, recurrent) and products that reduce nothing (K = 1) are listed only.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from sparsepass.export.pattern.bits import GroupCount, count_groups, is_conforming
from sparsepass.export.pattern.candidates import Candidate, NamePatterns, Use
from sparsepass.export.pattern.cause import Cause, likely_cause, wrong_axis
from sparsepass.export.pattern.checkpoints import safetensors_candidates, safetensors_files, tensor_candidates
from sparsepass.export.pattern.onnx import onnx_candidates, onnx_files, read_onnx
from sparsepass.export.pattern.report import PatternEntry, PatternReport, Verdict
from sparsepass.graph.fusion import split_siblings
from sparsepass.graph.program import Program, masked_weight
from sparsepass.graph.support import SparsepassError, item_progress, shows_progress
from sparsepass.passes.maths import NMPattern

# Looking for a merged adapter takes up to a second. So only the first weight of each kind of layer is looked at, and its
# cause is taken to hold for the others of that kind whose zeros were filled.
_NUM_LOOKED_AT = 12


def check_pattern(
    source: str | os.PathLike[str] | ir.Model | onnx.ModelProto | Mapping[str, Tensor] | nn.Module,
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
            are checked. Or a model or program in memory. Or tensors by name, such as a state dict, which are taken as a
            checkpoint's.
        pattern: The pattern asked for: at most N nonzeros in M consecutive entries along K.
        ignore: Weights to leave out, by name of weight, module or node: exact, with globs, or a regular expression
            of the whole name after "re:".
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
    wanted = _Asked(
        pattern=asked,
        sparse=sparse,
        sparse_names=NamePatterns(sparse or ()),
        dense_names=NamePatterns(dense),
        ignored_names=NamePatterns(ignored),
    )
    plans = [_plan(candidate, wanted) for candidate in candidates]
    given = NamePatterns(axes or ())
    for candidate in candidates:
        given.matching(candidate.names)
    # A weight that is expected and not there is reported as missing; any other name without a weight is a mistake.
    if strays := [name for name in given.unmet if name not in (sparse or {})]:
        raise SparsepassError(
            f"axes names {strays[0]!r}, and {label} has no such weight: give a weight's name, or a glob that means one."
        )

    # Uses that read the same bytes along the same axis are one piece of work.
    work = {
        (candidate.key, candidate.axis, plan.pattern): (candidate, plan.pattern)
        for candidate, plan in zip(candidates, plans, strict=True)
        if plan.finding is None
    }
    findings: dict[Any, _Finding] = {}
    with (
        ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool,
        item_progress(shows_progress(None), "weights checked", len(work)) as advance,
    ):
        for (key, (candidate, _)), finding in zip(
            work.items(), pool.map(lambda asked: _judge(*asked), work.values()), strict=True
        ):
            findings[key] = finding
            advance(candidate.names[0] if candidate.names else "")

    judged = [
        (candidate, plan, plan.finding or findings[candidate.key, candidate.axis, plan.pattern])
        for candidate, plan in zip(candidates, plans, strict=True)
    ]
    entries = _with_causes(judged)
    entries += [_missing(name, sparse[name]) for name in wanted.sparse_names.unmet] if sparse else []
    return PatternReport(
        source=label,
        pattern=str(asked),
        entries=tuple(entries),
        stated=expected_sparse is not None or expected_dense is not None,
        unused=wanted.ignored_names.unmet,
    )


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What was found for one use: the verdict, and the counts if the weight was read."""

    verdict: Verdict
    reason: str = ""
    count: GroupCount | None = None
    conforming_axes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Requirements:
    """How a candidate is judged; `finding` is set if no data has to be read for it."""

    pattern: NMPattern
    required: bool
    finding: _Finding | None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the caller asked for."""

    pattern: NMPattern
    sparse: Mapping[str, NMPattern] | None
    sparse_names: NamePatterns
    dense_names: NamePatterns
    ignored_names: NamePatterns


def _plan(candidate: Candidate, wanted: _Asked) -> _Requirements:
    names = candidate.names
    expected = [(wanted.sparse or {})[name] for name in wanted.sparse_names.matching(names)]
    on_purpose = next(iter(wanted.dense_names.matching(names)), None)
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
    pattern = expected[0] if expected else wanted.pattern
    skip = next((f"ignored by {name!r}" for name in wanted.ignored_names.matching(names)), None)
    if skip is None and not expected:
        if on_purpose is not None or wanted.sparse is not None:
            skip = "dense on purpose"
        elif candidate.problem is None:
            skip = candidate.aside
    if skip is not None:
        return _Requirements(pattern=pattern, required=False, finding=_Finding(verdict="left out", reason=skip))
    finding = None
    if candidate.problem is not None:
        finding = _Finding(verdict="not checkable", reason=candidate.problem)
    else:
        assert candidate.axis is not None, "a candidate without a problem knows its axis"
        num_in = candidate.shape[candidate.axis]
        if num_in % pattern.m:
            finding = _Finding(verdict="not eligible", reason=f"not eligible: K={num_in} is not a multiple of {pattern.m}")
    return _Requirements(pattern=pattern, required=bool(expected) or candidate.aside is None, finding=finding)


def _judge(candidate: Candidate, pattern: NMPattern) -> _Finding:
    """Read a weight and count."""
    n, m, axis = pattern.n, pattern.m, candidate.axis
    assert candidate.read is not None, "a candidate without a problem can be read"
    assert axis is not None, "a candidate without a problem knows its axis"
    view = candidate.read()
    count = count_groups(view, n, m, axis)
    remarks = [candidate.remark] if candidate.remark else []
    remarks += [f"computed by {', '.join(candidate.computed)}"] if candidate.computed else []
    if count.num_violations and candidate.multiplied is not None and (found := candidate.multiplied()) is not None:
        rounded = count_groups(found[0], n, m, found[1])
        if not rounded.num_violations:
            remarks.append(f"{count.num_nonzeros - rounded.num_nonzeros} stored values become zero on the way to the product")
            count = rounded
    if not count.num_violations:
        zeros = count.num_negative_zeros
        remarks += [f"{zeros} zeros are -0.0, which some packers refuse"] if zeros else []
        return _Finding(verdict="conforms", reason="; ".join(remarks), count=count)
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
    return _Finding(verdict="violates", reason="; ".join((reason, *remarks)), count=count, conforming_axes=others)


def _with_causes(judged: Iterable[tuple[Candidate, _Requirements, _Finding]]) -> list[PatternEntry]:
    """The entries; those of required weights that violate say what probably happened to them."""
    looked_at: dict[str, Cause] = {}
    known: dict[object, Cause] = {}
    entries = []
    for candidate, plan, finding in judged:
        entry = _entry(candidate, plan, finding)
        if finding.verdict != "violates" or not plan.required:
            entries.append(entry)
            continue
        assert candidate.axis is not None, "a weight was counted along an axis"
        assert candidate.read is not None, "a weight that was counted can be read"
        assert finding.count is not None, "a weight that violates was counted"
        key = (candidate.key, candidate.axis, plan.pattern)
        if finding.conforming_axes:
            known[key] = wrong_axis(candidate.axis, finding.conforming_axes)
        elif key not in known:
            look = entry.layer_kind not in looked_at and len(looked_at) < _NUM_LOOKED_AT
            n, m = plan.pattern.n, plan.pattern.m
            cause = likely_cause(candidate.read(), candidate.dtype, n, m, candidate.axis, finding.count, look_for_rank=look)
            like = looked_at.setdefault(entry.layer_kind, cause) if look else looked_at.get(entry.layer_kind, cause)
            known[key] = like if (cause.kind, like.kind) == ("trained without mask", "merged adapter") else cause
        entries.append(replace(entry, cause=known[key]))
    return entries


def _entry(candidate: Candidate, plan: _Requirements, finding: _Finding) -> PatternEntry:
    return PatternEntry(
        **{field.name: getattr(candidate, field.name) for field in fields(Use)},
        pattern=str(plan.pattern),
        verdict=finding.verdict,
        required=plan.required,
        reason=finding.reason,
        conforming_axes=finding.conforming_axes,
        computed=candidate.computed,
        **(asdict(finding.count) if finding.count else {}),
    )


def _missing(name: str, pattern: NMPattern) -> PatternEntry:
    return PatternEntry(
        weight=name,
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
    source: str | os.PathLike[str] | ir.Model | onnx.ModelProto | Mapping[str, Tensor] | nn.Module, axes: Mapping[str, int]
) -> tuple[str, Iterable[Candidate]]:
    """Name the source and find its candidates."""
    if isinstance(source, Program):
        source = split_siblings(source)
        weights = {name: masked_weight(source, name) for name, t in source.tensors().items() if isinstance(t, nn.Parameter)}
        layers = [site for site in source.sites() if site.weight in weights and site.layout not in ("embedding", "computed")]
        own = {site.weight: site.nm_axis for site in layers}
        return "program in memory", tensor_candidates(weights, own | dict(axes), source.origin.config)
    if isinstance(source, nn.Module):
        config: Any = getattr(source, "config", None)
        facts = config.to_dict() if hasattr(config, "to_dict") else None
        return f"{type(source).__name__} in memory", tensor_candidates(source.state_dict(), axes, facts)
    if isinstance(source, Mapping):
        return "tensors in memory", tensor_candidates(source, axes)
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
    folders = [path]
    if not safetensors_files(path) and not onnx_files(path):
        # A pipeline of several models, such as those of diffusers, has each in a folder of its own.
        folders = sorted({file.parent for kind in ("*.safetensors", "*.onnx") for file in path.rglob(kind)})
    if not folders:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise SparsepassError(
            f"{path} holds nothing to check: expected model.safetensors, model.safetensors.index.json with its shards, "
            "or .onnx files (here, in onnx/ or in folders below)."
            + (" Pickled weights (.bin, .pt) are not read: save them as safetensors." if pickled else "")
        )
    return str(path), chain.from_iterable(_in_folder(folder, path, axes) for folder in folders)


def _in_folder(folder: Path, root: Path, axes: Mapping[str, int]) -> Iterator[Candidate]:
    checkpoints = safetensors_files(folder)
    for candidate in safetensors_candidates(checkpoints, axes) if checkpoints else ():
        yield replace(candidate, file=str((folder / candidate.file).relative_to(root)))
    for graph in onnx_files(folder):
        yield from onnx_candidates(read_onnx(graph), file=str(graph.relative_to(root)))
