"""Where channels come from, who reads them, and what can be done to them: permutations and factors that change no result."""

from sparsepass.graph.channels.flow import (
    ChannelFlow,
    ChannelGroup,
    ChannelPlace,
    ScaleGroup,
    channel_flow,
    permuted,
    scaled,
    taken,
)

__all__ = ["ChannelFlow", "ChannelGroup", "ChannelPlace", "ScaleGroup", "channel_flow", "permuted", "scaled", "taken"]
