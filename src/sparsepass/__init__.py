"""sparsepass: a compiler for N:M sparsity of transformer models.

Names are imported when they are first used, so that ``import sparsepass`` stays fast. The lowering to files is
`sparsepass.export.export`: the name ``sparsepass.export`` is the folder's.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.export.pattern import PatternReport as PatternReport, check_pattern as check_pattern
    from sparsepass.graph import (
        CaptureError as CaptureError,
        EquivalenceError as EquivalenceError,
        PassError as PassError,
        Program as Program,
        ProgramFormatError as ProgramFormatError,
        Site as Site,
        SparsepassError as SparsepassError,
        capture as capture,
    )
    from sparsepass.graph.equivalence import assert_equivalent as assert_equivalent, compare as compare
    from sparsepass.graph.load import load_model as load_model
    from sparsepass.graph.perplexity import Perplexity as Perplexity, perplexity as perplexity
    from sparsepass.passes import (
        Fold as Fold,
        NMSparsify as NMSparsify,
        Pass as Pass,
        SLoRB as SLoRB,
        apply_passes as apply_passes,
        parse_pipeline as parse_pipeline,
        pipeline_to_text as pipeline_to_text,
    )

    __version__: str
else:
    from sparsepass import _moved  # noqa: F401  (old paths of modules)
    from sparsepass._lazy import face

    _get, __dir__, __all__ = face(__name__, __file__)
    __all__ += ["__version__"]

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("sparsepass")
        return _get(name)
