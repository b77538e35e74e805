"""Which engines a program becomes, over which lengths each is optimized, and how they are timed over these lengths.

1. A plain graph is one engine, ``model``; the encoder of an encoder-decoder is ``encoder``.
2. A decoder with a cache is two engines (or one with two profiles): ``prefill`` takes a whole prompt and no past,
   ``decode`` one token and the past.
3. Lengths come from the command line, else from the model's limit and the program's example inputs.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from sparsepass.export.targets.evidence import Point, break_even
from sparsepass.export.targets.onnx import OnnxArtifact, OnnxGraph
from sparsepass.export.targets.tensorrt.options import EngineTarget, Range
from sparsepass.graph.limits import allowed, position_limit
from sparsepass.graph.support import SparsepassError

MAX_BATCH, MAX_TOKENS = 8, 2048
"""Largest lengths where nothing else is said; the model's own limit is the other bound of the tokens."""

Lengths = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, most common and largest shape of an input."""

Timer = Callable[[Mapping[str, Tensor]], float]
"""Gives the time of one run on given inputs, in milliseconds."""

_TOKEN_AXES: Final = ("sequence", "encoder_sequence", "decoder_sequence")
_INTEGERS: Final = {"int64": torch.int64, "int32": torch.int32}
_FLOATS: Final = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
_LENGTHS: Final = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@final
@dataclass(frozen=True, kw_only=True)
class Profile:
    """Lengths of the axes that vary.

    Attributes:
        name: ``prefill``, ``decode``, ``encoder`` or ``model``.
        ranges: Axis -> smallest, most common and largest length.
    """

    name: str
    ranges: Mapping[str, Range]


@final
@dataclass(frozen=True, kw_only=True)
class Shapes:
    """An optimization profile as the builder takes it.

    Attributes:
        name: Such as ``prefill``.
        shapes: Input -> its smallest, most common and largest shape.
    """

    name: str
    shapes: Mapping[str, Lengths]


@final
@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """One engine to be built.

    Attributes:
        name: The file's name without its ending.
        graph: What it is built from.
        profiles: What it is optimized for.
    """

    name: str
    graph: OnnxGraph
    profiles: tuple[Profile, ...]


def plan_engines(
    artifact: OnnxArtifact,
    options: EngineTarget,
    *,
    config: Mapping[str, Any] | None = None,
    examples: Mapping[str, tuple[int, ...]] | None = None,
    limits: Sequence[str] = (),
) -> tuple[EnginePlan, ...]:
    """Say which engines are built from the graphs of an export.

    Args:
        artifact: The graphs.
        options: Lengths that the user gave, and whether prefill and decode share an engine.
        config: The model's configuration, for the number of tokens that it can take.
        examples: Input -> shape of the program's example, for axes that nothing else bounds.
        limits: Of the program: a plain graph holds for no other sizes.

    Raises:
        SparsepassError: If a length is given for an engine or an axis that is not there, or is beyond the limits.
    """
    limit = token_limit(config or {})
    plans: list[EnginePlan] = []
    for graph in artifact.graphs:
        names = _profile_names(artifact, graph)
        profiles = tuple(
            Profile(name=name, ranges=_ranges(graph, name, options.ranges, limit, examples or {})) for name in names
        )
        if artifact.kind == "forward":
            profiles = tuple(_within(graph, profile, options.ranges, limits) for profile in profiles)
        if options.one_engine or len(profiles) == 1:
            plans.append(EnginePlan(name=graph.role if len(profiles) > 1 else profiles[0].name, graph=graph, profiles=profiles))
        else:
            plans += [EnginePlan(name=profile.name, graph=graph, profiles=(profile,)) for profile in profiles]
    _check_names(plans, options.ranges)
    return tuple(plans)


def token_limit(config: Mapping[str, Any]) -> int:
    """Tokens that profiles allow at most: the model's own limit, or `MAX_TOKENS`.

    Example:
        >>> token_limit({"max_position_embeddings": 512}), token_limit({"max_position_embeddings": 131072})
        (512, 2048)
    """
    return min(MAX_TOKENS, position_limit(config) or MAX_TOKENS)


def shapes(graph: OnnxGraph, profile: Profile) -> Shapes:
    """Turn a profile into shapes of a graph's inputs.

    Example:
        >>> from sparsepass.export.targets.onnx.artifact import OnnxValue
        >>> ids = OnnxValue(name="ids", dtype="int64", axes=("batch", "sequence"))
        >>> graph = OnnxGraph(file="model.onnx", role="model", inputs=(ids,), outputs=(), num_nodes=1)
        >>> dict(shapes(graph, Profile(name="model", ranges={"batch": (1, 1, 4), "sequence": (1, 8, 16)})).shapes)
        {'ids': ((1, 1), (1, 8), (4, 16))}
    """
    made = {}
    corners = [{axis: lengths[place] for axis, lengths in profile.ranges.items()} for place in range(3)]
    for value in graph.inputs:
        if any(isinstance(axis, str) for axis in value.axes):
            low, common, high = (tuple(axis_length(axis, corner) for axis in value.axes) for corner in corners)
            made[value.name] = (low, common, high)
    return Shapes(name=profile.name, shapes=made)


def axis_length(axis: str | int, lengths: Mapping[str, int]) -> int:
    """Length of an axis of an input, given the lengths of the axes that vary by themselves.

    Example:
        >>> axis_length("past_sequence + sequence", {"past_sequence": 3, "sequence": 1})
        4
    """
    if isinstance(axis, int):
        return axis
    return lengths[axis] if axis in lengths else sum(lengths[part] for part in _parts(axis))


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


def _parts(axis: str) -> tuple[str, ...]:
    """The axes that an axis is the sum of (the attention mask covers the past and the tokens); most axes are no sum."""
    return ("past_sequence", "sequence") if axis == "total_sequence" else tuple(part.strip() for part in axis.split("+"))


def _profile_names(artifact: OnnxArtifact, graph: OnnxGraph) -> tuple[str, ...]:
    if artifact.kind == "forward":
        return ("model",)
    return ("encoder",) if graph.role == "encoder" else ("prefill", "decode")


def _free_axes(graph: OnnxGraph) -> dict[str, str]:
    """Axis that varies by itself -> an input that has it."""
    found: dict[str, str] = {}
    for value in graph.inputs:
        for axis in value.axes:
            if isinstance(axis, str):
                for part in _parts(axis):
                    found.setdefault(part, value.name)
    return found


def _ranges(
    graph: OnnxGraph,
    profile: str,
    given: Mapping[str, Mapping[str, Range]],
    limit: int,
    examples: Mapping[str, tuple[int, ...]],
) -> dict[str, Range]:
    said = {**given.get("", {}), **given.get(profile, {})}
    return {
        axis: said[axis] if axis in said else _default(graph, profile, axis, holder, limit, examples)
        for axis, holder in _free_axes(graph).items()
    }


def _within(graph: OnnxGraph, profile: Profile, given: Mapping[str, Mapping[str, Range]], limits: Sequence[str]) -> Profile:
    """A profile whose lengths begin and end where the program holds."""
    ranges = dict(profile.ranges)
    for value in graph.inputs:
        for place, axis in enumerate(value.axes):
            if not isinstance(axis, str) or axis not in ranges:
                continue
            low, wanted, high = ranges[axis]
            held = allowed(limits, value.name, place, range(low, high + 1))
            is_given = axis in given.get("", {}) or axis in given.get(profile.name, {})
            if not held or (is_given and not {low, wanted, high} <= set(held)):
                here = [limit for limit in limits if f"{value.name}[{place}]" in limit]
                raise SparsepassError(
                    f"the lengths {low}:{wanted}:{high} of the axis {axis!r} are beyond those for which the graph holds "
                    f"({', '.join(here)}); give --profile {axis}=MIN:COMMON:MAX within them"
                )
            ranges[axis] = held[0], min(held, key=lambda length: abs(length - wanted)), held[-1]
    return Profile(name=profile.name, ranges=ranges)


def _default(
    graph: OnnxGraph, profile: str, axis: str, holder: str, limit: int, examples: Mapping[str, tuple[int, ...]]
) -> Range:
    if axis == "batch":
        return 1, 1, MAX_BATCH
    if axis == "past_sequence":
        return (0, 0, 0) if profile == "prefill" else (1, max(1, limit // 2), max(1, limit - 1))
    if axis in _TOKEN_AXES:
        if profile == "decode" and axis != "encoder_sequence":
            return 1, 1, 1
        return 1, max(1, limit // 4), limit
    value = next(each for each in graph.inputs if each.name == holder)
    shape = examples.get(holder)
    if shape is None or len(shape) != len(value.axes):
        raise SparsepassError(
            f"the axis {axis!r} of {holder} varies, and nothing says how far; give --profile {axis}=MIN:COMMON:MAX"
        )
    length = shape[value.axes.index(axis)]
    return length, length, length


def _check_names(plans: list[EnginePlan], given: Mapping[str, Mapping[str, Range]]) -> None:
    profiles = {profile.name: profile for plan in plans for profile in plan.profiles}
    for engine, ranges in given.items():
        if engine and engine not in profiles:
            raise SparsepassError(f"--profile names the engine {engine!r}, and there are {', '.join(profiles)}")
        known = {axis for name, profile in profiles.items() if engine in ("", name) for axis in profile.ranges}
        if unknown := sorted(set(ranges) - known):
            raise SparsepassError(
                f"--profile names the axis {unknown[0]!r}, and those that vary are {', '.join(sorted(known))}"
            )
