"""The per-site report of a program: what was rewritten, what was skipped, and why."""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsepass.graph.records import PassRecord, SparseState, to_json
from sparsepass.graph.sites import Site


@dataclass(frozen=True, kw_only=True)
class Report:
    """What each pass did at each site of a program. `str()` is a table for people, `to_dict()` is for machines."""

    history: tuple[PassRecord, ...]
    sites: tuple[Site, ...]
    sparse: Mapping[str, SparseState]

    @property
    def num_sparse(self) -> int:
        """Sites whose weight is N:M sparse now."""
        return sum(site.weight in self.sparse for site in self.sites)

    def skipped(self) -> dict[str, str]:
        """Site name -> why it is not sparse. Every site that is not sparse is in it."""
        reasons: dict[str, str] = {}
        for site in self.sites:
            if site.weight in self.sparse:
                continue
            said = [o.reason for record in self.history for o in record.outcomes if o.site == site.name and o.reason]
            reasons[site.name] = said[0] if said else site.left_alone or "no pass has rewritten it"
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON."""
        return {
            "num_sites": len(self.sites),
            "num_sparse": self.num_sparse,
            "skipped": self.skipped(),
            "passes": [to_json(record) for record in self.history],
        }

    def __str__(self) -> str:
        table = Table(title="sparsepass report", show_lines=False)
        for column in ("layer", "layout", "weight", "pattern", "branch", "note"):
            table.add_column(column, overflow="fold")
        skipped = self.skipped()
        facts = {
            outcome.site: "; ".join(f"{k} {_short(v)}" for k, v in outcome.facts.items())
            for record in self.history
            for outcome in record.outcomes
            if outcome.facts
        }
        for site in self.sites:
            state = self.sparse.get(site.weight)
            branch = f"SLoRB k={state.branch.k}" if state and state.branch else ""
            note = f"skipped: {skipped[site.name]}" if state is None else facts.get(site.name, "")
            shape = "x".join(map(str, site.shape))
            table.add_row(site.name, site.layout, shape, state.pattern if state else "dense", branch, note)
        summary = f"{self.num_sparse} of {len(self.sites)} layers sparse"
        counts = Counter(skipped.values())
        lines = [summary, *(f"  {number} skipped: {reason}" for reason, number in counts.most_common())]
        for record in self.history:
            lines.append(f"{record.text}: {record.num_rewritten} rewritten, {record.num_skipped} skipped{_verified(record)}")
        buffer = io.StringIO()
        Console(file=buffer, width=160, no_color=True).print(table)
        return buffer.getvalue() + "\n".join(lines)


def _short(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _verified(record: PassRecord) -> str:
    if record.validation is None:
        return ", not validated"
    found = record.validation
    kl = f", KL {found['kl']:.3g}" if found.get("kl") is not None else ""
    return f", {record.promise}: relative output error {found['relative_error']:.3g}{kl}"
