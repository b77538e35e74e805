"""How the learning rate and the decay of masked weights change over a run. Pure functions of the step."""

import math


def learning_rate(
    step: int, *, num_steps: int, peak: float, floor: float, warmup_steps: int, final_steps: int, shape: str = "cosine"
) -> float:
    """Return the learning rate of a step: up in a line, down to a floor, and in a line to zero at the end.

    Where the decay of masked weights dominates, AdamW's step is near ``lr * sign(W)`` whatever the decay's size, so the rate
    has to end near zero.

    Args:
        step: 0 for the first step.
        num_steps: Steps of the whole run.
        peak: Rate after the warm-up.
        floor: Rate at which the descent ends.
        warmup_steps: Steps until the peak is reached.
        final_steps: Steps of the line to zero.
        shape: ``cosine``, ``linear``, or ``constant`` (stays at the peak until the line to zero).

    Returns:
        The rate, in the units of ``peak``.

    Source: arXiv 2407.20584, appendix (settings); methods.md section 2.

    >>> [round(learning_rate(s, num_steps=10, peak=1.0, floor=0.1, warmup_steps=2, final_steps=2), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 0.94, 0.78, 0.55, 0.33, 0.16, 0.1, 0.05]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start_of_end = num_steps - final_steps
    end = floor if shape != "constant" else peak
    if step >= start_of_end:
        return end * (num_steps - step) / max(final_steps, 1)
    share = (step - warmup_steps) / max(start_of_end - warmup_steps, 1)
    if shape == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2
    return peak + (end - peak) * share


def straight(step: int, num_steps: int, start: float, end: float) -> float:
    """Return what goes in a line from ``start`` at the first step to ``end`` at the last.

    >>> [straight(step, 5, 4.0, 0.0) for step in range(5)]
    [4.0, 3.0, 2.0, 1.0, 0.0]
    """
    return start + (end - start) * step / max(num_steps - 1, 1)


def annealed_decay(step: int, *, decay: float, decay_steps: int) -> float:
    """Return the decay of masked weights: up in a line to ``decay`` over ``decay_steps``, then constant.

    Source: arXiv 2407.20584, section 3: ``lambda(t) = alpha t`` for ``t <= T0``, then ``alpha T0``.

    >>> [annealed_decay(step, decay=1.0, decay_steps=4) for step in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    return decay * min(1.0, step / decay_steps) if decay_steps else decay
