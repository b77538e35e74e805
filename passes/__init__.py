"""What to rewrite and why: one file per pass, one per criterion."""

from sparsepass.passes.awq_scale import AWQScale
from sparsepass.passes.base import Facts, GroupContext, Needs, Pass
from sparsepass.passes.conditions import Condition
from sparsepass.passes.engine import SiteGroup
from sparsepass.passes.fold import Fold
from sparsepass.passes.fold_norms import FoldNorms
from sparsepass.passes.fuse_siblings import FuseSiblings
from sparsepass.passes.learn_masks import LearnMasks
from sparsepass.passes.manager import apply_passes
from sparsepass.passes.nm_sparsify import NMSparsify
from sparsepass.passes.permute_channels import PermuteChannels
from sparsepass.passes.quantize import Quantize
from sparsepass.passes.quantize_embedding import QuantizeEmbedding
from sparsepass.passes.reconstruct import Reconstruct
from sparsepass.passes.rotate import Rotate
from sparsepass.passes.slorb import SLoRB
from sparsepass.passes.table import PASSES, parse_pipeline, pipeline_to_text

__all__ = [
    "PASSES",
    "AWQScale",
    "Condition",
    "Facts",
    "Fold",
    "FoldNorms",
    "FuseSiblings",
    "GroupContext",
    "LearnMasks",
    "NMSparsify",
    "Needs",
    "Pass",
    "PermuteChannels",
    "Quantize",
    "QuantizeEmbedding",
    "Reconstruct",
    "Rotate",
    "SLoRB",
    "SiteGroup",
    "apply_passes",
    "parse_pipeline",
    "pipeline_to_text",
]
