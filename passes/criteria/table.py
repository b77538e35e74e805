"""The one table of criteria. A new criterion is one file beside this one and one line here; other packages add theirs.

`wanda` is the example of a score, `sparsegpt` of a criterion that changes the weights it keeps.
"""

from typing import Final

from sparsepass._plugins import extended_by_rows
from sparsepass.passes.criteria.alps import alps
from sparsepass.passes.criteria.criterion import Criterion, CriterionFunction, CriterionOptions, Pruned
from sparsepass.passes.criteria.magnitude import magnitude, magnitude_score
from sparsepass.passes.criteria.proxsparse import proxsparse
from sparsepass.passes.criteria.ria import ria, ria_score
from sparsepass.passes.criteria.sparsegpt import sparsegpt
from sparsepass.passes.criteria.wanda import wanda, wanda_score

__all__ = ["CRITERIA", "Criterion", "CriterionFunction", "CriterionOptions", "Pruned"]

_ROWS: Final = (
    Criterion(
        name="magnitude",
        function=magnitude,
        needs="nothing",
        compensates=False,
        rows_are_independent=True,
        score=magnitude_score,
    ),
    Criterion(name="wanda", function=wanda, needs="norms", compensates=False, rows_are_independent=True, score=wanda_score),
    Criterion(name="ria", function=ria, needs="norms", compensates=False, rows_are_independent=False, score=ria_score),
    Criterion(name="proxsparse", function=proxsparse, needs="gram", compensates=False, rows_are_independent=True),
    Criterion(name="sparsegpt", function=sparsegpt, needs="gram", compensates=True, rows_are_independent=True),
    Criterion(name="alps", function=alps, needs="gram", compensates=True, rows_are_independent=True),
)

CRITERIA: Final[dict[str, Criterion]] = {row.name: row for row in _ROWS}


def criteria_table() -> dict[str, Criterion]:
    """The table with the criteria that other packages add through the entry point ``sparsepass.criteria``.

    Raises:
        SparsepassError: If an entry point is no `Criterion`, or takes a name that is taken.

    >>> "wanda" in criteria_table()
    True
    """
    return extended_by_rows(CRITERIA, "sparsepass.criteria", Criterion)
