"""The conditions that passes ask for, refuse, and bring about."""

from enum import Enum, auto

from sparsepass.graph.records import QuantizedState, SparseState


class Condition(Enum):
    """What some of the sparse or quantized layers of a program are like.

    Those that end in ``_NOW`` hold from the pass that brings them about to the end of the same pipeline, and never of a program
    at the start. `CHANGED_BEFORE` holds at the start only. The others hold in both cases.

    Attributes:
        MASKED: A mask stands between the weight and what reads it.
        FOLDED: The mask's zeros are in the weight, and the mask is gone.
        BRANCHED: A branch stands beside the layer.
        LEARNED: The mask is being learned.
        CHANGED: The weight no longer has the dense model's values.
        CHANGED_BEFORE: An earlier run has changed the weight, so that the dense model's values are lost.
        TRAINED_NOW: The layer has been trained with its block.
        QUANTIZED: The graph rounds the weight to a grid of integers.

    Example:
        >>> Condition.MASKED.holds(SparseState(pattern="2:4", axis=1, mask="0.mask"))
        True
    """

    MASKED = auto()
    MASKED_NOW = auto()
    FOLDED = auto()
    FOLDED_NOW = auto()
    BRANCHED = auto()
    BRANCHED_NOW = auto()
    LEARNED = auto()
    CHANGED = auto()
    CHANGED_BEFORE = auto()
    TRAINED_NOW = auto()
    QUANTIZED = auto()

    def holds(self, state: SparseState | None, quantized: QuantizedState | None = None) -> bool:
        """Whether it holds of one layer before the pipeline starts.

        Args:
            state: What passes did to the layer's weight, if anything.
            quantized: The grid that it is rounded to, if there is one.
        """
        if self is Condition.QUANTIZED:
            return quantized is not None
        if state is None:
            return False
        match self:
            case Condition.MASKED:
                return state.mask is not None
            case Condition.FOLDED:
                return state.mask is None
            case Condition.BRANCHED:
                return state.branch is not None
            case Condition.LEARNED:
                return state.learned is not None
            case Condition.CHANGED | Condition.CHANGED_BEFORE:
                return state.changed_by is not None
            case _:
                return False

    def implied(self) -> tuple["Condition", ...]:
        """What holds for the rest of the pipeline when a pass has brought this condition about."""
        now = Condition.__members__.get(f"{self.name}_NOW")
        return (self,) if now is None else (self, now)
