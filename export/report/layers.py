"""Layers: what a report tells of each, brought together from all its sections, and the part of the pages about them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

from sparsepass.export.report.blocks import Block, Column, Drawing, Drawings, Subheading, Table, figures, words
from sparsepass.export.report.charts import grid_chart
from sparsepass.export.report.depth import DepthGrid, depth_grid
from sparsepass.export.report.parts import is_number
from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sections import LayerEntry, OutputsEntry, PassEntry, PassesSection
from sparsepass.export.report.words import dimensions, number, percent, times

if TYPE_CHECKING:
    from sparsepass.graph import Program


_DEFAULT_PATTERN: Final = "2:4"
_MOST_REASONS: Final = 30
_RAN_TONES: Final = {"yes": "c", "no": "b", "unknown": "n"}


@final
@dataclass(kw_only=True)
class LayerFacts:
    """One layer, which `layer_facts` fills in.

    Attributes:
        name: Module path.
        weight: Name of its weight.
        shape: As stored; empty if the report does not tell.
        pattern: Such as ``2:4``; empty if it is dense.
        zeros: Share of its weight's entries that are zero; None if nobody counted.
        errors: Pass -> error of the layer's output relative to its output, after that pass.
        notes: What the passes said of it.
        skipped: Why it is dense; empty if it is not, or if no pass has run.
        flips: Share of its mask's entries that training changed; None if it was not trained.
        gains: Predicted gain (dense over 2:4 time) in ``prefill`` and ``decode``, where a plan gives one.
        planned: What the plan recommends; empty without one.
        ran: Engine -> whether the layer ran sparse: ``yes``, ``no`` or ``unknown``.
    """

    name: str
    weight: str
    shape: tuple[int, ...] = ()
    pattern: str = ""
    zeros: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    skipped: str = ""
    flips: float | None = None
    gains: dict[str, float] = field(default_factory=dict)
    planned: str = ""
    ran: dict[str, str] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The error after the last pass that measured one."""
        return list(self.errors.values())[-1] if self.errors else None


def layer_facts(report: ReportDocument) -> list[LayerFacts]:
    """Every layer that the report names, in the order of the passes, then of the plan."""
    found: dict[str, LayerFacts] = {}
    if report.passes is not None:
        _add_passes(found, report.passes)
    for row in report.plan.layers if report.plan is not None else ():
        experts = (row.num_experts,) if row.num_experts > 1 else ()
        shape = (*experts, row.out_features, row.in_features)
        weight = row.weight or f"{row.name}.weight"
        layer = found.setdefault(row.name, LayerFacts(name=row.name, weight=weight, shape=shape))
        phases = {"prefill": row.prefill, "decode": row.decode}
        layer.gains = {phase: each.gain for phase, each in phases.items() if each is not None and each.gain is not None}
        layer.planned = f"{row.decision}: {row.reason}"
    by_weight = {layer.weight: layer for layer in found.values()}
    runs = report.retraining.runs if report.retraining is not None else []
    for weight, value in runs[-1].flips_by_layer.items() if runs else ():
        if weight in by_weight and is_number(value):
            by_weight[weight].flips = float(value)
    for evidence in report.sparsity.layers if report.sparsity is not None else ():
        ran = by_weight[evidence.weight].ran if evidence.weight in by_weight else {}
        # A weight that an engine multiplies more than once ran sparse if any of its products did.
        if ran.get(evidence.engine) != "yes":
            ran[evidence.engine] = evidence.ran_sparse
    return list(found.values())


def layer_sparsity(program: "Program") -> dict[str, LayerEntry]:
    """Count the zeros of every sparse layer's weight, as the graph multiplies it, for the report's ``passes.layers``.

    Args:
        program: With its weights in memory.

    Returns:
        Layer -> its pattern, zeros, and branch.
    """
    import torch

    from sparsepass.graph.fusion import split_siblings
    from sparsepass.graph.program import masked_weight

    counted: dict[str, float] = {}
    found: dict[str, LayerEntry] = {}
    program = split_siblings(program)
    for site in program.sites():
        state = program.sparse.get(site.weight)
        if state is None:
            continue
        if site.weight not in counted:
            weight = masked_weight(program, site.weight)
            counted[site.weight] = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        entry = LayerEntry(pattern=str(state.pattern), zeros=counted[site.weight])
        found[site.name] = entry if state.branch is None else entry.model_copy(update={"branch_k": state.branch.k})
    return found


