"""Where channels come from, who reads them, and what can be done to them: changes that leave every result as it is."""

from sparsepass.graph.channels.flow import (
    ChannelFlow,
    ChannelGroup,
    RemovalGroup,
    RotationGroup,
    ScaleGroup,
    channel_flow,
    uneven_gains,
)
from sparsepass.graph.channels.places import ChannelPlace, permuted, rotated, scaled, taken, without
from sparsepass.graph.channels.vectors import sums_with

__all__ = [
    "ChannelFlow",
    "ChannelGroup",
    "ChannelPlace",
    "RemovalGroup",
    "RotationGroup",
    "ScaleGroup",
    "channel_flow",
    "permuted",
    "rotated",
    "scaled",
    "sums_with",
    "taken",
    "uneven_gains",
    "without",
]
