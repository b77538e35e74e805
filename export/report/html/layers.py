"""The page's pictures and table of layers: what each is, what it lost, what training moved, what ran sparse."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sparsepass.export.report.answers import skipped_rows
from sparsepass.export.report.charts import Picture, grid_chart
from sparsepass.export.report.depth import DepthGrid, depth_grid
from sparsepass.export.report.html.markup import Html, el, join
from sparsepass.export.report.html.tables import Column, figure_of, table
from sparsepass.export.report.layers import LayerFacts, layer_facts
from sparsepass.export.report.markdown import number

_MOST_REASONS: Final = 30
_RAN_TONES: Final = {"yes": "c", "no": "b", "unknown": "n"}


def layers_part(section: Mapping[str, Any], document: Mapping[str, Any]) -> Html:
    """Render the report's section ``passes``: pictures over the model's depth, what was left dense, every layer."""
    layers = layer_facts(document)
    parts: list[Html | None] = [_passes(section)]
    if layers:
        grid = depth_grid(layer.name for layer in layers)
        parts += [_sparsity(layers, grid), _errors(layers, grid), *_ran(layers, grid)]
    rows = skipped_rows(section)
    if rows:
        parts.append(el("h3", "Left dense, and why"))
        columns = (Column("reason"), Column("layers", is_number=True), Column("which"))
        parts.append(table(columns, rows[:_MOST_REASONS], label="Layers left dense, and why"))
    if layers:
        parts += [el("h3", "Layer by layer"), layer_table(layers)]
    return join(parts)


def layer_table(layers: Sequence[LayerFacts]) -> Html:
    """Every layer with all that is known of it, as columns that at least one layer has something for."""
    passes = list(dict.fromkeys(name for layer in layers for name in layer.errors))
    phases = [phase for phase in ("prefill", "decode") if any(phase in layer.gains for layer in layers)]
    engines = list(dict.fromkeys(engine for layer in layers for engine in layer.ran))
    columns = [Column("layer"), Column("stored shape")]
    columns += [Column("pattern")] if any(layer.pattern or layer.skipped for layer in layers) else []
    columns += [Column("zeros", is_number=True)] if any(layer.zeros is not None for layer in layers) else []
    columns += [Column(f"error after {name}", is_number=True) for name in passes]
    columns += [Column("mask moved", is_number=True)] if any(layer.flips is not None for layer in layers) else []
    columns += [Column(f"predicted gain, {phase}", is_number=True) for phase in phases]
    columns += [Column("ran sparse")] if engines else []
    columns += [Column("note", is_wide=True)]
    has = {column.heading for column in columns}
    rows = []
    for layer in layers:
        row: list[Any] = [layer.name, "x".join(map(str, layer.shape))]
        row += [layer.pattern or "dense"] if "pattern" in has else []
        row += [_percent(layer.zeros)] if "zeros" in has else []
        row += [number(layer.errors.get(name)) for name in passes]
        row += [_percent(layer.flips)] if "mask moved" in has else []
        row += [f"{layer.gains[phase]:.2f}x" if phase in layer.gains else "" for phase in phases]
        row += [_ran_text(layer.ran)] if engines else []
        planned = f"plan: {layer.planned}" if layer.planned else ""
        row.append("; ".join(part for part in (layer.skipped, *layer.notes, planned) if part))
        rows.append(row)
    return table(columns, rows, label="Layer by layer", is_sortable=True, kind="layers")


def gain_pictures(layers: Sequence[LayerFacts]) -> list[tuple[Picture, str]]:
    """Each layer's predicted gain, in prefill and in decoding: picture and note."""
    planned = [layer for layer in layers if layer.planned]
    grid, found = depth_grid(layer.name for layer in planned), []
    for phase in ("prefill", "decode"):
        gains = {layer.name: layer.gains.get(phase) for layer in planned}
        if any(gain is not None for gain in gains.values()):
            label = {layer.name: f"{gains[layer.name] or 1:.2f}x, {layer.planned}" for layer in planned}
            picture = grid_chart(f"Predicted gain in {phase}, layer by layer", grid, gains, label=label, tone="a", unit="x")
            found.append((picture, "Dense time over 2:4 time; a dashed cell is a layer that no 2:4 kernel takes."))
    return found


