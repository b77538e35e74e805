"""What a program remembers of its passes: the sparse state of each weight, and the evidence of each pass."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JSON = Any


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


def to_json(record: Any) -> JSON:
    """Turn a record, or a mapping of records, into JSON."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(item) for item in record]
    return record


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
    outcomes = tuple(SiteOutcome(**{**o, "shape": tuple(o["shape"])}) for o in document["outcomes"])
    return PassRecord(**{**document, "outcomes": outcomes})
