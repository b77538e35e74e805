"""What the pattern checker found: one entry per use of a weight, and the report that holds them."""

import io
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, final

from rich.table import Table

from sparsepass._terminal import Terminal
from sparsepass.export.pattern.candidates import Use
from sparsepass.export.pattern.cause import Cause

Verdict = Literal["conforms", "violates", "not eligible", "not checkable", "missing", "left out"]
_VERDICTS: tuple[Verdict, ...] = ("violates", "missing", "not eligible", "not checkable", "conforms", "left out")
_COLOURS = {
    "violates": "red",
    "missing": "red",
    "not eligible": "yellow",
    "not checkable": "yellow",
    "conforms": "green",
}
_NUM_ROWS_SHOWN = 60


@final
@dataclass(frozen=True, kw_only=True)
class PatternEntry(Use):
    """A use that was judged. What is known of the use itself stands first; see `Use`.

    Attributes:
        pattern: The pattern asked for, such as "2:4".
        verdict: "conforms", "violates", "not eligible" (K is not a multiple of M), "not checkable", "missing" (expected
            and not in the file), or "left out" (ignored, or dense on purpose; its data was not read).
        required: Whether it decides on `PatternReport.conforms`.
        reason: Why, in words; "" for a weight that conforms without remark.
        num_groups: Groups of M along the axis.
        num_violations: Groups with more than N nonzeros.
        first_violation: Index into the stored tensor of the first entry of the first such group.
        num_nonzeros: Entries that are not zero; a zero of either sign is zero.
        num_negative_zeros: Entries that are -0.0. They conform, but packers are known to trip over them.
        conforming_axes: For a weight that violates: other axes along which it would conform.
        computed: Operations that make the weight out of what is stored, where it is not stored as it is used; the shape,
            axis and counts are then those of the computed weight.
        cause: For a required weight that violates: what probably happened to it; else None.
    """

    pattern: str
    verdict: Verdict
    required: bool
    reason: str = ""
    num_groups: int = 0
    num_violations: int = 0
    first_violation: tuple[int, ...] | None = None
    num_nonzeros: int = 0
    num_negative_zeros: int = 0
    conforming_axes: tuple[int, ...] = ()
    computed: tuple[str, ...] = ()
    cause: Cause | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return values | {"cause": self.cause and asdict(self.cause)}

    @property
    def layer_kind(self) -> str:
        """The last part of the module's path that is no number: "q_proj" of "layers.0.q_proj.weight"."""
        path = (self.parameter or self.weight).removesuffix(".weight")
        return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)

    @property
    def label(self) -> str:
        """The stored name, and the parameter it was if that has another."""
        return f"{self.weight} ({self.parameter})" if self.parameter not in ("", self.weight) else self.weight


