"""The one table of passes."""

from sparsepass._plugins import extended
from sparsepass.passes.base import Pass
from sparsepass.passes.fold import Fold
from sparsepass.passes.learn_masks import LearnMasks
from sparsepass.passes.nm_sparsify import NMSparsify
from sparsepass.passes.reconstruct import Reconstruct
from sparsepass.passes.slorb import SLoRB

PASSES: dict[str, type[Pass]] = {kind.name: kind for kind in (NMSparsify, SLoRB, LearnMasks, Reconstruct, Fold)}
"""Name -> class. A new pass is one file, one line here, one test file."""


def passes_table() -> dict[str, type[Pass]]:
    """The table with the passes that other packages add through the entry point ``sparsepass.passes``.

    Raises:
        SparsepassError: If an entry point is no pass, or takes a name that is taken.
    """
    return extended(PASSES, "sparsepass.passes", Pass)  # type: ignore[type-abstract]
