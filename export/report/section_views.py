"""The parts of a report in blocks, one function a section; training, layers and sparse kernels have files of their own."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from sparsepass.export.report.blocks import (
    EVERYWHERE,
    Block,
    Column,
    Drawing,
    Drawings,
    Notes,
    Sentence,
    Subheading,
    Table,
    facts,
    figures,
    sentences,
    words,
)
from sparsepass.export.report.charts import Bar, bar_chart
from sparsepass.export.report.file_sections import (
    ArtifactSection,
    PatternSection,
    PlanSection,
    SamplesSection,
    StoredEntry,
    VerificationSection,
    WorkloadEntry,
)
from sparsepass.export.report.layer_view import gain_drawings, layer_table
from sparsepass.export.report.layers import layer_facts
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sections import AccuracySection, ModelSection, is_number
from sparsepass.export.report.words import dimensions, number, size, times

_MOST_FILES: Final = 10
_MOST_BARS: Final = 12
_MOST_LISTED: Final = 500
CHECKED: Final = {True: "held", False: "DID NOT HOLD", None: "not checked"}


def accuracy_view(section: AccuracySection, report: ReportDocument) -> Iterator[Block]:
    """Perplexities as bars and as a table, and what is known of the exported files."""
    if not section.measurements:
        return
    first, rows, bars = section.measurements[0], [], []
    for entry in section.measurements:
        value, base = entry.perplexity, first.perplexity
        ratio = times(value / base) if is_number(value) and is_number(base) and base > 0 else ""
        rows.append((entry.name, number(value), ratio))
        if is_number(value):
            tone = "n" if entry is first else "a"
            bars.append(Bar(label=entry.name, parts=((float(value), tone),), text=f"{number(value)}  {ratio}"))
    if bars:
        yield Drawings((Drawing(bar_chart("Perplexity (shorter is better)", bars)),))
    rows += _exported(report)
    yield Table("Perplexities", (Column("model"), *figures("perplexity", f"times {first.name}")), rows, on=EVERYWHERE)
    bos = "each window begins with the BOS token" if first.bos else "no BOS token"
    yield Sentence(
        f"Perplexity on {section.text}: {first.num_tokens} tokens scored, windows of {first.context}, stride {first.stride}, "
        f"{bos}, computed in {first.dtype}. Lower is better.",
        tone="soft",
        on=EVERYWHERE,
    )


def _exported(report: ReportDocument) -> Iterator[tuple[str, str, str]]:
    """A row on the exported artifact, whose perplexity nobody measured, but whose outputs were compared."""
    if report.artifact is None:
        return
    checks = [] if report.verification is None else [check for check in report.verification.checks if check.name == "outputs"]
    if not checks or checks[0].held is None:
        said = "not known: not run here"
    else:
        said = "as the program's: outputs agree" if checks[0].held else "not known: outputs DIFFER"
    yield f"exported files ({report.artifact.target}, {report.artifact.dtype})", said, ""


def plan_view(section: PlanSection, report: ReportDocument) -> Iterator[Block]:
    """What 2:4 is predicted to gain: workload by workload, layer by layer, and in memory."""
    named = f"{section.device.get('title', '')}, runtime {section.runtime.get('name', '')}, {section.dtype} weights"
    yield Sentence(f"{named}. A forecast from a roofline, not a measurement.")
    bars = []
    for point in section.points[:_MOST_BARS]:
        for phase, found in (("prefill", point.prefill), ("decode", point.decode)):
            if found is not None:
                label, tone = f"{phase}, batch {point.batch}, {point.seq} tokens", "c" if found.speedup >= 1 else "b"
                bars.append(Bar(label=label, parts=((found.speedup, tone),), text=times(found.speedup)))
    picture = bar_chart("Predicted gain as recommended (longer is better)", bars, reference=(1.0, "dense"))
    yield Drawings((Drawing(picture),))
    columns = figures("batch", "prompt", "prefill, dense", "planned", "gain", "a token, dense", "planned", "gain")
    yield Table("Predicted times", columns, list(map(_workload_row, section.points)))
    if section.passes:
        yield Sentence(f"Recommended passes: `{section.passes}`")
    yield Subheading("Weights in memory")
    rows = [
        (row.dtype, *(size(float(found)) for found in (row.dense_bytes, row.planned_bytes, row.everything_bytes)))
        for row in section.memory
    ]
    columns = (Column("linear layers in"), *figures("dense", "as recommended", "all 2:4"))
    yield Table("Weights in memory", columns, rows)
    yield Notes(tuple(section.notes))
    layers = layer_facts(report)
    yield Drawings(gain_drawings(layers))
    if report.passes is None:
        yield Subheading("Layer by layer")
        yield layer_table(layers)
    else:
        yield Sentence("Each layer's predicted gain stands in the table of layers.", tone="soft")


def _workload_row(point: WorkloadEntry) -> list[object]:
    row: list[object] = [point.batch, point.seq]
    for found in (point.prefill, point.decode):
        both = () if found is None else (found.dense_s, found.planned_s)
        row += [f"{number(1e3 * value)} ms" if is_number(value) else "" for value in both] or ["", ""]
        row.append("" if found is None else times(found.speedup))
    return row


def artifact_view(section: ArtifactSection, report: ReportDocument) -> Iterator[Block]:
    """Files and their sizes, as bars and as a table."""
    yield Sentence(
        f"{section.target}, {section.dtype}: {size(section.size_bytes)} in {len(section.files)} files.", on=EVERYWHERE
    )
    ordered = sorted(section.files.items(), key=lambda item: -item[1])
    sizes = [(name, count, "a") for name, count in ordered[:_MOST_FILES]]
    if rest := ordered[_MOST_FILES:]:
        sizes.append((f"{len(rest)} smaller files", sum(count for _, count in rest), "n"))
    files = {} if report.model is None else report.model.files or {}
    dense = sum(int(count) for name, count in files.items() if name.endswith((".safetensors", ".gguf")) and is_number(count))
    if dense:
        sizes.append(("for comparison: weights of the model it came from", dense, "n"))
    bars = [Bar(label=name, parts=((float(count), tone),), text=size(count)) for name, count, tone in sizes]
    if bars:
        yield Drawings((Drawing(bar_chart("Sizes on disk", bars)),))
    yield Sentence(
        f"{section.num_sparse} stored weights have to be N:M sparse; `artifact.expected_sparse` in report.json names them, and "
        "`sparsepass verify` on this folder checks them again. A sparse weight is stored with its zeros, so the files are as "
        "large as dense ones; runtimes that know 2:4 pack it when they load it."
    )
    yield Notes(tuple(section.notes))
    rows = [(name, size(count), f"{count:,}") for name, count in ordered[:_MOST_LISTED]]
    yield Table("All files", (Column("file"), *figures("size", "bytes")), rows, folded="All files")


def verification_view(section: VerificationSection, report: ReportDocument) -> Iterator[Block]:
    """Each check, whether it held, and what was found."""
    del report
    if section.held is None:
        yield Sentence("Verification was switched off: nothing is known of the written files.", tone="unknown", on=EVERYWHERE)
    else:
        rows = [(check.name, CHECKED[check.held], check.summary) for check in section.checks]
        yield Table("Checks", (*words("check", "result"), sentences("what was found")), rows, on=EVERYWHERE)


def pattern_view(section: PatternSection, report: ReportDocument) -> Iterator[Block]:
    """What `sparsepass verify` found in the stored weights."""
    del report
    columns = (*words("weight", "verdict", "stored shape"), *figures("summed along axis", "zeros", "groups that violate"),
               sentences("why"))  # fmt: skip
    for found in section.reports:
        yield Sentence(found.said, lead=found.source)
        rows = [_stored_row(entry) for entry in found.entries]
        yield Table(f"Weights of {found.source}", columns, rows, is_sortable=True, style="names")


def _stored_row(entry: StoredEntry) -> Sequence[object]:
    total = math.prod(entry.shape)
    zeros = f"{100 * (1 - entry.num_nonzeros / total):.4g}%" if entry.num_groups and total else ""
    axis = "" if entry.axis is None else entry.axis
    return entry.weight, entry.verdict, dimensions(entry.shape), axis, zeros, entry.num_violations or "", entry.reason


def samples_view(section: SamplesSection, report: ReportDocument) -> Iterator[Block]:
    """Inputs and outputs to check another runtime against."""
    del report
    yield Sentence(f"`{section.file}` holds these tensors, so that another runtime can be checked against this export.")
    named = (("inputs", section.inputs), ("outputs", section.outputs))
    rows = [(name, kind, dimensions(found.shape), found.dtype) for kind, each in named for name, found in each.items()]
    yield Table("Samples", words("name", "kind", "shape", "type"), rows[:_MOST_LISTED])


def model_view(section: ModelSection, report: ReportDocument) -> Iterator[Block]:
    """Where the model came from."""
    del report
    rows: list[tuple[str, object]] = [
        ("source", f"{section.source} ({section.kind})"),
        ("class", section.class_ or ""),
        ("parameters", f"{section.num_parameters:,}"),
        ("type of the weights", section.dtype),
        ("revision", section.revision or ""),
        ("commit", section.commit or ""),
        ("gguf_file", section.gguf_file or ""),
    ]
    yield facts("Model", rows)
    yield Notes(tuple(section.notes or ()))
