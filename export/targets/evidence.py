"""What is known of each layer: whether a runtime used its sparsity. Four states, told apart and never merged."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

Known = Literal["yes", "no", "unknown"]


@final
@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """What is known of one weight in one engine.

    Attributes:
        engine: Name of the engine.
        layer: Node of the graph that multiplies the weight.
        op: Its operation.
        weight: Name of the stored weight.
        shape: Its shape as stored.
        dtype: Its type.
        axis: Axis that the product sums over.
        conforms: Whether the stored weight is 2:4 along that axis; unknown for one that is dense on purpose.
        flag_requested: Whether the builder was allowed to use sparse tactics.
        eligible: Whether the builder found the layer fit for them.
        chosen: Whether it took one.
        ran_sparse: What follows from these.
        reason: Why, in words.
        tactic: Name of the kernel, where the engine inspector tells.
        dense_ms: Fastest dense tactic that the builder timed.
        sparse_ms: Fastest sparse one.
    """

    engine: str
    layer: str
    op: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    axis: int | None
    conforms: Known
    flag_requested: Known
    eligible: Known
    chosen: Known
    ran_sparse: Known
    reason: str
    tactic: str = ""
    dense_ms: float | None = None
    sparse_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self) | {"shape": list(self.shape)}


def counts(layers: Iterable[LayerEvidence]) -> dict[str, Any]:
    """Count each state, over all layers that are meant to be sparse, and what ran sparse, engine by engine."""
    meant = [layer for layer in layers if layer.conforms != "unknown"]
    states = ("conforms", "flag_requested", "eligible", "chosen", "ran_sparse")
    values: tuple[Known, ...] = ("yes", "no", "unknown")

    def count(part: list[LayerEvidence]) -> dict[str, dict[str, int]]:
        return {state: {value: sum(getattr(layer, state) == value for layer in part) for value in values} for state in states}

    engines = list(dict.fromkeys(layer.engine for layer in meant))
    return {"total": count(meant), "engines": {name: count([x for x in meant if x.engine == name]) for name in engines}}


def pattern_summary(file: str, found: Mapping[str, Any]) -> str:
    """What verification says of the pattern of a file's weights, in one line."""
    if not found["conforms"]:
        return str(found["summary"])
    return f"{file}: the {found['num_sparse']} weights that have to be sparse are, along the axis that is summed over"
