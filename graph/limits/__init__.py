"""What a program and a model can take: limits of the sizes of inputs, and of positions."""

from sparsepass.graph.limits.positions import default_context, position_limit
from sparsepass.graph.limits.sizes import (
    allowed,
    as_ranges,
    broken,
    check_input,
    end_before,
    holds,
    is_firm,
    is_range,
    limits_of,
    refused,
    simplified,
    unusual,
)

__all__ = [
    "allowed",
    "as_ranges",
    "broken",
    "check_input",
    "default_context",
    "end_before",
    "holds",
    "is_firm",
    "is_range",
    "limits_of",
    "position_limit",
    "refused",
    "simplified",
    "unusual",
]
