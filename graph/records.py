"""What a program remembers of its passes: the sparse state of each weight, the evidence of each pass, and the report."""

import dataclasses
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from sparsepass._terminal import Terminal
from sparsepass.graph.rounding import NumberFormat, RoundingGrid
from sparsepass.graph.sites import Site

JSON = Any
LATER = {"later": True}
"""Of a field that earlier versions do not know: with its default it is not written, so that they read what they could."""


@dataclass(frozen=True, kw_only=True)
class BranchState:
    """A SLoRB branch beside a site: y += S (X x).

    Attributes:
        k: Input features summed into one.
        weight: Name of S, shape [out, in/k].
        projection: Name of X, shape [in/k, in], when it is trainable; None when it is the fixed segment sum.
    """

    k: int
    weight: str
    projection: str | None = None


@dataclass(frozen=True, kw_only=True)
class LearnedState:
    """What a mask that is being learned has beside it; the mask is the hard one of the logits.

    Attributes:
        logits: Name of the candidates' logits, a parameter; see `sparsepass.graph.soft_masks`.
        control: Name of the buffer with scale, temperature (0: the hard mask is used) and key of the noise.
    """

    logits: str
    control: str


@dataclass(frozen=True, kw_only=True)
class SparseState:
    """What passes have done to one weight.

    Attributes:
        pattern: N:M, such as ``2:4``.
        axis: Axis of the stored weight along which it runs.
        mask: Name of the bool buffer; None once the mask is folded into the weight.
        branch: The SLoRB branch, if there is one.
        learned: What is beside the mask while it is being learned.
        changed_by: Text of the first pass that changed the weight's values (``retrain`` for training); None if they are the
            dense model's. The zeros that folding writes do not count.
    """

    pattern: str
    axis: int
    mask: str | None
    branch: BranchState | None = None
    learned: LearnedState | None = None
    changed_by: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors that passes have put beside the weight."""
        branch = () if self.branch is None else (self.branch.weight, self.branch.projection)
        learned = () if self.learned is None else (self.learned.logits, self.learned.control)
        return tuple(name for name in (self.mask, *branch, *learned) if name is not None)


@dataclass(frozen=True, kw_only=True)
class QuantizedState:
    """The grid that the graph rounds a weight to.

    Attributes:
        bits: 8 or 4.
        group_size: Entries along the axis that share a scale; 0 for a whole row.
        axis: Axis of the stored weight that its layer sums over.
        scales: Name of the buffer with the scales, bfloat16.
        zero_points: Name of the buffer with the integers that stand for 0, uint8; None for numbers with a sign, where that is
            0.
        format: Of the numbers; see `RoundingGrid`.
    """

    bits: int
    group_size: int
    axis: int
    scales: str
    zero_points: str | None = None
    format: NumberFormat = field(default="int", metadata=LATER)

    @property
    def grid(self) -> RoundingGrid:
        """What the weight is rounded to, but for its scales."""
        symmetric = self.zero_points is None
        return RoundingGrid(bits=self.bits, group_size=self.group_size, symmetric=symmetric, format=self.format)

    @property
    def call(self) -> tuple[int | str, ...]:
        """What the operator `quantized_weight` is called with behind its tensors; of integers as in earlier versions."""
        return (self.bits, self.group_size, self.axis, *([] if self.format == "int" else [self.format]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors beside the weight."""
        return (self.scales,) if self.zero_points is None else (self.scales, self.zero_points)


