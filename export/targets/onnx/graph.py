"""Tidying an exported ONNX graph: weights as the runtime multiplies them, names, axes, nothing twice.

1. A constant Transpose, Split, Squeeze or Unsqueeze between a weight and its use is carried out on the stored tensor, so
   that every MatMul and Gemm reads its weight as it is stored. TensorRT looks for 2:4 there, and nowhere else.
2. A weight with uses in two layouts (an output head tied to the embedding) stays as it is: it would be stored twice.
3. Initializers carry the program's weight names; one that was transposed keeps its name, parts get a number behind it.
4. Weights take no part in constant folding and de-duplication, which would rename and merge them. Neither do numbers that
   are nearly 0 or 1: the optimizer takes them for that, and drops the epsilon of a norm.
5. A Reshape that keeps its leading axes says so with zeros, instead of computing its shape from theirs; parts of a split
   into parts of a computed size are slices.
6. Equal computations are shared (the segment sum of SLoRB siblings), constants are folded, unused nodes go.
7. Traces of the machine that exported (file names in metadata) are removed.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from onnxscript import optimizer, rewriter

from sparsepass.export.targets.onnx.artifact import Array, OnnxGraph, OnnxValue, Role, Step, StoredWeight, apply_view
from sparsepass.graph.support import SparsepassError, first_line

_LAYOUT_OPS = {"Transpose", "Split", "Squeeze", "Unsqueeze"}
_CONVS = {"Conv", "ConvTranspose"}
_WHOLE = ("past_sequence + sequence", "sequence + past_sequence")
_SYMBOL = re.compile(r"\b[su]\d+\b")


Views = dict[str, tuple[str, tuple[Step, ...]]]
"""Initializer -> (weight of the program, steps from that weight to the initializer)."""


def tidy(
    model: ir.Model,
    *,
    weight_names: Callable[[str], str | None],
    axis_names: Mapping[str, tuple[str | None, ...]],
) -> Views:
    """Bring an exported model into the form that is written; see the rules at the top of this file.

    Args:
        model: Changed in place.
        weight_names: Name of an initializer -> name of the program's weight, None if it is none.
        axis_names: Input -> a name for each of its axes (None: whatever it is called).

    Returns:
        Where each weight went.
    """
    if model.functions:
        ir_passes.InlinePass()(model)
    ir_passes.IdentityEliminationPass()(model)
    # Every constant becomes an initializer, so that there is one place to look for it.
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    names = _rename_weights(model.graph, weight_names)
    views = _settle_layouts(model, names)
    _settle_reshapes(model.graph)
    _settle_splits(model.graph)
    _optimize(model, {name for name, _ in views.values()} | set(views))
    views = {name: view for name, view in views.items() if name in model.graph.initializers}
    _name_axes(model.graph, axis_names)
    ir_passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for tensor in (value.const_value for value in model.graph.initializers.values()):
        assert tensor is not None
        tensor.metadata_props.clear()
    return views


def stored_weights(model: ir.Model, views: Views, file: str) -> Iterator[tuple[str, StoredWeight]]:
    """Tell for each weight of the program in which initializer it stands, and along which axis that is reduced."""
    for name, (weight, view) in views.items():
        value = model.graph.initializers[name]
        uses = [_reduced(usage.node, usage.idx, value) for usage in value.uses()] or [("", None)]
        op, axis = next((use for use in uses if use[1] is not None), uses[0])
        assert value.shape is not None
        shape = tuple(int(n) for n in value.shape.numpy())
        yield weight, StoredWeight(file=file, initializer=name, shape=shape, op=op, axis=axis, view=view)


def describe(model: ir.Model, file: str, role: Role) -> OnnxGraph:
    """Inputs and outputs of a graph, for the report."""
    return OnnxGraph(
        file=file,
        role=role,
        inputs=tuple(_describe(value) for value in model.graph.inputs),
        outputs=tuple(_describe(value) for value in model.graph.outputs),
        num_nodes=len(model.graph),
    )


def _describe(value: ir.Value) -> OnnxValue:
    assert value.name is not None
    assert value.dtype is not None
    axes = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ())
    return OnnxValue(name=value.name, dtype=value.dtype.name.lower(), axes=axes)


def _rename_weights(graph: ir.Graph, weight_names: Callable[[str], str | None]) -> set[str]:
    """Give initializers the program's names; returns those that are weights of the program."""
    found = {name: weight for name in graph.initializers if (weight := weight_names(name)) is not None}
    assert len(set(found.values())) == len(found), "two initializers hold one weight"
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    for name, weight in found.items():
        if name != weight:
            assert weight not in taken, weight
            value = graph.initializers.pop(name)
            value.name = weight
            graph.initializers[weight] = value
    return set(found.values())


