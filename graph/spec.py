"""The rules that every program keeps, as code. They are checked after every pass and whenever a program is read."""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from sparsepass.graph.limits import holds
from sparsepass.graph.nodes import cut_of, linear_that_reads
from sparsepass.graph.records import BranchState, FusedPart, QuantizedState, SparseState
from sparsepass.graph.support import ProgramFormatError


class Violation(NamedTuple):
    """A rule that a program breaks.

    Attributes:
        where: Name of the weight, tensor, input or node at which it is broken.
        reason: What was expected, and what is there.
    """

    where: str
    reason: str


class ProgramFacts(Protocol):
    """What the rules look at: a `Program`, which imports this file."""

    graph_module: fx.GraphModule
    aliases: dict[str, str]
    sparse: dict[str, SparseState]
    quantized: dict[str, QuantizedState]
    fused: dict[str, tuple[FusedPart, ...]]
    example_inputs: dict[str, Tensor]
    dynamic_axes: dict[str, tuple[int, ...]]
    limits: tuple[str, ...]

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the output tensors."""


def check_program(program: ProgramFacts, graph: fx.Graph, *, patterns: bool = True) -> None:
    """Refuse a program that breaks a rule, while it is read.

    Args:
        program: Its tensors and facts are checked.
        graph: Its graph, which need not be compiled yet.
        patterns: Whether masks are held to N:M.

    Raises:
        ProgramFormatError: If a rule is broken; it names the place and the reason.
    """
    for where, reason in violations(program, graph, patterns=patterns):
        raise ProgramFormatError(f"a saved program is damaged at {where}: {reason}; save the program again")


def violations(program: ProgramFacts, graph: fx.Graph, *, patterns: bool = True) -> Iterator[Violation]:
    """Check a program against every rule. It may be on the meta device; then the values of masks are not looked at.

    1. Every tensor that the graph reads is there, and so is every tensor that an alias or a sparse state names.
    2. The graph returns as many tensors as the structure of the output has, every input has an example, within the limits.
    3. A mask is bool, has its weight's shape, keeps N of M along its axis at most, and the graph applies it.
    4. A mask that is being learned has its logits and its control, and the graph reads them beside it.
    5. A branch is whole: the graph reads S, shape [out, in/k], and X, shape [in/k, in], if it is trainable.
    6. A fused weight has the rows of its parts, and the graph multiplies by it once and cuts the result into them.
    7. A quantized weight has its scales, and zero points that its integers reach; the graph rounds it by them, and no other.

    Args:
        program: Not changed.
        graph: Its graph.
        patterns: Whether masks are held to N:M.

    Yields:
        What is broken, in the order of the rules; none for a sound program.
    """
    module = program.graph_module
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in sorted(read - tensors.keys()):
        yield Violation(name, "the graph reads this tensor, and the program does not have it")
    for alias, name in program.aliases.items():
        if name not in tensors:
            yield Violation(alias, f"it is another name of {name}, which the program does not have")
    yield from _ends(program, graph)
    masking = (torch.ops.sparsepass.masked_weight.default, torch.ops.sparsepass.learned_weight.default)
    applied = {tuple(str(a.target) for a in n.args[1:4] if isinstance(a, fx.Node)) for n in graph.nodes if n.target in masking}
    for weight, state in program.sparse.items():
        if weight not in tensors:
            yield Violation(weight, "it has a sparse state, and the program has no such tensor")
            continue
        yield from _mask(weight, state, tensors, applied, patterns=patterns)
        if state.branch is not None:
            yield from _branch(weight, state, state.branch, tensors, read)
    yield from _quantized(program, tensors, graph)
    for weight, parts in program.fused.items():
        yield from _fused(weight, parts, program.sparse.get(weight), tensors, program.aliases.values(), graph)


def num_broken_groups(kept: Tensor, n: int, m: int, axis: int) -> int:
    """Count the groups of M entries along an axis, M a divisor of its length, of which more than N are kept.

    Shapes: bool, any.

    >>> num_broken_groups(torch.tensor([[True, True, True, False], [True, False, False, False]]), 2, 4, 1)
    1
    """
    planes = torch.unflatten(kept, axis, (-1, m)).unbind(axis % kept.dim() + 1)
    # Adding M strided planes is much faster than a reduction over an axis of length M.
    count = planes[0].to(torch.int8 if m < 128 else torch.int32)
    for plane in planes[1:]:
        count += plane
    return int((count > n).sum())


def _ends(program: ProgramFacts, graph: fx.Graph) -> Iterator[Violation]:
    outputs = [node for node in graph.nodes if node.op == "output"]
    returned = len(outputs[0].args[0]) if len(outputs) == 1 and isinstance(outputs[0].args[0], list | tuple) else 0
    if len(outputs) != 1 or returned != len(program.output_names):
        yield Violation("its output", f"the graph returns {returned} tensors, and the output has {len(program.output_names)}")
    for node in graph.nodes:
        if node.op == "placeholder" and node.target not in program.example_inputs:
            yield Violation(str(node.target), "this input has no example")
    sizes = {name: tuple(example.shape) for name, example in program.example_inputs.items()}
    for name, axes in program.dynamic_axes.items():
        if wrong := [axis for axis in axes if axis >= len(sizes.get(name, ()))]:
            yield Violation(name, f"this input has no axis {wrong[0]}, which is said to vary")
    for limit in program.limits:
        try:
            within = holds(limit, sizes)
        except (LookupError, TypeError, ValueError) as error:
            yield Violation("its limits", f"{limit!r:.200} cannot be asked of its inputs ({error})")
            continue
        if not within:
            yield Violation("its limits", f"{limit!r:.200} does not hold for its own example inputs")


def _mask(
    weight: str, state: SparseState, tensors: dict[str, Tensor], applied: set[tuple[str, ...]], *, patterns: bool
) -> Iterator[Violation]:
    pattern = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*", state.pattern)
    n, m = (int(pattern[1]), int(pattern[2])) if pattern else (0, 0)
    if not 0 < n < m:
        yield Violation(weight, f"its pattern is N:M, such as 2:4, got {state.pattern!r}")
        return
    if state.mask is None:
        if state.learned is not None:
            yield Violation(weight, "its mask is being learned, and it has none")
        return
    beside = () if state.learned is None else (state.learned.logits, state.learned.control)
    missing = [name for name in (state.mask, *beside) if name not in tensors]
    if missing:
        yield Violation(weight, f"its state names {missing[0]}, which the program does not have")
        return
    if (state.mask, *beside) not in applied:
        yield Violation(weight, f"the graph does not apply its mask {', '.join((state.mask, *beside))}")
    mask, shape = tensors[state.mask], tensors[weight].shape
    if mask.dtype != torch.bool:
        yield Violation(weight, f"its mask {state.mask} is bool, got {mask.dtype}")
    elif mask.shape != shape:
        yield Violation(weight, f"its mask {state.mask} has the weight's shape {list(shape)}, got {list(mask.shape)}")
    elif not -mask.dim() <= state.axis < mask.dim() or mask.shape[state.axis] % m:
        yield Violation(weight, f"{state.pattern} does not run along axis {state.axis} of a weight of shape {list(shape)}")
    elif patterns and not mask.is_meta and (broken := num_broken_groups(mask, n, m, state.axis)):
        yield Violation(weight, f"{broken} groups of the weight are not {state.pattern}")


def _branch(
    weight: str, state: SparseState, branch: BranchState, tensors: dict[str, Tensor], read: set[str]
) -> Iterator[Violation]:
    size = tensors[weight]
    if size.dim() != 2 or state.axis not in (-2, -1, 0, 1) or branch.k < 1 or size.shape[state.axis] % branch.k:
        yield Violation(weight, f"a branch with k={branch.k} does not fit a weight of shape {list(size.shape)}")
        return
    in_features = size.shape[state.axis]
    segments, out_features = in_features // branch.k, size.shape[1 - state.axis % 2]
    parts = {branch.weight: (out_features, segments)}
    if branch.projection is not None:
        parts[branch.projection] = (segments, in_features)
    for name, shape in parts.items():
        if name not in tensors:
            yield Violation(weight, f"its branch has no tensor {name}")
        elif name not in read:
            yield Violation(weight, f"the graph does not read {name} of its branch")
        elif tensors[name].shape != shape:
            yield Violation(weight, f"{name} of its branch has shape {list(shape)}, got {list(tensors[name].shape)}")


def _quantized(program: ProgramFacts, tensors: dict[str, Tensor], graph: fx.Graph) -> Iterator[Violation]:
    rounding = [node for node in graph.nodes if node.target is torch.ops.sparsepass.quantized_weight.default]
    applied: dict[str, set[object]] = {}
    for node in rounding:
        how = (_name_read(node.args[1]), _name_read(node.args[2]), *node.args[3:])
        applied.setdefault(_name_read(node.args[0]) or "a computed weight", set()).add(how)
    for weight in applied.keys() - program.quantized.keys():
        yield Violation(weight, "the graph rounds it, and it is not said to be quantized")
    for weight, state in program.quantized.items():
        missing = [name for name in (weight, *state.names) if name not in tensors]
        if missing:
            yield Violation(weight, f"its grid needs {missing[0]}, which the program does not have")
        elif state.format == "fp8" and (state.bits != 8 or state.zero_points is not None):
            yield Violation(weight, "a grid of fp8 has 8 bits and no zero points")
        elif applied.get(weight) != {(state.scales, state.zero_points, *state.call)}:
            yield Violation(weight, f"the graph does not round it to its grid, {state.grid.text}")
        elif not (scales := tensors[state.scales]).is_meta and not scales.isfinite().all():
            yield Violation(weight, f"a scale in {state.scales} is not finite")
        elif state.zero_points is not None and _largest(tensors[state.zero_points]) > state.grid.ends[1]:
            yield Violation(weight, f"a zero point in {state.zero_points} is beyond {state.grid.ends[1]}, so zeros are lost")


def _largest(zero_points: Tensor) -> int:
    return 0 if zero_points.is_meta or not zero_points.numel() else int(zero_points.max())


def _name_read(node: object) -> str | None:
    """The tensor that a node reads, behind a mask maybe."""
    masks = (torch.ops.sparsepass.masked_weight.default, torch.ops.sparsepass.learned_weight.default)
    while isinstance(node, fx.Node) and node.target in masks:
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _fused(
    weight: str,
    parts: tuple[FusedPart, ...],
    state: SparseState | None,
    tensors: dict[str, Tensor],
    aliases: Collection[str],
    graph: fx.Graph,
) -> Iterator[Violation]:
    rows = tuple(part.rows for part in parts)
    if weight in aliases:
        yield Violation(weight, "it is fused, and tied to another")
    if weight not in tensors or tensors[weight].dim() != 2 or tensors[weight].shape[0] != sum(rows):
        yield Violation(weight, f"it is fused of {len(parts)} layers with {sum(rows)} rows, and the program has no such weight")
        return
    linear = linear_that_reads(graph, weight)
    cut = None if linear is None else cut_of(linear, rows)
    if linear is None or cut is None:
        yield Violation(weight, "it is fused, and the graph does not multiply by it once and cut the result into its parts")
        return
    if state is not None and state.axis not in (-1, 1):
        yield Violation(weight, f"it is fused along its rows, and {state.pattern} runs along axis {state.axis}")
    if _stands_between(linear, cut) != (state and state.mask, state and state.branch and state.branch.weight):
        yield Violation(weight, "it is fused, and the graph does not apply its mask and its branch, and nothing else, to it")
    bias = linear.args[2] if len(linear.args) > 2 else None
    has_bias = isinstance(bias, fx.Node)
    if any((part.bias is not None) != has_bias for part in parts):
        yield Violation(weight, f"it is fused, and {'not all of' if has_bias else 'some of'} its parts have a bias")
    elif isinstance(bias, fx.Node):
        is_own = bias.op == "get_attr" and [n for n in graph.nodes if n.op == "get_attr" and n.target == bias.target] == [bias]
        if not is_own or len(bias.users) != 1 or tensors[str(bias.target)].shape != (sum(rows),):
            yield Violation(weight, f"it is fused, and its bias is not one of {sum(rows)} numbers of its own")


def _stands_between(linear: fx.Node, cut: fx.Node) -> tuple[str | None, str | None]:
    """Names of the mask that is applied to a linear's weight, and of the branch that is added to its result; ? for others."""
    weight, total = linear.args[1], cut.args[0]
    mask = branch = None
    weight = _behind_rounding(weight)
    if isinstance(weight, fx.Node) and weight.op != "get_attr":
        mask = _name_of(weight.args[1]) if isinstance(weight.args[0], fx.Node) and weight.args[0].op == "get_attr" else "?"
    if isinstance(total, fx.Node) and total is not linear:
        added = total.args[1]
        is_branch = isinstance(added, fx.Node) and len(added.users) == 1 and added.target is torch.ops.aten.linear.default
        branch = _name_of(_behind_rounding(added.args[1])) if isinstance(added, fx.Node) and is_branch else "?"
    return mask, branch


def _behind_rounding(node: Any) -> Any:
    """What a rounding is given, if a node is one; else the node."""
    is_rounding = isinstance(node, fx.Node) and node.target is torch.ops.sparsepass.quantized_weight.default
    return node.args[0] if is_rounding else node


def _name_of(node: object) -> str:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1 else "?"
