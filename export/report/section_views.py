"""The parts of a report in blocks, one function a section; layers and training have files of their own."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sparsepass.export.report import sections
from sparsepass.export.report.blocks import EVERYWHERE, Block, Column, Notes, Sentence, Subheading, Table, drawn, figures, words
from sparsepass.export.report.charts import Bar, Line, Picture, bar_chart, line_chart
from sparsepass.export.report.layers import gain_drawings, layer_facts, layer_table
from sparsepass.export.report.parts import is_number
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sizes import SizeSection
from sparsepass.export.report.speed import SpeedSection
from sparsepass.export.report.words import dimensions, number, rate, size, times

_MOST_FILES: Final = 10
_MOST_BARS: Final = 12
_MOST_LISTED: Final = 500
_STATES: Final = {
    "conforms": "weights conform",
    "flag_requested": "flag requested",
    "eligible": "eligible",
    "chosen": "chosen",
    "ran_sparse": "ran sparse",
}
_TONES: Final = (("yes", "c"), ("no", "b"), ("unknown", "n"))
_MOST_REASONS: Final = 30
_MOST_MEASURED: Final = 6
_TOLD: Final = (
    "Four states are told apart: the stored weight conforms to 2:4; the builder was allowed to use sparse kernels (flag "
    "requested); it found the layer fit for one (eligible); it took one (chosen). None follows from another. Counted over the "
    "weights that are meant to be sparse."
)
CHECKED: Final = {True: "held", False: "DID NOT HOLD", None: "not checked"}


def accuracy_view(section: sections.AccuracySection, report: ReportDocument) -> Iterator[Block]:
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
        yield drawn(bar_chart("Perplexity (shorter is better)", bars))
    rows += _exported(report)
    yield Table("Perplexities", (Column("model"), *figures("perplexity", f"times {first.name}")), rows, on=EVERYWHERE)
    bos = "each window begins with the BOS token" if first.bos else "no BOS token"
    windows = f"{first.num_tokens} tokens scored, windows of {first.context}, stride {first.stride}, {bos}"
    said = f"Perplexity on {section.text}: {windows}, computed in {first.dtype}. Lower is better."
    yield Sentence(said, tone="soft", on=EVERYWHERE)


def _exported(report: ReportDocument) -> Iterator[tuple[str, str, str]]:
    """A row on the exported artifact, whose perplexity nobody measured, but whose outputs were compared."""
    if report.artifact is None:
        return
    checks = report.verification.checks if report.verification is not None else []
    held = next((check.held for check in checks if check.name == "outputs"), None)
    said = {None: "not known: not run here", True: "as the program's: outputs agree", False: "not known: outputs DIFFER"}[held]
    yield f"exported files ({report.artifact.target}, {report.artifact.dtype})", said, ""


def plan_view(section: sections.PlanSection, report: ReportDocument) -> Iterator[Block]:
    """What 2:4 is predicted to gain: workload by workload, layer by layer, and in memory."""
    named = f"{section.device.get('title', '')}, runtime {section.runtime.get('name', '')}, {section.dtype} weights"
    yield Sentence(f"{named}. A forecast from a roofline, not a measurement.")
    bars = []
    for point in section.points[:_MOST_BARS]:
        for phase, found in (("prefill", point.prefill), ("decode", point.decode)):
            if found is not None:
                label, tone = f"{phase}, batch {point.batch}, {point.seq} tokens", "c" if found.speedup >= 1 else "b"
                bars.append(Bar(label=label, parts=((found.speedup, tone),), text=times(found.speedup)))
    yield drawn(bar_chart("Predicted gain as recommended (longer is better)", bars, reference=(1.0, "dense")))
    columns = figures("batch", "prompt", "prefill, dense", "planned", "gain", "a token, dense", "planned", "gain")
    yield Table("Predicted times", columns, list(map(_workload_row, section.points)))
    if section.passes:
        yield Sentence(f"Recommended passes: `{section.passes}`")
    yield Subheading("Weights in memory")
    bytes_of = [(row.dtype, (row.dense_bytes, row.planned_bytes, row.everything_bytes)) for row in section.memory]
    rows = [(dtype, *(size(float(count)) for count in counts)) for dtype, counts in bytes_of]
    columns = (Column("linear layers in"), *figures("dense", "as recommended", "all 2:4"))
    yield Table("Weights in memory", columns, rows)
    yield Notes(tuple(section.notes))
    layers = layer_facts(report)
    yield gain_drawings(layers)
    if report.passes is None:
        yield Subheading("Layer by layer")
        yield layer_table(layers)
    else:
        yield Sentence("Each layer's predicted gain stands in the table of layers.", tone="soft")


def _workload_row(point: sections.WorkloadEntry) -> list[object]:
    row: list[object] = [point.batch, point.seq]
    for found in (point.prefill, point.decode):
        both = () if found is None else (found.dense_s, found.planned_s)
        row += [f"{number(1e3 * value)} ms" if is_number(value) else "" for value in both] or ["", ""]
        row.append("" if found is None else times(found.speedup))
    return row


def artifact_view(section: sections.ArtifactSection, report: ReportDocument) -> Iterator[Block]:
    """Files and their sizes, as bars and as a table."""
    total = f"{size(section.size_bytes)} in {len(section.files)} files"
    yield Sentence(f"{section.target}, {section.dtype}: {total}.", on=EVERYWHERE)
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
        yield drawn(bar_chart("Sizes on disk", bars))
    read = all(Path(name).suffix in ("", ".onnx", ".safetensors") for name in section.expected_sparse)
    again = ", and `sparsepass verify` on this folder checks them again" if read else ""
    yield Sentence(
        f"{section.num_sparse} stored weights have to be N:M sparse; `artifact.expected_sparse` in report.json names "
        f"them{again}. A sparse weight is stored with its zeros, so the files are as "
        "large as dense ones; runtimes that know 2:4 pack it when they load it."
    )
    yield Notes(tuple(section.notes))
    rows = [(name, size(count), f"{count:,}") for name, count in ordered[:_MOST_LISTED]]
    yield Table("All files", (Column("file"), *figures("size", "bytes")), rows, folded="All files")


def verification_view(section: sections.VerificationSection, report: ReportDocument) -> Iterator[Block]:
    """Each check, whether it held, and what was found."""
    if not section.checks:
        yield Sentence("Verification was switched off: nothing is known of the written files.", tone="unknown", on=EVERYWHERE)
    else:
        rows = [(check.name, CHECKED[check.held], check.summary) for check in section.checks]
        yield Table("Checks", (*words("check", "result"), Column("what was found", "sentences")), rows, on=EVERYWHERE)


def pattern_view(section: sections.PatternSection, report: ReportDocument) -> Iterator[Block]:
    """What `sparsepass verify` found in the stored weights."""
    columns = (*words("weight", "verdict", "stored shape"), *figures("summed along axis", "zeros", "groups that violate"),
               Column("why", "sentences"))  # fmt: skip
    for found in section.reports:
        yield Sentence(found.said, lead=found.source)
        rows = [_stored_row(entry) for entry in found.entries]
        yield Table(f"Weights of {found.source}", columns, rows, is_sortable=True, style="names")


def _stored_row(entry: sections.StoredEntry) -> Sequence[object]:
    total = math.prod(entry.shape)
    zeros = f"{100 * (1 - entry.num_nonzeros / total):.4g}%" if entry.num_groups and total else ""
    axis = "" if entry.axis is None else entry.axis
    return entry.weight, entry.verdict, dimensions(entry.shape), axis, zeros, entry.num_violations or "", entry.reason


def samples_view(section: sections.SamplesSection, report: ReportDocument) -> Iterator[Block]:
    """Inputs and outputs to check another runtime against."""
    yield Sentence(f"`{section.file}` holds these tensors, so that another runtime can be checked against this export.")
    named = (("inputs", section.inputs), ("outputs", section.outputs))
    rows = [(name, kind, dimensions(found.shape), found.dtype) for kind, each in named for name, found in each.items()]
    yield Table("Samples", words("name", "kind", "shape", "type"), rows[:_MOST_LISTED])


def model_view(section: sections.ModelSection, report: ReportDocument) -> Iterator[Block]:
    """Where the model came from."""
    rows: list[tuple[str, object]] = [
        ("source", f"{section.source} ({section.kind})"),
        ("class", section.class_ or ""),
        ("parameters", f"{section.num_parameters:,}"),
        ("type of the weights", section.dtype),
        ("revision", section.revision or ""),
        ("commit", section.commit or ""),
        ("gguf_file", section.gguf_file or ""),
    ]
    yield Table.of_facts("Model", rows)
    yield Notes(tuple(section.notes or ()))


def sparsity_view(section: sections.SparsitySection, report: ReportDocument) -> Iterator[Block]:
    """The states in all, engine by engine, and weight by weight."""
    gpus = ", ".join(section.gpus) or "without a GPU"
    yield Sentence(f"Built by {section.runtime} {section.runtime_version}, {gpus}.")
    yield Sentence(_TOLD, tone="soft")
    engines = dict.fromkeys(layer.engine for layer in section.meant)
    by_engine = {engine: [layer for layer in section.meant if layer.engine == engine] for engine in engines}
    yield drawn(*(_states(engine, layers) for engine, layers in by_engine.items()))
    reasons = Counter((layer.ran_sparse, layer.reason) for layer in section.meant)
    rows = [(why, ran, count) for (ran, why), count in reasons.most_common(_MOST_REASONS)]
    yield Table("Why", (Column("why", "sentences"), Column("ran sparse"), *figures("weights")), rows)
    yield Subheading("Engines")
    yield _engines(section.engines)
    yield _counts(section)
    if section.measured:
        yield Subheading("Measured latency")
        yield from _measured(section.measured)
    yield Subheading("Weight by weight")
    yield _evidence(section.layers)


def speed_view(section: SpeedSection, report: ReportDocument) -> Iterator[Block]:
    """Which kernels ran, and what they took: times, memory, size."""
    turns = ", the models taking turns" if len(section.sides) > 1 else ""
    yield Sentence(f"Measured on {section.place}: medians of {section.repeats} runs{turns}.", on=EVERYWHERE)
    for side in section.sides:
        yield Sentence(f"{side.name}: {side.said}.", on=EVERYWHERE)
    decoding = [point for point in section.points if point.phase == "decode"]
    if decoding:
        lengths = f"{decoding[0].new_tokens - 1} tokens after the first, behind prompts of {decoding[0].prompt_tokens}"
        said = f"Decoding: {lengths}, greedily, by generate with a static cache where the model has one."
        yield Sentence(said, tone="soft", on=EVERYWHERE)
    bars = [
        Bar(label=f"{side.name}, batch {point.batch}", parts=((value, tone),), text=rate(value))
        for point in decoding
        for side, value, tone in zip(section.sides, point.rates, ("c", "n"), strict=False)
    ]
    if bars:
        yield drawn(bar_chart("Decoding: tokens a second (longer is better)", bars))
    named = [side.name for side in section.sides]
    over = [f"times {named[1]}"] if len(named) > 1 else []
    shown: dict[str, Callable[[float], str]] = {"rate": rate, "seconds": lambda value: f"{number(value)} s", "bytes": size}
    rows = []
    for said, values, kind in section.rows():
        factor = [times(values[0] / values[1]) if len(values) > 1 and values[1] else ""] if over else []
        rows.append((said, *map(shown[kind], values), *factor))
    yield Table("Speed, memory and size", (Column("what"), *figures(*named, *over)), rows, on=EVERYWHERE)
    spread = [float(result.spread) for point in section.points for result in point.results if is_number(result.spread)]
    if spread:
        yield Sentence(
            f"Runs of one measurement lie apart by up to {max(spread):.0%} of their median.", tone="soft", on=EVERYWHERE
        )


def size_view(section: SizeSection, report: ReportDocument) -> Iterator[Block]:
    """What the model takes in each form, part by part, and what files take."""
    yield Sentence(
        f"{section.num_layers} layers that passes take hold {section.num_layer_weights:,} of {section.num_parameters:,} "
        f"numbers. Counted from the shapes of the tensors; integers have a scale for each {section.group_size or 'row'}"
        f"{' input features' if section.group_size else ''}.",
        on=EVERYWHERE,
    )
    full, half = section.forms[0], section.forms[1]
    rows = [
        (
            form.form,
            *(size(part) for part in (form.layers_bytes, form.embedding_bytes, form.total_bytes)),
            times(full.total_bytes / form.total_bytes),
            times(half.total_bytes / form.total_bytes),
            times(full.layers_bytes / form.layers_bytes) if form.layers_bytes else "",
        )
        for form in section.forms
    ]
    columns = figures("layers", "embedding", "together", "of fp32", "of bf16", "layers of fp32")
    yield Table("Promised", (Column("form"), *columns), rows, on=EVERYWHERE)
    parts = [
        (
            form.form,
            *(size(part) for part in (form.values_bytes, form.indices_bytes, form.scales_bytes, form.branches_bytes)),
            size(form.embedding_bytes),
            size(form.others_bytes),
        )
        for form in section.forms
    ]
    named = figures("values", "places", "scales", "SLoRB", "embedding", "all else")
    yield Table("Part by part", (Column("form"), *named), parts)
    bars = [Bar(label=form.form, parts=((form.total_bytes, "c"),), text=size(form.total_bytes)) for form in section.forms]
    yield drawn(bar_chart("The whole model (shorter is smaller)", bars))
    if section.files:
        found = [
            (
                file.source,
                size(file.bytes),
                file.form or "",
                "" if file.promised_bytes is None else size(file.promised_bytes),
                "" if not file.promised_bytes else f"{file.bytes / file.promised_bytes - 1:+.2%}",
                times(full.total_bytes / file.bytes),
                times(half.total_bytes / file.bytes),
            )
            for file in section.files
        ]
        named = (
            Column("file or folder"),
            *figures("takes"),
            Column("form"),
            *figures("promised", "off by", "of fp32", "of bf16"),
        )
        yield Table("Measured", named, found, on=EVERYWHERE)
    if section.paper:
        yield Sentence(f"{section.paper}.", tone="soft", on=EVERYWHERE)


def _states(engine: str, layers: Sequence[sections.EvidenceEntry]) -> Picture:
    bars = []
    for state, name in _STATES.items():
        counts = Counter(getattr(layer, state) for layer in layers)
        told = ", ".join(f"{counts[value]} {value}" for value, _ in _TONES if counts[value])
        bars.append(Bar(label=name, parts=tuple((float(counts[value]), tone) for value, tone in _TONES), text=told))
    return bar_chart(f"{engine}: {len(layers)} weights", bars, legend=_TONES)


def _engines(engines: Sequence[sections.EngineEntry]) -> Table:
    columns = (*words("engine", "file", "runs on"), *figures("size"), Column("flag requested"),
               *figures("eligible by the log", "chosen by the log"))  # fmt: skip
    rows = []
    for engine in engines:
        told = ["not told" if count is None else count for count in (engine.num_eligible, engine.num_chosen)]
        known = engine.name, engine.file, _targets(engine), size(engine.size_bytes), number(engine.flag_requested)
        rows.append((*known, *told))
    return Table("Engines", columns, rows)


def _counts(section: sections.SparsitySection) -> Table:
    """The states in figures, for a page without the bars."""
    rows = []
    for engine in section.engines:
        states: Mapping[str, Mapping[str, int]] = section.counts.get("engines", {}).get(engine.name, {})
        told = [", ".join(f"{n} {value}" for value, n in states.get(state, {}).items() if n) for state in _STATES]
        rows.append((engine.name, _targets(engine), size(engine.size_bytes), *told))
    return Table("States", words("engine", "runs on", "size", *_STATES.values()), rows, on=("markdown",))


def _targets(engine: sections.EngineEntry) -> str:
    return ", ".join(f"SM{capability}" for capability in engine.targets)


def _evidence(layers: Sequence[sections.EvidenceEntry]) -> Table:
    """One row a weight; engines of which all the same is known share it."""
    engines: dict[tuple[Any, ...], list[str]] = {}
    reasons = Counter(layer.reason for layer in layers)
    for layer in layers:
        states = [getattr(layer, state) for state in _STATES]
        # The table of reasons tells a long one that many rows share in full.
        reason = layer.reason.partition(":")[0] if len(layer.reason) > 60 and reasons[layer.reason] > 3 else layer.reason
        both = " / ".join(number(value) for value in (layer.dense_ms, layer.sparse_ms) if value is not None)
        engines.setdefault((layer.weight, dimensions(layer.shape), *states, reason, both), []).append(layer.engine)
    has_times = any(key[-1] for key in engines)
    columns = [*words("weight", "engine", "shape", *_STATES.values()), Column("why", "sentences")]
    columns += words("dense / sparse ms") if has_times else ()
    rows = []
    for (weight, *rest, both), names in engines.items():
        rows.append([weight, ", ".join(dict.fromkeys(names)), *rest, *([both] if has_times else [])])
    return Table("Evidence for each weight", columns, rows, is_sortable=True, style="names")


def _measured(measured: Mapping[str, sections.MeasuredEntry]) -> Iterator[Block]:
    for name, found in list(measured.items())[:_MOST_MEASURED]:
        points = sorted(found.points, key=lambda point: point.batch * point.sequence)
        yield Sentence(found.break_even, lead=name)
        x = [float(point.batch * point.sequence) for point in points]
        dense = Line(label="dense", values=[point.dense_ms for point in points], tone="n")
        sparse = Line(label="sparse", values=[point.sparse_ms for point in points], tone="c")
        if len(x) > 1:
            yield drawn(line_chart(f"Time, {name}", x, [dense, sparse], x_label="tokens at once", y_label="ms"))
        rows = [(p.batch, p.sequence, number(p.dense_ms), number(p.sparse_ms), times(p.dense_ms / p.sparse_ms)) for p in points]
        yield Table(f"Measured times, {name}", figures("batch", "tokens", "dense ms", "sparse ms", "gain"), rows)
    if len(measured) > _MOST_MEASURED:
        yield Sentence(f"{len(measured) - _MOST_MEASURED} more in report.json.", tone="soft")