def _passes(section: Mapping[str, Any]) -> Html | None:
    rows = []
    for record in section["passes"]:
        done = sum(outcome["action"] == "rewritten" for outcome in record["outcomes"])
        found = record.get("validation") or {}
        moved = "not at all (exact)" if record["promise"] == "exact" and found else "not measured"
        if found and record["promise"] != "exact":
            moved = f"relative error {number(found.get('relative_error'))}"
            moved += f", KL {number(found['kl'])}" if found.get("kl") is not None else ""
        known = record.get("calibration") or {}
        rows.append((el("code", record["text"]), done, moved, known.get("source", ""), f"{record['seconds']:.1f} s"))
    if not rows:
        return None
    columns = (Column("pass", is_wide=True), Column("layers", is_number=True), Column("how far the outputs moved"),
               Column("calibrated on"), Column("time", is_number=True))  # fmt: skip
    return table(columns, rows, label="Passes")


def _sparsity(layers: Sequence[LayerFacts], grid: DepthGrid) -> Html:
    shares = {layer.name: _share(layer) for layer in layers}
    label = {}
    for layer in layers:
        said = layer.pattern or "dense"
        said += f", {_percent(layer.zeros)} zeros" if layer.zeros is not None else ""
        label[layer.name] = said + (f": {layer.skipped}" if layer.skipped else "")
    patterns = list(dict.fromkeys(layer.pattern for layer in layers if layer.pattern))
    legend = [(f"{pattern} sparse", "c") for pattern in patterns] if len(patterns) == 1 else []
    picture = grid_chart(
        "Share of zeros, layer by layer", grid, shares, label=label, tone="c", high=50.0 if legend else 100.0, legend=legend,
        unit="%",
    )  # fmt: skip
    return figure_of(picture, "From the model's first block to its last; a dashed cell is a layer left dense.", is_wide=True)


def _errors(layers: Sequence[LayerFacts], grid: DepthGrid) -> Html | None:
    errors = {layer.name: layer.error for layer in layers}
    known = {name: value for name, value in errors.items() if value is not None}
    if not known:
        return None
    label = {name: f"error {number(value)}" for name, value in known.items()}
    picture = grid_chart("Error, layer by layer", grid, errors, label=label, tone="b")
    worst = sorted(known.items(), key=lambda item: -item[1])[:3]
    said = ", ".join(f"{name} ({number(value)})" for name, value in worst)
    told = "How far each layer's output moved relative to the output itself, right after it was pruned (and given its branch)."
    return figure_of(picture, f"{told} Most: {said}.", is_wide=True)


def _ran(layers: Sequence[LayerFacts], grid: DepthGrid) -> list[Html]:
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for engine in dict.fromkeys(engine for layer in layers for engine in layer.ran):
        told = tuple((layer.name, layer.ran[engine]) for layer in layers if engine in layer.ran)
        alike.setdefault(told, []).append(engine)
    found = []
    for told, engines in alike.items():
        ran = dict(told)
        tones = {name: _RAN_TONES.get(value, "n") for name, value in ran.items()}
        counts = {value: sum(each == value for each in ran.values()) for value in _RAN_TONES}
        legend = [(f"{value}: {count}", _RAN_TONES[value]) for value, count in counts.items() if count]
        values = dict.fromkeys(ran, 1.0)
        picture = grid_chart(f"Ran sparse? {', '.join(engines)}", grid, values, label=ran, tones=tones, high=1.0, legend=legend)
        found.append(figure_of(picture, "A dashed cell is a layer that the engine has no record of.", is_wide=True))
    return found


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


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.4g}%"
