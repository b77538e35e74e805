"""What a report tells of each layer, brought together from all its sections."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, final

from sparsepass.export.report.schema import ReportDocument
from sparsepass.export.report.sections import LayerEntry, PassesSection, is_number

if TYPE_CHECKING:
    from sparsepass.graph import Program

_DEFAULT_PATTERN: Final = "2:4"


@final
@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer.

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
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    skipped: str = ""
    flips: float | None = None
    gains: Mapping[str, float] = field(default_factory=dict)
    planned: str = ""
    ran: Mapping[str, str] = field(default_factory=dict)

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
        layer = found.get(row.name) or LayerFacts(name=row.name, weight=row.weight or f"{row.name}.weight", shape=shape)
        times = {"prefill": row.prefill, "decode": row.decode}
        gains = {phase: each.gain for phase, each in times.items() if each is not None and each.gain is not None}
        found[row.name] = replace(layer, gains=gains, planned=f"{row.decision}: {row.reason}")
    by_weight = {layer.weight: name for name, layer in found.items()}
    runs = report.retraining.runs if report.retraining is not None else []
    for weight, value in runs[-1].flips_by_layer.items() if runs else ():
        if weight in by_weight and is_number(value):
            found[by_weight[weight]] = replace(found[by_weight[weight]], flips=float(value))
    for evidence in report.sparsity.layers if report.sparsity is not None else ():
        name = by_weight.get(evidence.weight)
        if name is not None:
            ran = found[name].ran
            # A weight that an engine multiplies more than once ran sparse if any of its products did.
            value = "yes" if ran.get(evidence.engine) == "yes" else evidence.ran_sparse
            found[name] = replace(found[name], ran={**ran, evidence.engine: value})
    return list(found.values())


def layer_sparsity(program: "Program") -> dict[str, LayerEntry]:
    """Count the zeros of every sparse layer's weight, as the graph multiplies it, for the report's ``passes.layers``.

    Args:
        program: With its weights in memory.

    Returns:
        Layer -> its pattern, zeros, and branch.
    """
    import torch

    from sparsepass.graph.program import masked_weight

    counted: dict[str, float] = {}
    found: dict[str, LayerEntry] = {}
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
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        key = f"{match[1]}\0{match[3]}" if match else name
        groups.setdefault(key, []).extend([int(match[2])] if match else [])
    shown = [key.replace("\0", _ranges(sorted(set(numbers)))) for key, numbers in groups.items()]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ",".join(shown[:6]) + ("..." if len(shown) > 6 else "")


def _add_passes(found: dict[str, LayerFacts], section: PassesSection) -> None:
    for record in section.passes:
        pattern = re.search(r"\bpattern=(\d+:\d+)", record.text)
        for outcome in record.outcomes:
            site, facts = outcome.site, outcome.facts
            layer = found.get(site) or LayerFacts(name=site, weight=outcome.weight, shape=tuple(outcome.shape))
            if outcome.action == "rewritten":
                error = facts.get("relative_error")
                errors = {record.name: float(error)} if is_number(error) else {}
                notes = (str(facts["note"]),) if facts.get("note") else ()
                layer = replace(layer, errors={**layer.errors, **errors}, notes=(*layer.notes, *notes))
                if record.name == "nm_sparsify":
                    layer = replace(layer, pattern=pattern[1] if pattern else _DEFAULT_PATTERN)
            found[site] = layer
    for site, reason in section.skipped.items():
        layer = found.get(site) or LayerFacts(name=site, weight=f"{site}.weight")
        found[site] = replace(layer, pattern="", skipped=reason)
    for site, sparse in (section.layers or {}).items():
        if site in found and site not in section.skipped:
            zeros = float(sparse.zeros) if is_number(sparse.zeros) else None
            branch = (f"SLoRB k={sparse.branch_k}",) if sparse.branch_k else ()
            found[site] = replace(found[site], pattern=sparse.pattern, zeros=zeros, notes=(*branch, *found[site].notes))
