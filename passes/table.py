"""The one table of passes, and pipelines as text and back: ``nm_sparsify{criterion=wanda,pattern=2:4},slorb{k=16}``."""

from collections.abc import Iterable

from sparsepass._plugins import extended
from sparsepass.graph import SparsepassError
from sparsepass.graph.support import build, item_to_text, parse_items
from sparsepass.passes.awq_scale import AWQScale
from sparsepass.passes.base import Pass
from sparsepass.passes.fold import Fold
from sparsepass.passes.fold_norms import FoldNorms
from sparsepass.passes.fuse_siblings import FuseSiblings
from sparsepass.passes.learn_masks import LearnMasks
from sparsepass.passes.nm_sparsify import NMSparsify
from sparsepass.passes.permute_channels import PermuteChannels
from sparsepass.passes.quantize import Quantize
from sparsepass.passes.quantize_embedding import QuantizeEmbedding
from sparsepass.passes.reconstruct import Reconstruct
from sparsepass.passes.rotate import Rotate
from sparsepass.passes.slorb import SLoRB

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        FoldNorms,
        Rotate,
        PermuteChannels,
        AWQScale,
        FuseSiblings,
        NMSparsify,
        SLoRB,
        LearnMasks,
        Reconstruct,
        Quantize,
        QuantizeEmbedding,
        Fold,
    )
}
"""Name -> class. A new pass is one file, one line here, one test file."""


def passes_table() -> dict[str, type[Pass]]:
    """The table with the passes that other packages add through the entry point ``sparsepass.passes``.

    Raises:
        SparsepassError: If an entry point is no pass, or takes a name that is taken.
    """
    return extended(PASSES, "sparsepass.passes", Pass)  # type: ignore[type-abstract]


def parse_pipeline(passes: str | Pass | Iterable[str | Pass]) -> tuple[Pass, ...]:
    """Turn names, pass objects and text into a tuple of passes.

    Args:
        passes: A pass, text with any number of passes, or an iterable of both.

    Raises:
        SparsepassError: If a pass or option is unknown (the nearest known name is given), a value has the wrong type, or
            the text cannot be read.

    Example:
        >>> parse_pipeline("nm_sparsify{criterion=wanda},slorb")[1].name
        'slorb'
    """
    if isinstance(passes, str):
        items = parse_items(passes, "pass")
        if not items:
            raise SparsepassError("the pipeline is empty; name at least one pass, such as nm_sparsify")
        table = passes_table()
        return tuple(build(table, "pass", name, options) for name, options in items)
    if isinstance(passes, Pass):
        return (passes,)
    found: list[Pass] = []
    for item in passes:
        if not isinstance(item, str | Pass):
            raise SparsepassError(f"a pass is a name, text or a Pass object, got {type(item).__name__} ({item!r})")
        found.extend(parse_pipeline(item))
    return tuple(found)


def pipeline_to_text(passes: Iterable[Pass]) -> str:
    """Turn passes into text that `parse_pipeline` reads back as equal passes."""
    return ",".join(pass_to_text(item) for item in passes)


def pass_to_text(item: Pass) -> str:
    """Turn one pass into text with all options that are set to something."""
    return item_to_text(item.name, item)