@final
@dataclass(frozen=True, kw_only=True)
class PatternReport:
    """What `check_pattern` found; `str()` gives a table.

    Attributes:
        source: What was checked.
        pattern: The pattern asked for.
        entries: One entry per operation and constant weight, in file order; a weight used twice has two.
        stated: Whether the caller stated which weights are sparse or dense; then a source without such weights conforms.
        unused: Names to ignore that no weight has: likely misspelled.
    """

    source: str
    pattern: str
    entries: tuple[PatternEntry, ...]
    stated: bool = field(default=False, repr=False)
    unused: tuple[str, ...] = ()

    @property
    def conforms(self) -> bool:
        """Whether every required weight conforms. One has to be there, unless the caller stated which are sparse or dense."""
        required = [entry for entry in self.entries if entry.required]
        return all(entry.verdict == "conforms" for entry in required) and (bool(required) or self.stated)

    @property
    def exit_code(self) -> int:
        """0 when the source conforms, 1 when it does not; a source that cannot be read (2) is an error instead."""
        return 0 if self.conforms else 1

    @property
    def counts(self) -> dict[str, int]:
        """Number of entries for each verdict; all verdicts are present."""
        found = Counter(entry.verdict for entry in self.entries)
        return {verdict: found[verdict] for verdict in _VERDICTS}

    @property
    def failures(self) -> tuple[PatternEntry, ...]:
        """The required entries that do not conform."""
        return tuple(entry for entry in self.entries if entry.required and entry.verdict != "conforms")

    @property
    def num_negative_zeros(self) -> int:
        """Entries that are -0.0 in all weights checked, each stored weight counted once."""
        return sum({(e.file, e.weight): e.num_negative_zeros for e in self.entries}.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "source": self.source,
            "pattern": self.pattern,
            "conforms": self.conforms,
            "exit_code": self.exit_code,
            "counts": self.counts,
            "num_negative_zeros": self.num_negative_zeros,
            "unused": list(self.unused),
            "causes": [{**asdict(cause), "weights": [e.weight for e in found]} for cause, found in self.causes],
            "entries": [entry.to_dict() for entry in self.entries],
        }

    @property
    def causes(self) -> tuple[tuple[Cause, tuple[PatternEntry, ...]], ...]:
        """The likely causes, one of each kind (that of its first weight), each with the failures that it explains."""
        groups: dict[str, list[PatternEntry]] = {}
        for entry in self.failures:
            if entry.cause is not None:
                groups.setdefault(entry.cause.kind, []).append(entry)
        return tuple((group[0].cause, tuple(group)) for group in groups.values() if group[0].cause is not None)

    def advice(self) -> str:
        """Return what probably happened to the weights that violate, and what to do: a paragraph for each cause."""
        paragraphs = []
        required = {(e.file, e.weight) for e in self.entries if e.required}
        for cause, found in self.causes:
            kinds = list(dict.fromkeys(entry.layer_kind for entry in found))
            only = [k for k in kinds if all(e.verdict != "conforms" for e in self.entries if e.layer_kind == k)]
            where = f"{len(found)} of {len(required)} weights, e.g. {found[0].label}"
            if cause.kind == "merged adapter" and only == kinds and len(found) < len(required):
                where += f" (all in {', '.join(kinds)}; the other layers conform, as an adapter's target_modules leave them)"
            paragraphs.append(f"{cause.kind}: {where}: {cause.text}. {cause.advice}")
        return "\n".join(paragraphs)

    def summary(self) -> str:
        """Return one line: the verdict and the counts."""
        said = ", ".join(f"{number} {verdict}" for verdict, number in self.counts.items() if number) or "no weight found"
        if not self.conforms and not self.failures:
            said += "; nothing was required to conform, so nothing is proven"
        return f"{self.source}: {self.pattern} {'holds' if self.conforms else 'does NOT hold'} ({said})"

    def table(self, *, all_entries: bool = False) -> Table:
        """Return a rich table, failures first.

        Args:
            all_entries: Show every entry; otherwise a long report only counts those that conform or are left out.
        """
        rank = {verdict: i for i, verdict in enumerate(_VERDICTS)}
        rows = sorted(self.entries, key=lambda e: (not e.required or e.verdict == "conforms", rank[e.verdict]))
        shown = rows
        if not all_entries and len(rows) > _NUM_ROWS_SHOWN:
            shown = [e for e in rows if e.verdict not in ("conforms", "left out")][:_NUM_ROWS_SHOWN]
        table = Table(title=self.summary(), title_justify="left", caption_justify="left")
        for heading in ("verdict", "weight", "used by", "stored shape", "axis of K", "why"):
            table.add_column(heading, overflow="fold")
        for e in shown:
            colour = _COLOURS.get(e.verdict, "dim") if e.required else "dim"
            axis, shape = "" if e.axis is None else str(e.axis), "x".join(map(str, e.shape))
            reason = f"{e.reason}; likely {e.cause.text}" if e.cause else e.reason
            cells = (e.label, f"{e.op} {e.node}", f"{shape} {e.dtype}".strip(), axis, reason)
            table.add_row(e.verdict, *(cell.replace("[", r"\[") for cell in cells), style=colour)
        if len(shown) < len(rows):
            table.caption = f"{len(rows) - len(shown)} more entries are not shown"
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Terminal(file=out, width=160, no_color=True).print(self.table())
        return out.getvalue()
