"""The part of a report about layers: what each is, what it lost, what training moved, what ran sparse."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from sparsepass.export.report.answers import skipped_rows
from sparsepass.export.report.blocks import Block, Column, Drawing, Drawings, Subheading, Table, figures, sentences, words
from sparsepass.export.report.charts import grid_chart
from sparsepass.export.report.depth import DepthGrid, depth_grid
from sparsepass.export.report.layers import LayerFacts, layer_facts
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sections import OutputsEntry, PassEntry, PassesSection
from sparsepass.export.report.words import dimensions, number, percent, times

_MOST_REASONS: Final = 30
_RAN_TONES: Final = {"yes": "c", "no": "b", "unknown": "n"}


def passes_view(section: PassesSection, report: ReportDocument) -> Iterator[Block]:
    """What each pass did, pictures over the model's depth, what was left dense, and every layer."""
    layers = layer_facts(report)
    if section.passes:
        columns = (Column("pass", "code"), *figures("layers"), *words("how far the outputs moved", "calibrated on"),
                   *figures("time"))  # fmt: skip
        yield Table("Passes", columns, [_pass_row(record) for record in section.passes])
    if layers:
        grid = depth_grid(layer.name for layer in layers)
        yield Drawings((_zeros(layers, grid), *_errors(layers, grid), *_ran(layers, grid)))
    reasons = skipped_rows(section)
    if reasons:
        yield Subheading("Left dense, and why")
        columns = (Column("reason"), *figures("layers"), Column("which"))
        yield Table("Layers left dense, and why", columns, reasons[:_MOST_REASONS])
    tally = [(str(section.num_sparse), "sparse"), *((str(n), f"dense: {why} ({which})") for why, n, which in reasons)]
    yield Table("Linear layers", (*figures("layers"), Column("")), tally, on=("terminal",))
    if layers:
        yield Subheading("Layer by layer")
        yield layer_table(layers)


def layer_table(layers: Sequence[LayerFacts]) -> Table:
    """Every layer with all that is known of it, as columns that at least one layer has something for."""
    passes = list(dict.fromkeys(name for layer in layers for name in layer.errors))
    engines = list(dict.fromkeys(engine for layer in layers for engine in layer.ran))
    found: list[tuple[Column, list[Any]]] = [
        (Column("layer"), [layer.name for layer in layers]),
        (Column("stored shape"), [dimensions(layer.shape) for layer in layers]),
    ]
    if any(layer.pattern or layer.skipped for layer in layers):
        found.append((Column("pattern"), [layer.pattern or "dense" for layer in layers]))
    optional = [("zeros", [percent(layer.zeros) for layer in layers])]
    optional += [(f"error after {name}", [number(layer.errors.get(name)) for layer in layers]) for name in passes]
    optional.append(("mask moved", [percent(layer.flips) for layer in layers]))
    for phase in ("prefill", "decode"):
        optional.append((f"predicted gain, {phase}", [times(layer.gains.get(phase)) for layer in layers]))
    found += [(Column(heading, "figures"), cells) for heading, cells in optional if any(cells)]
    if engines:
        found.append((Column("ran sparse"), [_ran_text(layer.ran) for layer in layers]))
    found.append((sentences("note"), [_note(layer) for layer in layers]))
    columns, cells = zip(*found, strict=True)
    rows = list(zip(*cells, strict=True))
    return Table("Layer by layer", columns, rows, is_sortable=True, style="layers")


def gain_drawings(layers: Sequence[LayerFacts]) -> tuple[Drawing, ...]:
    """Each layer's predicted gain, in prefill and in decoding."""
    planned = [layer for layer in layers if layer.planned]
    grid, found = depth_grid(layer.name for layer in planned), []
    for phase in ("prefill", "decode"):
        gains = {layer.name: layer.gains.get(phase) for layer in planned}
        if any(gain is not None for gain in gains.values()):
            label = {layer.name: f"{gains[layer.name] or 1:.2f}x, {layer.planned}" for layer in planned}
            picture = grid_chart(f"Predicted gain in {phase}, layer by layer", grid, gains, label=label, tone="a", unit="x")
            found.append(Drawing(picture, "Dense time over 2:4 time; a dashed cell is a layer that no 2:4 kernel takes."))
    return tuple(found)