def _settle_layouts(model: ir.Model, names: set[str]) -> Views:
    graph = model.graph
    views: Views = {}
    settled: list[str] = []
    made: list[ir.Value] = []
    for name in sorted(names):
        value = graph.initializers[name]
        assert value.shape is not None
        shape = tuple(int(n) for n in value.shape.numpy())
        leaves: dict[tuple[Step, ...], list[ir.Value]] = {}
        for view, leaf in _leaves(value, (), np.broadcast_to(np.int8(0), shape)):
            leaves.setdefault(view, []).append(leaf)
        sizes = {view: apply_view(np.broadcast_to(np.int8(0), shape), view).shape for view in leaves}
        if set(leaves) <= {()} or sum(map(math.prod, sizes.values())) > math.prod(shape):
            views[name] = (name, ())
            continue
        tensor = value.const_value
        assert tensor is not None
        settled.append(name)
        for number, (view, found) in enumerate(leaves.items()):
            stored = _viewed(tensor, view, sizes[view], name if len(leaves) == 1 else f"{name}.{number}")
            new = ir.Value(name=stored.name, shape=ir.Shape(sizes[view]), type=ir.TensorType(tensor.dtype), const_value=stored)
            made.append(new)
            assert stored.name is not None
            views[stored.name] = (name, view)
            for leaf in found:
                ir.convenience.replace_all_uses_with(leaf, new)
    ir_passes.RemoveUnusedNodesPass()(model)  # once for all weights: it walks the whole graph
    for name in settled:
        graph.initializers.pop(name, None)
    for new in made:
        assert new.name is not None
        graph.initializers[new.name] = new
    return views


def _leaves(value: ir.Value, view: tuple[Step, ...], probe: Array) -> Iterator[tuple[tuple[Step, ...], ir.Value]]:
    """Values behind layout operations that something else reads, each with the steps that lead to it.

    The probe has the value's shape: intermediate values of a fresh export do not all carry one.
    """
    found = False
    for usage in value.uses():
        steps = _steps(usage.node, probe.shape) if usage.idx == 0 else None
        if steps is None:
            found = True
            continue
        for step, output in zip(steps, usage.node.outputs, strict=True):
            yield from _leaves(output, (*view, step), apply_view(probe, (step,)))
    if found or value.is_graph_output():
        yield view, value


def _steps(node: ir.Node, shape: tuple[int, ...]) -> list[Step] | None:
    """What a layout operation does, one step for each output; None if it is none, or not a constant one."""
    if node.op_type not in _LAYOUT_OPS or node.domain not in ("", "ai.onnx"):
        return None
    rank, rest = len(shape), node.inputs[1:]
    if node.op_type == "Transpose":
        return [("transpose", tuple(node.attributes.get_ints("perm", list(reversed(range(rank))))))]
    numbers = None
    if rest and rest[0] is not None:
        tensor = ir.convenience.get_const_tensor(rest[0])
        if tensor is None:
            return None
        numbers = [int(n) for n in tensor.numpy().ravel()]
    if node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0) % rank
        length, count = shape[axis], len(node.outputs)
        part = -(-length // count)
        sizes = numbers or [part] * (count - 1) + [length - part * (count - 1)]
        stops = np.cumsum(sizes).tolist()
        return [("split", (axis, n, stop - size, stop)) for n, (size, stop) in enumerate(zip(sizes, stops, strict=True))]
    if numbers is None:
        return None
    target = rank + len(numbers) if node.op_type == "Unsqueeze" else rank
    return [(node.op_type.lower(), tuple(n % target for n in numbers))]


def _viewed(tensor: ir.TensorProtocol, view: tuple[Step, ...], shape: tuple[int, ...], name: str) -> ir.LazyTensor:
    """The viewed tensor, computed when it is written, so that a large model is not held twice."""

    def compute() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(apply_view(tensor.numpy(), view)), dtype=tensor.dtype)

    return ir.LazyTensor(compute, tensor.dtype, ir.Shape(shape), name=name)


