"""The calibration engine: it runs the graph over the calibration data and hands each site its statistics."""

from sparsepass.passes.engine.blocks import Block, SiteGroup, find_blocks, site_groups
from sparsepass.passes.engine.calibration import BlockRun, sweep
from sparsepass.passes.engine.runner import ComputeDtype

__all__ = [
    "Block",
    "BlockRun",
    "ComputeDtype",
    "SiteGroup",
    "find_blocks",
    "site_groups",
    "sweep",
]
