"""The calibration engine: it runs the graph over the calibration data and hands each site its statistics."""

from sparsepass.passes.engine.blocks import Block, find_blocks
from sparsepass.passes.engine.calibration import ComputeDtype, site_groups, sweep

__all__ = [
    "Block",
    "ComputeDtype",
    "find_blocks",
    "site_groups",
    "sweep",
]
