"""Which engines a program becomes, and over which lengths each is optimized.

1. A plain graph is one engine, ``model``; the encoder of an encoder-decoder is ``encoder``.
2. A decoder with a cache is two engines (or one with two profiles): ``prefill`` takes a whole prompt and no past,
   ``decode`` one token and the past.
3. Lengths come from the command line, else from the model's limit and the program's example inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from sparsepass.export.targets.onnx import OnnxArtifact, OnnxGraph
from sparsepass.export.targets.tensorrt.options import EngineTarget, Range
from sparsepass.graph.limits import position_limit
from sparsepass.graph.support import SparsepassError

MAX_BATCH, MAX_TOKENS = 8, 2048
"""Largest lengths where nothing else is said; the model's own limit is the other bound of the tokens."""

Lengths = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, most common and largest shape of an input."""

_TOKEN_AXES: Final = ("sequence", "encoder_sequence", "decoder_sequence")


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
) -> tuple[EnginePlan, ...]:
    """Say which engines are built from the graphs of an export.

    Args:
        artifact: The graphs.
        options: Lengths that the user gave, and whether prefill and decode share an engine.
        config: The model's configuration, for the number of tokens that it can take.
        examples: Input -> shape of the program's example, for axes that nothing else bounds.

    Raises:
        SparsepassError: If a length is given for an engine or an axis that is not there.
    """
    limit = token_limit(config or {})
    plans: list[EnginePlan] = []
    for graph in artifact.graphs:
        names = _profile_names(artifact, graph)
        profiles = tuple(
            Profile(name=name, ranges=_ranges(graph, name, options.ranges, limit, examples or {})) for name in names
        )
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