@dataclass(frozen=True, kw_only=True)
class FusedPart:
    """One of the layers that a fused weight stands for.

    Attributes:
        weight: Name that its weight had, and gets again.
        bias: Name of its bias; None if it has none. The parts of one weight all have one, or none has.
        rows: Rows of the fused weight that are its own.
        levels: The modules that it stood in, as path and class name, below the module that all parts stand in.
    """

    weight: str
    bias: str | None
    rows: int
    levels: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Module path."""
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """What one pass did at one site, and why not, if it did nothing.

    Attributes:
        site: Module path.
        weight: Name of the weight; empty for a site without a stored weight.
        shape: Shape of the stored weight.
        action: Whether the pass changed the site.
        reason: Why it was skipped; empty if it was rewritten.
        facts: What the pass measured there, such as the relative output error.
    """

    site: str
    weight: str
    shape: tuple[int, ...]
    action: Literal["rewritten", "skipped"]
    reason: str = ""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """One applied pass: its full configuration, what it did at every site, and how far it was verified.

    Attributes:
        text: The pass as text with all its options; parses back to the same pass.
        promise: ``exact`` or ``approximate``.
        outcomes: One for each site of the program.
        validation: Measured difference of the outputs before and after, and the tolerance if the pass is exact; None if
            validation was switched off.
        calibration: Which text or tensors were used; None if the pass needed none.
        seconds: Wall time of the pass, without validation.
    """

    text: str
    promise: Literal["exact", "approximate"]
    outcomes: tuple[SiteOutcome, ...]
    validation: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    seconds: float = 0.0

    @property
    def num_rewritten(self) -> int:
        """Sites the pass changed."""
        return sum(outcome.action == "rewritten" for outcome in self.outcomes)

    @property
    def num_skipped(self) -> int:
        """Sites the pass left alone."""
        return len(self.outcomes) - self.num_rewritten


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a program comes from: what is needed to build the model's own class again.

    Attributes:
        model_class: Such as ``transformers.LlamaForCausalLM``; None for a plain nn.Module.
        config: The model's configuration.
        generation_config: Its generation settings, if it has any.
        output_heads: Names of the weights of its output head.
        signature: Parameter names of the model's forward, in order.
        versions: Versions of the libraries that captured it.
    """

    model_class: str | None = None
    config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    output_heads: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def to_json(record: Any) -> JSON:
    """Turn a record, or a mapping of records, into JSON. Numbers that JSON lacks become ``{"float": "nan"}``."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = [(f, getattr(record, f.name)) for f in dataclasses.fields(record)]
        return {f.name: to_json(value) for f, value in values if "later" not in f.metadata or value != f.default}
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(item) for item in record]
    if isinstance(record, float) and not math.isfinite(record):
        return {"float": str(float(record))}
    return record


def from_json(document: JSON) -> JSON:
    """Undo what `to_json` does to numbers."""
    if isinstance(document, Mapping):
        if document.keys() == {"float"} and document["float"] in ("nan", "inf", "-inf"):
            return float(document["float"])
        return {key: from_json(value) for key, value in document.items()}
    return [from_json(item) for item in document] if isinstance(document, list) else document


def sparse_state_from_json(document: JSON) -> SparseState:
    """Undo `to_json` for a `SparseState`."""
    branch, learned = document["branch"], document.get("learned")
    return SparseState(
        **{
            **document,
            "branch": BranchState(**branch) if branch else None,
            "learned": LearnedState(**learned) if learned else None,
        }
    )


def fused_part_from_json(document: JSON) -> FusedPart:
    """Undo `to_json` for a `FusedPart`."""
    return FusedPart(**{**document, "levels": tuple((path, kind) for path, kind in document["levels"])})


def changes_told_by_history(history: Iterable[PassRecord], retraining: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Find out who changed which weight, for programs of format 1, whose sparse states do not say it.

    Format 1 is not written any more, so the passes that it knew are all that is asked for here.

    Args:
        history: The program's passes.
        retraining: The program's training runs.

    Returns:
        Weight name -> `SparseState.changed_by`, for the weights that were changed.
    """
    found: dict[str, str] = {}
    for record in history:
        name, _, options = record.text.partition("{")
        compensates = "compensate=false" not in options and re.search(r"\b(criterion=(sparsegpt|alps)|refine=[1-9])", options)
        if name == "reconstruct" or (name == "nm_sparsify" and compensates):
            for outcome in record.outcomes:
                if outcome.action == "rewritten":
                    found.setdefault(outcome.weight, record.text)
    if any(run.get("settings", {}).get("method") != "maskllm" for run in retraining):
        for record in history:
            for outcome in record.outcomes:
                found.setdefault(outcome.weight, "retrain")
    return found


def pass_record_from_json(document: JSON) -> PassRecord:
    """Undo `to_json` for a `PassRecord`."""
    found = from_json(document)
    outcomes = tuple(SiteOutcome(**{**o, "shape": tuple(o["shape"])}) for o in found["outcomes"])
    return PassRecord(**{**found, "outcomes": outcomes})


@dataclass(frozen=True, kw_only=True)
class Report:
    """What each pass did at each site of a program. `str()` is a table for people, `to_dict()` is for machines.

    Attributes:
        history: Every pass applied.
        sites: What the graph runs.
        sparse: Weight name -> what passes did to it.
        idle: Layers that the graph never runs -> why.
        quantized: Weight name -> the grid that it is rounded to.
    """

    history: tuple[PassRecord, ...]
    sites: tuple[Site, ...]
    sparse: Mapping[str, SparseState]
    idle: Mapping[str, str] = field(default_factory=dict)
    quantized: Mapping[str, QuantizedState] = field(default_factory=dict)

    @property
    def num_sparse(self) -> int:
        """Sites whose weight is N:M sparse now."""
        return sum(site.weight in self.sparse for site in self.sites)

    def skipped(self) -> dict[str, str]:
        """Site name -> why it is not sparse. Every site that is not sparse is in it, and every layer that never runs."""
        reasons: dict[str, str] = {}
        for site in self.sites:
            if site.weight in self.sparse:
                continue
            said = [
                (r.promise == "exact", o.reason) for r in self.history for o in r.outcomes if o.site == site.name and o.reason
            ]
            # What an exact pass left alone says less of masks than what a later pass did.
            told = min(said, key=lambda each: each[0])[1] if said else None
            reasons[site.name] = told or site.left_alone or "no pass has rewritten it"
        return reasons | dict(self.idle)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON."""
        quantized = {s.name: self.quantized[s.weight].grid.text for s in self.sites if s.weight in self.quantized}
        return {
            "num_sites": len(self.sites),
            "num_sparse": self.num_sparse,
            "skipped": self.skipped(),
            "passes": [to_json(record) for record in self.history],
            **({"quantized": quantized} if quantized else {}),
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
            grid = self.quantized.get(site.weight)
            pattern = (state.pattern if state else "dense") + (f" {grid.grid.text}" if grid else "")
            table.add_row(site.name, site.layout, shape, pattern, branch, note)
        num_quantized = sum(site.weight in self.quantized for site in self.sites)
        summary = f"{self.num_sparse} of {len(self.sites)} layers sparse"
        summary += f", {num_quantized} quantized" if num_quantized else ""
        counts = Counter(skipped.values())
        lines = [summary, *(f"  {number} skipped: {reason}" for reason, number in counts.most_common())]
        for record in self.history:
            lines.append(f"{record.text}: {record.num_rewritten} rewritten, {record.num_skipped} skipped{_verified(record)}")
        buffer = io.StringIO()
        Terminal(file=buffer, width=160, no_color=True).print(table)
        return buffer.getvalue() + "\n".join(lines)


def _short(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _verified(record: PassRecord) -> str:
    if record.validation is None:
        return ", not validated"
    found = record.validation
    kl = f", KL {found['kl']:.3g}" if found.get("kl") is not None else ""
    return f", {record.promise}: relative output error {found['relative_error']:.3g}{kl}"