def _pass_row(record: PassEntry) -> tuple[object, ...]:
    source = record.calibration.source if record.calibration is not None else ""
    return record.text, record.num_rewritten, _moved(record.validation, record.promise), source, f"{record.seconds:.1f} s"


def _moved(found: OutputsEntry | None, promise: str) -> str:
    if found is None:
        return "not measured"
    if promise == "exact":
        return "not at all (exact)"
    return f"relative error {number(found.relative_error)}" + (f", KL {number(found.kl)}" if found.kl is not None else "")


def _zeros(layers: Sequence[LayerFacts], grid: DepthGrid) -> Drawing:
    label = {}
    for layer in layers:
        said = layer.pattern or "dense"
        said += f", {percent(layer.zeros)} zeros" if layer.zeros is not None else ""
        label[layer.name] = said + (f": {layer.skipped}" if layer.skipped else "")
    patterns = list(dict.fromkeys(layer.pattern for layer in layers if layer.pattern))
    legend = [(f"{pattern} sparse", "c") for pattern in patterns] if len(patterns) == 1 else []
    picture = grid_chart(
        "Share of zeros, layer by layer",
        grid,
        {layer.name: _share(layer) for layer in layers},
        label=label,
        tone="c",
        high=50.0 if legend else 100.0,
        legend=legend,
        unit="%",
    )
    return Drawing(picture, "From the model's first block to its last; a dashed cell is a layer left dense.")


def _errors(layers: Sequence[LayerFacts], grid: DepthGrid) -> Iterator[Drawing]:
    errors = {layer.name: layer.error for layer in layers}
    known = {name: value for name, value in errors.items() if value is not None}
    if known:
        label = {name: f"error {number(value)}" for name, value in known.items()}
        worst = sorted(known.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} ({number(value)})" for name, value in worst)
        told = (
            "How far each layer's output moved relative to the output itself, right after it was pruned (and given its branch)."
        )
        yield Drawing(grid_chart("Error, layer by layer", grid, errors, label=label, tone="b"), f"{told} Most: {said}.")


def _ran(layers: Sequence[LayerFacts], grid: DepthGrid) -> Iterator[Drawing]:
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for engine in dict.fromkeys(engine for layer in layers for engine in layer.ran):
        told = tuple((layer.name, layer.ran[engine]) for layer in layers if engine in layer.ran)
        alike.setdefault(told, []).append(engine)
    for told, engines in alike.items():
        ran = dict(told)
        tones = {name: _RAN_TONES.get(value, "n") for name, value in ran.items()}
        counts = {value: sum(each == value for each in ran.values()) for value in _RAN_TONES}
        legend = [(f"{value}: {count}", _RAN_TONES[value]) for value, count in counts.items() if count]
        values = dict.fromkeys(ran, 1.0)
        picture = grid_chart(f"Ran sparse? {', '.join(engines)}", grid, values, label=ran, tones=tones, high=1.0, legend=legend)
        yield Drawing(picture, "A dashed cell is a layer that the engine has no record of.")


def _note(layer: LayerFacts) -> str:
    planned = f"plan: {layer.planned}" if layer.planned else ""
    return "; ".join(part for part in (layer.skipped, *layer.notes, planned) if part)


def _ran_text(ran: Mapping[str, str]) -> str:
    """One word where all engines agree."""
    values = set(ran.values())
    return values.pop() if len(values) == 1 else ", ".join(f"{engine}: {value}" for engine, value in ran.items())


def _share(layer: LayerFacts) -> float | None:
    if not layer.pattern:
        return None
    if layer.zeros is not None:
        return 100 * layer.zeros
    kept, group = (int(word) for word in layer.pattern.split(":"))
    return 100 * (1 - kept / group)
