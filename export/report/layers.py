"""What a report tells of each layer, brought together from all its sections."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, final

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


def layer_facts(document: Mapping[str, Any]) -> list[LayerFacts]:
    """Every layer that the report names, in the order of the passes, then of the plan.

    Args:
        document: A checked report.
    """
    found: dict[str, LayerFacts] = {}
    _add_passes(found, document.get("passes", {}))
    _add_plan(found, document.get("plan", {}))
    by_weight = {layer.weight: name for name, layer in found.items()}
    runs = document.get("retraining", {}).get("runs", ())
    for weight, value in runs[-1]["flips_by_layer"].items() if runs else ():
        if weight in by_weight and is_number(value):
            found[by_weight[weight]] = replace(found[by_weight[weight]], flips=float(value))
    for row in document.get("sparsity", {}).get("layers", ()):
        name = by_weight.get(row["weight"])
        if name is not None:
            ran = found[name].ran
            # A weight that an engine multiplies more than once ran sparse if any of its products did.
            value = "yes" if ran.get(row["engine"]) == "yes" else row["ran_sparse"]
            found[name] = replace(found[name], ran={**ran, row["engine"]: value})
    return list(found.values())


def layer_sparsity(program: "Program") -> dict[str, dict[str, Any]]:
    """Count the zeros of every sparse layer's weight, as the graph multiplies it, for the report's ``passes.layers``.

    Args:
        program: With its weights in memory.

    Returns:
        Layer -> ``pattern``, ``zeros`` (their share, from 0 to 1), and ``branch_k`` of one with a SLoRB branch.
    """
    import torch

    from sparsepass.graph.program import masked_weight

    counted: dict[str, float] = {}
    found: dict[str, dict[str, Any]] = {}
    for site in program.sites():
        state = program.sparse.get(site.weight)
        if state is None:
            continue
        if site.weight not in counted:
            weight = masked_weight(program, site.weight)
            counted[site.weight] = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        found[site.name] = {"pattern": str(state.pattern), "zeros": counted[site.weight]}
        if state.branch is not None:
            found[site.name]["branch_k"] = state.branch.k
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


def is_number(value: Any) -> bool:
    """Whether a field of a report is a finite figure."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    return ",".join(shown[:6]) + ("..." if len(shown) > 6 else "")


def _add_passes(found: dict[str, LayerFacts], section: Mapping[str, Any]) -> None:
    skipped: Mapping[str, str] = section.get("skipped", {})
    for record in section.get("passes", ()):
        name = record["text"].partition("{")[0]
        pattern = re.search(r"\bpattern=(\d+:\d+)", record["text"])
        for outcome in record["outcomes"]:
            site = outcome["site"]
            layer = found.get(site) or LayerFacts(name=site, weight=outcome["weight"], shape=tuple(outcome["shape"]))
            if outcome["action"] == "rewritten":
                facts = outcome["facts"]
                errors = {name: float(facts["relative_error"])} if is_number(facts.get("relative_error")) else {}
                notes = (str(facts["note"]),) if facts.get("note") else ()
                layer = replace(layer, errors={**layer.errors, **errors}, notes=(*layer.notes, *notes))
                if name == "nm_sparsify":
                    layer = replace(layer, pattern=pattern[1] if pattern else _DEFAULT_PATTERN)
            found[site] = layer
    for site, reason in skipped.items():
        layer = found.get(site) or LayerFacts(name=site, weight=f"{site}.weight")
        found[site] = replace(layer, pattern="", skipped=reason)
    for site, facts in (section.get("layers") or {}).items():
        if site in found and site not in skipped:
            zeros = float(facts["zeros"]) if is_number(facts.get("zeros")) else None
            branch = (f"SLoRB k={facts['branch_k']}",) if facts.get("branch_k") else ()
            notes = (*branch, *found[site].notes)
            found[site] = replace(found[site], pattern=str(facts.get("pattern", "")), zeros=zeros, notes=notes)


def _add_plan(found: dict[str, LayerFacts], section: Mapping[str, Any]) -> None:
    for row in section.get("layers", ()):
        shape = (row["out_features"], row["in_features"])
        experts = (row["num_experts"],) if row.get("num_experts", 1) > 1 else ()
        name = row["name"]
        layer = found.get(name) or LayerFacts(name=name, weight=row.get("weight", f"{name}.weight"), shape=(*experts, *shape))
        gains = {}
        for phase in ("prefill", "decode"):
            times = row.get(phase) or {}
            if is_number(times.get("dense_s")) and is_number(times.get("sparse_s")) and times["sparse_s"] > 0:
                gains[phase] = times["dense_s"] / times["sparse_s"]
        found[name] = replace(layer, gains=gains, planned=f"{row['decision']}: {row['reason']}")
