"""Dense against sparse: the same graph built twice, timed over batch and tokens, and where the sparse engine breaks even."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from sparsepass.export.targets.evidence import Point, break_even
from sparsepass.export.targets.onnx import OnnxGraph
from sparsepass.export.targets.tensorrt.profiles import Profile, axis_length

Timer = Callable[[Mapping[str, Tensor]], float]
"""Gives the time of one run on given inputs, in milliseconds."""

_INTEGERS: Final = {"int64": torch.int64, "int32": torch.int32}
_FLOATS: Final = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
_LENGTHS: Final = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def measure(graph: OnnxGraph, profile: Profile, dense: Timer, sparse: Timer) -> dict[str, Any]:
    """Time two engines of one graph over the sizes that a profile allows.

    Args:
        graph: The graph, for its inputs.
        profile: Its profile.
        dense: Times the dense engine.
        sparse: Times the sparse engine.

    Returns:
        The points, and the break-even in words, for the report.
    """
    points = []
    for sizes in grid(profile):
        inputs = inputs_of(graph, sizes)
        points.append(
            Point(
                batch=sizes.get("batch", 1),
                sequence=next((sizes[axis] for axis in ("sequence", "encoder_sequence") if axis in sizes), 1),
                past=sizes.get("past_sequence", 0),
                dense_ms=dense(inputs),
                sparse_ms=sparse(inputs),
            )
        )
    return {"points": [point.to_dict() for point in points], "break_even": break_even(points)}


def grid(profile: Profile) -> list[dict[str, int]]:
    """Sizes to time: powers of two of batch and tokens within the profile, all else at its common length.

    Example:
        >>> grid(Profile(name="decode", ranges={"batch": (1, 1, 2), "sequence": (1, 1, 1), "past_sequence": (1, 64, 127)}))
        [{'batch': 1, 'sequence': 1, 'past_sequence': 64}, {'batch': 2, 'sequence': 1, 'past_sequence': 64}]
    """
    lengths: dict[str, Sequence[int]] = {}
    for axis, (low, common, high) in profile.ranges.items():
        steps = {"batch": _BATCHES, "sequence": _LENGTHS, "encoder_sequence": _LENGTHS}.get(axis, ())
        lengths[axis] = [step for step in steps if low <= step <= high] or [common]
    return [dict(zip(lengths, sizes, strict=True)) for sizes in itertools.product(*lengths.values())]


def inputs_of(graph: OnnxGraph, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of given lengths: token ids, masks of ones, positions behind the past, and a cache of small numbers."""
    generator = torch.Generator().manual_seed(0)
    past = sizes.get("past_sequence", 0)
    found = {}
    for value in graph.inputs:
        shape = tuple(axis_length(axis, sizes) for axis in value.axes)
        if value.name.endswith("attention_mask"):
            found[value.name] = torch.ones(shape, dtype=_INTEGERS.get(value.dtype, torch.int64))
        elif value.name == "position_ids":
            found[value.name] = torch.arange(past, past + shape[-1]).expand(shape).contiguous()
        elif value.name == "token_type_ids" or value.dtype == "bool":
            found[value.name] = torch.zeros(shape, dtype=torch.bool if value.dtype == "bool" else torch.int64)
        elif value.dtype in _INTEGERS:
            found[value.name] = torch.randint(0, 100, shape, generator=generator, dtype=_INTEGERS[value.dtype])
        else:
            found[value.name] = torch.randn(shape, generator=generator).mul(0.1).to(_FLOATS[value.dtype])
    return found