def _settle_reshapes(graph: ir.Graph) -> None:
    """Give a Reshape a constant shape where the axes that vary stay in their places: 0 means "as in the input"."""
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for node in graph:
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Reshape" or source is None or source.shape is None or result.shape is None:
            continue
        numbers = [
            axis if isinstance(axis, int) else 0 if n < len(source.shape) and _same(axis, source.shape[n]) else None
            for n, axis in enumerate(result.shape)
        ]
        if None in numbers or any(axis == 0 for axis in result.shape if isinstance(axis, int)):
            continue
        key = tuple(n for n in numbers if n is not None)
        if len(key) == len(source.shape) and all(n in (0, source.shape[place]) for place, n in enumerate(key)):
            if not result.is_graph_output():
                ir.convenience.replace_all_uses_with(result, source)
            continue
        if key not in shapes:
            name = "shape." + "x".join(map(str, key))
            shapes[key] = ir.Value(
                name=name,
                shape=ir.Shape([len(key)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=ir.tensor(np.array(key, np.int64), name=name),
            )
            graph.initializers[name] = shapes[key]
        node.replace_input_with(1, shapes[key])
        node.attributes.pop("allowzero", None)


def _same(axis: ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    return isinstance(other, ir.SymbolicDim) and axis.value is not None and axis.value == other.value


def _settle_splits(graph: ir.Graph) -> None:
    """Write a split into parts of a computed size as slices. The optimizer (onnxscript 0.7) fails at it."""
    for node in list(graph):
        if node.op_type != "SplitToSequence" or len(node.inputs) != 2:
            continue
        source, size = node.inputs
        picks = [usage.node for usage in node.outputs[0].uses()]
        numbers = [pick.inputs[1].const_value if pick.op_type == "SequenceAt" and pick.inputs[1] else None for pick in picks]
        if size is None or size.const_value is not None or size.shape is None or len(size.shape) or None in numbers:
            continue
        axis = _constant(graph, f"{node.outputs[0].name}_axis", node.attributes.get_int("axis", 0))
        for pick, number in zip(picks, numbers, strict=True):
            assert number is not None
            name = pick.outputs[0].name
            ends = [_constant(graph, f"{name}_{part}", int(number.numpy()) + part) for part in (0, 1)]
            bounds = [ir.node("Mul", [size, end], name=f"{name}_end_{part}") for part, end in enumerate(ends)]
            cut = ir.node("Slice", [source, *(each.outputs[0] for each in bounds), axis], name=f"{name}_slice")
            cut.outputs[0].shape, cut.outputs[0].type = pick.outputs[0].shape, pick.outputs[0].type
            graph.insert_before(pick, [*bounds, cut])
            ir.convenience.replace_all_uses_with(pick.outputs[0], cut.outputs[0], replace_graph_outputs=True)
            graph.remove(pick, safe=True)
        graph.remove(node, safe=True)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    """An initializer of shape [1]."""
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.initializers[name] = value
    return value


def _optimize(model: ir.Model, weights: set[str]) -> None:
    """Fold, share and drop, with values out of reach that the optimizer would rename, merge or take for others."""
    hidden = {}
    for name, value in model.graph.initializers.items():
        if name in weights or _is_nearly_neutral(value.const_value):
            hidden[value], value.const_value = value.const_value, None
    try:
        with _linear_rules():
            optimizer.optimize_ir(model, should_fold=lambda node: False if node.op_type == "Resize" else None)
    except ir.passes.PassError as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        said = next((str(each) for each in chain if "node" in str(each)), first_line(error))
        raise SparsepassError(
            f"onnxscript cannot optimize the graph: {said} ({type(chain[-1]).__name__}: {chain[-1]})"
        ) from error
    for value, tensor in hidden.items():
        value.const_value = tensor
    ir_passes.RemoveUnusedNodesPass()(model)


def _is_nearly_neutral(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a number is so near to 0 or 1 that onnxscript (0.7) takes ``x + 1e-8`` and ``x * 1.000001`` for x alone."""
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return False
    number = float(tensor.numpy().item())
    return number not in (0.0, 1.0) and (abs(number) < 1e-7 or abs(number - 1) < 1e-4)


@contextlib.contextmanager
def _linear_rules() -> Iterator[None]:
    """Leave out the optimizer's rules whose pattern has several outputs (in onnxscript 0.7: Slice, Slice -> Split).

    Its matcher looks for each of those at every node of the graph in every other node: a third of the export of a model of
    30 layers. If onnxscript moves its list of rules, exports are slower and otherwise nearly the same.
    """
    original = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if original is None:
        yield
        return
    rules = tuple(rule for rule in original if getattr(rule._target_pattern, "has_single_output_node", True))
    rewriter._DEFAULT_REWRITE_RULES = rules
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = original


def _name_axes(graph: ir.Graph, axis_names: Mapping[str, tuple[str | None, ...]]) -> None:
    symbols: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in zip(value.shape or (), axis_names.get(value.name or "", ()), strict=False):
            if isinstance(axis, ir.SymbolicDim) and axis.value is not None and name is not None:
                symbols.setdefault(str(axis.value), name)

    def readable(axis: object) -> object:
        if not isinstance(axis, ir.SymbolicDim) or axis.value is None:
            return axis
        text = _SYMBOL.sub(lambda match: symbols.get(match[0], match[0]), symbols.get(str(axis.value), str(axis.value)))
        return ir.SymbolicDim("total_sequence" if text in _WHOLE else text)

    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([readable(axis) for axis in value.shape])  # type: ignore[misc]
    for value in graph.inputs:
        names = axis_names.get(value.name or "", ())
        if value.shape is not None and len(names) == len(value.shape):
            value.shape = ir.Shape(
                [
                    name if name is not None and not isinstance(axis, int) else axis
                    for axis, name in zip(value.shape, names, strict=True)
                ]
            )


def _reduced(node: ir.Node, index: int, value: ir.Value) -> tuple[str, int | None]:
    """The operation that reads a weight, and the axis of the stored tensor that it reduces."""
    assert value.shape is not None
    rank = len(value.shape)
    if node.op_type in _CONVS and index == 1:
        return node.op_type, 1
    if node.op_type == "MatMul" and rank > 1:
        return "MatMul", rank - 2 if index == 1 else rank - 1
    if node.op_type == "Gemm" and index < 2:
        flipped = bool(node.attributes.get_int("transB" if index else "transA", 0))
        return "Gemm", int(flipped) if index else int(not flipped)
    return node.op_type, None
