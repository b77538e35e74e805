"""sparsepass: a compiler for N:M sparsity of transformer models.

Names are imported when they are first used, so that ``import sparsepass`` stays fast. The lowering to files is
`sparsepass.export.export`: the name ``sparsepass.export`` is the folder's.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("sparsepass.graph") is None:
    raise ImportError(
        f"{__path__[0]} lacks graph/, passes/, retrain/ and export/. In a checkout they are symbolic links, and git has "
        "written text files in their place: on Windows switch Developer Mode on, then run `git config core.symlinks true` and "
        "`git checkout -- src`. A wheel that was built from such a checkout lacks them too: build it again"
    )

if TYPE_CHECKING:
    from sparsepass.export.pattern import PatternReport as PatternReport, check_pattern as check_pattern
    from sparsepass.export.stages import Calibration as Calibration, Evaluation as Evaluation
    from sparsepass.export.targets import (
        HuggingFace as HuggingFace,
        Onnx as Onnx,
        Packed as Packed,
        SemiStructured as SemiStructured,
        Target as Target,
        TensorRT as TensorRT,
    )
    from sparsepass.graph import (
        CaptureError as CaptureError,
        EquivalenceError as EquivalenceError,
        PassError as PassError,
        Program as Program,
        ProgramFormatError as ProgramFormatError,
        Site as Site,
        SparsepassError as SparsepassError,
    )
    from sparsepass.graph.capture import capture as capture
    from sparsepass.graph.equivalence import (
        Comparison as Comparison,
        assert_equivalent as assert_equivalent,
        compare as compare,
    )
    from sparsepass.graph.load import LoadedModel as LoadedModel, load_model as load_model
    from sparsepass.graph.packed import PackedWeight as PackedWeight, pack as pack, unpack as unpack
    from sparsepass.graph.perplexity import Perplexity as Perplexity, perplexity as perplexity
    from sparsepass.passes import (
        Fold as Fold,
        LearnMasks as LearnMasks,
        NMSparsify as NMSparsify,
        Pass as Pass,
        Quantize as Quantize,
        Reconstruct as Reconstruct,
        SLoRB as SLoRB,
        apply_passes as apply_passes,
        parse_pipeline as parse_pipeline,
        pipeline_to_text as pipeline_to_text,
    )
    from sparsepass.retrain.config import RetrainConfig as RetrainConfig
    from sparsepass.retrain.data import DataConfig as DataConfig

    __version__: str
else:
    from sparsepass import _moved, _registration  # noqa: F401  (old paths of modules; packed folders in transformers)
    from sparsepass._lazy import face

    _get, _, __all__ = face(__name__, __file__)
    __all__ += ["__version__"]

    def __dir__():
        return __all__

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("sparsepass")
        return _get(name)