def joined_names(names: Iterable[str]) -> str:
    """Layers in few words: numbers that differ are written as ranges, and long lists are cut.

    Example:
        >>> joined_names(["h.0.up", "h.1.up", "h.2.up", "head"])
        'h.0-2.up, head'
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"(.*?\.)([0-9]{1,9})(\..*)", name)
        key = f"{match[1]}\0{match[3]}" if match else name
        groups.setdefault(key, []).extend([int(match[2])] if match else [])
    shown = [key.replace("\0", _ranges(sorted(set(numbers)))) for key, numbers in groups.items()]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def skipped_rows(section: PassesSection) -> list[tuple[str, int, str]]:
    """Rows (reason, number of layers, which) of what the section ``passes`` says was left dense."""
    layers: dict[str, list[str]] = {}
    for layer, reason in section.skipped.items():
        layers.setdefault(reason, []).append(layer)
    ordered = sorted(layers.items(), key=lambda item: -len(item[1]))
    return [(reason, len(names), joined_names(names)) for reason, names in ordered]


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for block in numbers:
        if parts and block == parts[-1][1] + 1:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ",".join(shown[:6]) + ("..." if len(shown) > 6 else "")


def _add_passes(found: dict[str, LayerFacts], section: PassesSection) -> None:
    for record in section.passes:
        pattern = re.search(r"\bpattern=(\d+:\d+)", record.text)
        for outcome in record.outcomes:
            site, facts = outcome.site, outcome.facts
            layer = found.setdefault(site, LayerFacts(name=site, weight=outcome.weight, shape=tuple(outcome.shape)))
            if outcome.action == "rewritten":
                if is_number(facts.get("relative_error")):
                    layer.errors[record.name] = float(facts["relative_error"])
                if facts.get("note"):
                    layer.notes += (str(facts["note"]),)
                if record.name == "nm_sparsify":
                    layer.pattern = pattern[1] if pattern else _DEFAULT_PATTERN
    for site, reason in section.skipped.items():
        layer = found.setdefault(site, LayerFacts(name=site, weight=f"{site}.weight"))
        layer.pattern, layer.skipped = "", reason
    for site, sparse in (section.layers or {}).items():
        if site in found and site not in section.skipped:
            layer = found[site]
            layer.pattern, layer.zeros = sparse.pattern, float(sparse.zeros) if is_number(sparse.zeros) else None
            if sparse.branch_k:
                layer.notes = (f"SLoRB k={sparse.branch_k}", *layer.notes)


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
    found.append((Column("note", "sentences"), [_note(layer) for layer in layers]))
    columns, cells = zip(*found, strict=True)
    rows = list(zip(*cells, strict=True))
    return Table("Layer by layer", columns, rows, is_sortable=True, style="layers")


def gain_drawings(layers: Sequence[LayerFacts]) -> Drawings:
    """Each layer's predicted gain, in prefill and in decoding."""
    planned = [layer for layer in layers if layer.planned]
    grid, found = depth_grid(layer.name for layer in planned), []
    for phase in ("prefill", "decode"):
        gains = {layer.name: layer.gains.get(phase) for layer in planned}
        if any(gain is not None for gain in gains.values()):
            label = {layer.name: f"{gains[layer.name] or 1:.2f}x, {layer.planned}" for layer in planned}
            picture = grid_chart(f"Predicted gain in {phase}, layer by layer", grid, gains, label=label, tone="a", unit="x")
            found.append(Drawing(picture, "Dense time over 2:4 time; a dashed cell is a layer that no 2:4 kernel takes."))
    return Drawings(tuple(found))


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
    shares = {layer.name: _share(layer) for layer in layers}
    title, high = "Share of zeros, layer by layer", 50.0 if legend else 100.0
    picture = grid_chart(title, grid, shares, label=label, tone="c", high=high, legend=legend, unit="%")
    return Drawing(picture, "From the model's first block to its last; a dashed cell is a layer left dense.")


def _errors(layers: Sequence[LayerFacts], grid: DepthGrid) -> Iterator[Drawing]:
    errors = {layer.name: layer.error for layer in layers}
    known = {name: value for name, value in errors.items() if value is not None}
    if known:
        label = {name: f"error {number(value)}" for name, value in known.items()}
        worst = sorted(known.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} ({number(value)})" for name, value in worst)
        told = "How far each layer's output moved relative to the output itself, right after it was pruned"
        picture = grid_chart("Error, layer by layer", grid, errors, label=label, tone="b")
        yield Drawing(picture, f"{told} (and given its branch). Most: {said}.")


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
