"""The part of a report about sparse kernels: four states that are never merged, and what follows from them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sparsepass.export.report.blocks import (
    Block,
    Column,
    Drawing,
    Drawings,
    Sentence,
    Subheading,
    Table,
    figures,
    sentences,
    words,
)
from sparsepass.export.report.charts import Bar, Line, Picture, bar_chart, line_chart
from sparsepass.export.report.file_sections import EngineEntry, EvidenceEntry, MeasuredEntry, SparsitySection
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.words import dimensions, number, size, times

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


def sparsity_view(section: SparsitySection, report: ReportDocument) -> Iterator[Block]:
    """The states in all, engine by engine, and weight by weight."""
    del report
    gpus = ", ".join(section.gpus) or "without a GPU"
    yield Sentence(f"Built by {section.runtime} {section.runtime_version}, {gpus}.")
    yield Sentence(_TOLD, tone="soft")
    engines = dict.fromkeys(layer.engine for layer in section.meant)
    by_engine = {engine: [layer for layer in section.meant if layer.engine == engine] for engine in engines}
    yield Drawings(tuple(Drawing(_states(engine, layers)) for engine, layers in by_engine.items()))
    reasons = Counter((layer.ran_sparse, layer.reason) for layer in section.meant)
    rows = [(why, ran, count) for (ran, why), count in reasons.most_common(_MOST_REASONS)]
    yield Table("Why", (sentences("why"), Column("ran sparse"), *figures("weights")), rows)
    yield Subheading("Engines")
    yield _engines(section.engines)
    yield _counts(section)
    if section.measured:
        yield Subheading("Measured latency")
        yield from _measured(section.measured)
    yield Subheading("Weight by weight")
    yield _evidence(section.layers)


def _states(engine: str, layers: Sequence[EvidenceEntry]) -> Picture:
    bars = []
    for state, name in _STATES.items():
        counts = Counter(getattr(layer, state) for layer in layers)
        told = ", ".join(f"{counts[value]} {value}" for value, _ in _TONES if counts[value])
        bars.append(Bar(label=name, parts=tuple((float(counts[value]), tone) for value, tone in _TONES), text=told))
    return bar_chart(f"{engine}: {len(layers)} weights", bars, legend=_TONES)


def _engines(engines: Sequence[EngineEntry]) -> Table:
    columns = (*words("engine", "file", "runs on"), *figures("size"), Column("flag requested"),
               *figures("eligible by the log", "chosen by the log"))  # fmt: skip
    rows = [
        (
            engine.name,
            engine.file,
            _targets(engine),
            size(engine.size_bytes),
            number(engine.flag_requested),
            "not told" if engine.num_eligible is None else engine.num_eligible,
            "not told" if engine.num_chosen is None else engine.num_chosen,
        )
        for engine in engines
    ]
    return Table("Engines", columns, rows)


def _counts(section: SparsitySection) -> Table:
    """The states in figures, for a page without the bars."""
    rows = []
    for engine in section.engines:
        states: Mapping[str, Mapping[str, int]] = section.counts.get("engines", {}).get(engine.name, {})
        told = [", ".join(f"{n} {value}" for value, n in states.get(state, {}).items() if n) for state in _STATES]
        rows.append((engine.name, _targets(engine), size(engine.size_bytes), *told))
    return Table("States", words("engine", "runs on", "size", *_STATES.values()), rows, on=("markdown",))


def _targets(engine: EngineEntry) -> str:
    return ", ".join(f"SM{capability}" for capability in engine.targets)


def _evidence(layers: Sequence[EvidenceEntry]) -> Table:
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
    columns = [*words("weight", "engine", "shape", *_STATES.values()), sentences("why")]
    columns += words("dense / sparse ms") if has_times else ()
    rows = []
    for (weight, *rest, both), names in engines.items():
        rows.append([weight, ", ".join(dict.fromkeys(names)), *rest, *([both] if has_times else [])])
    return Table("Evidence for each weight", columns, rows, is_sortable=True, style="names")


def _measured(measured: Mapping[str, MeasuredEntry]) -> Iterator[Block]:
    for name, found in list(measured.items())[:_MOST_MEASURED]:
        points = sorted(found.points, key=lambda point: point.batch * point.sequence)
        yield Sentence(found.break_even, lead=name)
        x = [float(point.batch * point.sequence) for point in points]
        lines = [
            Line(label="dense", values=[point.dense_ms for point in points], tone="n"),
            Line(label="sparse", values=[point.sparse_ms for point in points], tone="c"),
        ]
        if len(x) > 1:
            yield Drawings((Drawing(line_chart(f"Time, {name}", x, lines, x_label="tokens at once", y_label="ms")),))
        rows = [(p.batch, p.sequence, number(p.dense_ms), number(p.sparse_ms), times(p.dense_ms / p.sparse_ms)) for p in points]
        yield Table(f"Measured times, {name}", figures("batch", "tokens", "dense ms", "sparse ms", "gain"), rows)
    if len(measured) > _MOST_MEASURED:
        yield Sentence(f"{len(measured) - _MOST_MEASURED} more in report.json.", tone="soft")
