"""Sites: the linear-like operations of a graph, whatever shape their weight is stored in.

Tensor shape legend: O out features, I in features (of one matmul, along which N:M runs), E experts, K kernel positions.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

import sparsepass.graph.ops  # noqa: F401  (registers the operator that _MASKED names)
from sparsepass.graph.nodes import ancestors, module_path, module_type, op_name, splits_of, tensor_of
from sparsepass.graph.roles import Role, role_of, role_of_table

Layout = Literal["linear", "conv1d_hf", "conv1d", "conv2d", "experts", "experts_transposed", "embedding", "computed"]

BETWEEN_BLOCKS = "rotation_between_blocks"
"""Last part of the name of a weight that rotates the residual stream from one block to the next."""

_aten = torch.ops.aten
_MASKED = {
    torch.ops.sparsepass.masked_weight.default,
    torch.ops.sparsepass.learned_weight.default,
    torch.ops.sparsepass.quantized_weight.default,
}
_TRANSPOSES = {_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default, _aten.mT.default}
_MATMULS = {_aten.mm.default, _aten.matmul.default, _aten.bmm.default}
_CONVS = {
    _aten.conv1d.default: "conv1d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv2d.padding: "conv2d",
}
_GROUPED_NAMES = {"transformers::grouped_mm_fallback", "aten::_grouped_mm", "transformers::_grouped_mm"}
# Operations that multiply by a weight, and that no pass can rewrite: they are listed with that reason.
_UNSUPPORTED_NAMES = {
    "einsum", "bilinear", "baddbmm", "convolution", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "mm", "matmul", "bmm", "multi_head_attention_forward",
}  # fmt: skip


_IDLE = "the captured graph never runs it: the example inputs had nothing for it (images, say); capture with such inputs"
_LEFT_ALONE: Mapping[Role, str] = {
    "head": "output head (its result is an output of the model): name it in targets to prune it",
    "router": "router: it picks the experts, is tiny and sensitive; name it in targets to prune it",
    "gate": "gate: it weighs whole branches by a few numbers a token; name it in targets to prune it",
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One weight used by linear-like operations of a graph.

    Attributes:
        name: Module path, such as ``model.layers.0.self_attn.q_proj``; the parameter's own name where it has no module.
        weight: Fully qualified name of the weight.
        layout: How the weight is stored: ``linear`` [O, I]; ``conv1d_hf`` [I, O] (GPT-2's Conv1D and plain matmuls);
            ``conv1d`` [O, I, K] and ``conv2d`` [O, I, K, K]; ``experts`` [E, O, I]; ``experts_transposed`` [E, I, O];
            ``embedding`` [V, I]; ``computed``: not a stored weight.
        shape: Shape of the stored weight.
        in_features: Length of the axis along which N:M runs.
        out_features: Rows of one matrix.
        nm_axis: Axis of the *stored* weight along which N:M runs (the reduction axis of the matmul).
        groups: Groups of a convolution, else 1.
        bias: Name of the bias, if any.
        ties: Other names of the same parameter.
        splits: Sizes into which the output is split right away (fused QKV, fused gate/up); empty if it is not.
        parts: Weights of the layers that it stands for, if the pass `fuse_siblings` has made it.
        module_type: Class name of the module that owns it, such as ``Linear``.
        inputs: Graph nodes of the activations it reads, one for each use.
        nodes: Graph nodes of the operations that use it.
        left_alone: Why passes leave it alone; None if they take it.
        role: What it is to its model: see `sparsepass.graph.roles.Role`; None for a layer among others.
        can_be_named: Whether naming it in a pass's targets overrides `left_alone` (an output head, a router); False where
            nothing could be rewritten, or another use of the same weight would suffer.
    """

    name: str
    weight: str
    layout: Layout
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    nm_axis: int
    groups: int = 1
    bias: str | None = None
    ties: tuple[str, ...] = ()
    splits: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    module_type: str = ""
    inputs: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    left_alone: str | None = None
    role: Role | None = None
    can_be_named: bool = True

    @property
    def num_weights(self) -> int:
        """Entries of the stored weight."""
        return math.prod(self.shape)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return the stored weight as rows to be pruned, N:M along the last axis.

        Shapes: [O, I] for linear layouts; [O, K*I] for convolutions (kernel positions outermost, so groups of M are
        input channels at one kernel position); [E, O, I] for experts.
        """
        if self.layout in ("conv1d_hf", "experts_transposed"):
            return weight.transpose(-1, -2)
        if self.layout in ("conv1d", "conv2d"):
            return weight.movedim(1, -1).reshape(weight.shape[0], -1)
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Undo `to_matrix`. Works for anything shaped like the matrix, a mask as well; the result is contiguous."""
        if self.layout in ("conv1d_hf", "experts_transposed"):
            return matrix.transpose(-1, -2).contiguous()
        if self.layout in ("conv1d", "conv2d"):
            out, channels, *kernel = self.shape
            return matrix.reshape(out, *kernel, channels).movedim(-1, 1).contiguous()
        return matrix.contiguous()


def find_sites(
    graph_module: fx.GraphModule,
    *,
    output_heads: Iterable[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> tuple[Site, ...]:
    """Find every linear-like operation of a graph, in the order in which the graph runs them.

    Args:
        graph_module: A flat graph.
        output_heads: Names of weights that the model itself declares as its output head.
        aliases: Other name -> name in the graph, for parameters with several names.

    Returns:
        One site for each weight (not for each use), embeddings and matmuls with computed weights included, each with the
        reason why it is left alone, if it is.
    """
    uses: dict[str, list[WeightUse]] = {}
    for node in graph_module.graph.nodes:
        matched = match_weight(node)
        for use in [matched] if matched is not None else _unsupported(node):
            key = use.weight or f"{module_path(node) or node.name}"
            uses.setdefault(key, []).append(use)
    names: dict[int, list[str]] = {}
    for alias, name in (aliases or {}).items():
        names.setdefault(id(tensor_of(graph_module, name)), []).append(alias)
    heads = {(aliases or {}).get(name, name) for name in output_heads}
    return tuple(_site(graph_module, key, found, names=names, heads=heads) for key, found in uses.items())


def idle_layers(graph_module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Layers that a program holds and its graph never runs, such as an image tower where the example had no image.

    Args:
        graph_module: A flat graph.
        tensors: Every tensor of the program, by name.

    Returns:
        Name of the layer -> why nothing was done to it.
    """
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    weights = [n for n, t in tensors.items() if isinstance(t, torch.nn.Parameter) and t.dim() > 1 and n not in read]
    endings = (".weight", "_weight", "_proj")
    return {n.removesuffix(".weight"): _IDLE for n in weights if n.endswith(endings) or "experts" in n}


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """One operation reading one weight.

    Attributes:
        node: The operation.
        weight: Name of the weight; None where it is computed.
        layout: How it is stored.
        activation: What it is multiplied by.
        bias: What is added.
        groups: Of a convolution.
    """

    node: fx.Node
    weight: str | None
    layout: Layout
    activation: fx.Node
    bias: fx.Node | None = None
    groups: int = 1


def match_weight(node: fx.Node) -> WeightUse | None:
    """The weight that an operation multiplies by or looks up, and how it is stored; None where it does neither."""
    if node.op != "call_function":
        return None
    target, args = node.target, node.args
    if target is _aten.linear.default:
        return _weight_use(node, args[1], "linear", args[0], args[2] if len(args) > 2 else None)
    if target is _aten.addmm.default:
        return _weight_use(node, args[2], "conv1d_hf", args[1], args[0], computed_counts=False)
    if target in _MATMULS:
        return _weight_use(node, args[1], "conv1d_hf", args[0], None, computed_counts=False)
    if target in _CONVS:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        bound: dict[str, Any] = dict(zip(names, args, strict=False)) | node.kwargs
        groups = int(bound.get("groups", 1))
        return _weight_use(node, bound["weight"], _CONVS[target], bound["input"], bound.get("bias"), groups=groups)
    if isinstance(target, torch._ops.OpOverload) and target._schema.name in _GROUPED_NAMES:
        return _weight_use(node, args[1], "experts_transposed", args[0], None)
    if target is _aten.embedding.default:
        return _weight_use(node, args[0], "embedding", args[1], None)
    return None


def _unsupported(node: fx.Node) -> list[WeightUse]:
    """The matrices that an operation multiplies by in a way that is not a site: listed, so that none is skipped in silence."""
    if node.op != "call_function" or op_name(node) not in _UNSUPPORTED_NAMES:
        return []
    found = []
    for source in dict.fromkeys(map(_stored, node.all_input_nodes)):
        stored = source.op == "get_attr"
        if stored and _tensor_read(source).dim() < 2:
            continue  # a bias
        if stored or _comes_from_weights(source):
            weight = str(source.target) if stored else None
            found.append(WeightUse(node=node, weight=weight, layout="computed", activation=node.all_input_nodes[0]))
    return found


def _comes_from_weights(node: fx.Node) -> bool:
    """Whether a value is computed from parameters alone, whatever the inputs."""
    above = ancestors(node)
    if any(source.op == "placeholder" for source in above):
        return False
    read = [_tensor_read(source) for source in above if source.op == "get_attr"]
    return any(isinstance(tensor, torch.nn.Parameter) for tensor in read)


def _tensor_read(node: fx.Node) -> Tensor:
    return tensor_of(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]


def _stored(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and (node.target in _TRANSPOSES or node.target in _MASKED):
        node = node.all_input_nodes[0]
    return node


def _weight_use(
    node: fx.Node,
    weight: object,
    layout: str,
    activation: object,
    bias: object,
    *,
    groups: int = 1,
    computed_counts: bool = True,
) -> WeightUse | None:
    assert isinstance(weight, fx.Node)
    assert isinstance(activation, fx.Node)
    bias_node = bias if isinstance(bias, fx.Node) else None
    source, transposed = weight, False
    while source.op == "call_function" and (source.target in _MASKED or source.target in _TRANSPOSES):
        if source.target in _TRANSPOSES:
            if not _swaps_last_two(source):
                break
            transposed = not transposed
        source = source.args[0]  # type: ignore[assignment]
    if source.op != "get_attr":
        if layout == "embedding" or not (computed_counts or _comes_from_weights(source)):
            return None  # a product of two activations, as in attention
        return WeightUse(node=node, weight=None, layout="computed", activation=activation, bias=bias_node, groups=groups)
    if transposed:
        layout = {"linear": "conv1d_hf", "conv1d_hf": "linear", "experts_transposed": "experts"}.get(layout, layout)
    if _tensor_read(source).dim() == 3:
        layout = {"linear": "experts", "conv1d_hf": "experts_transposed"}.get(layout, layout)
    return WeightUse(
        node=node,
        weight=str(source.target),
        layout=layout,  # type: ignore[arg-type]
        activation=activation,
        bias=bias_node,
        groups=groups,
    )


def _swaps_last_two(node: fx.Node) -> bool:
    if node.target in (_aten.t.default, _aten.numpy_T.default, _aten.mT.default):
        return True
    if node.target is _aten.transpose.int:
        stored = _stored(node)
        rank = _tensor_read(stored).dim() if stored.op == "get_attr" else 2
        return {node.args[1], node.args[2]} in ({-2, -1}, {rank - 2, rank - 1})
    order = list(node.args[1])  # type: ignore[arg-type]
    rank = len(order)
    return [axis % rank for axis in order] == [*range(rank - 2), rank - 1, rank - 2]


def _site(
    graph_module: fx.GraphModule,
    key: str,
    uses: list[WeightUse],
    *,
    names: Mapping[int, list[str]],
    heads: set[str],
) -> Site:
    # A tied embedding is one weight with two kinds of use: the matmul is what sites are about.
    matmuls = sorted((use for use in uses if use.layout != "embedding"), key=lambda use: use.layout == "computed")
    main = matmuls[0] if matmuls else uses[0]
    of_interest = matmuls or uses
    if main.weight is None or main.layout == "computed":
        computed = "its weight is computed in the graph, not stored: there is nothing to mask"
        unsupported = f"{op_name(main.node)} is not an operation that passes can rewrite"
        return Site(
            name=key.removesuffix(".weight"),
            weight="",
            layout="computed",
            shape=tuple(tensor_of(graph_module, main.weight).shape) if main.weight else (),
            in_features=0,
            out_features=0,
            nm_axis=-1,
            module_type=module_type(main.node),
            inputs=tuple(use.activation.name for use in of_interest),
            nodes=tuple(use.node.name for use in of_interest),
            left_alone=unsupported if main.weight else computed,
            can_be_named=False,
        )
    tensor = tensor_of(graph_module, main.weight)
    shape = tuple(tensor.shape)
    nm_axis = {"linear": 1, "conv1d_hf": 0, "conv1d": 1, "conv2d": 1, "experts": 2, "experts_transposed": 1}.get(main.layout, 1)
    out_axis = {"linear": 0, "conv1d_hf": 1, "experts": 1, "experts_transposed": 2}.get(main.layout, 0)
    ties = tuple(sorted(set(names.get(id(tensor), ())) - {main.weight}))
    is_empty = not shape[nm_axis] or not shape[out_axis]
    role = None if is_empty else _role(main, uses, heads, shape[nm_axis], shape[out_axis])
    return Site(
        name=main.weight.removesuffix(".weight"),
        weight=main.weight,
        layout=main.layout,
        shape=shape,
        in_features=shape[nm_axis],
        out_features=shape[out_axis],
        nm_axis=nm_axis,
        groups=main.groups,
        bias=str(main.bias.target) if main.bias is not None and main.bias.op == "get_attr" else None,
        ties=ties,
        splits=splits_of(main.node, shape[out_axis]),
        module_type=module_type(main.node),
        inputs=tuple(use.activation.name for use in of_interest),
        nodes=tuple(use.node.name for use in of_interest),
        left_alone=f"it has no weights: {shape[nm_axis]} inputs, {shape[out_axis]} outputs"
        if is_empty
        else _reason(main, uses, ties, role, is_declared=main.weight in heads),
        role=role,
        can_be_named=role not in ("embedding", "table") and len({use.layout for use in uses}) == 1 and 0 not in shape,
    )


def _role(main: WeightUse, uses: list[WeightUse], heads: set[str], in_features: int, out_features: int) -> Role | None:
    if tables := [use for use in uses if use.layout == "embedding"]:
        return role_of_table([use.activation for use in tables])
    if main.weight in heads:
        return "head"
    roles = {role_of(use.node, in_features, out_features) for use in uses}
    return next((role for role in _LEFT_ALONE if role in roles), None)


def _reason(
    main: WeightUse, uses: list[WeightUse], ties: tuple[str, ...], role: Role | None, *, is_declared: bool
) -> str | None:
    if (main.weight or "").rpartition(".")[2] == BETWEEN_BLOCKS:
        return "rotation between two blocks: pruning it would undo what rotated weights around it rely on"
    layouts = {use.layout for use in uses}
    if layouts == {"embedding"}:
        return "embedding: a table that is looked up, not multiplied"
    if role in ("embedding", "table"):
        other = f" ({', '.join(ties)})" if ties else ""
        return f"tied to the embedding{other}: a mask on it would prune the embedding too"
    if len(layouts) > 1:
        return f"used in several layouts ({', '.join(sorted(layouts))}): no axis serves them all"
    if is_declared:
        return "output head: pruning it costs much accuracy; name it in targets to prune it"
    return _LEFT_ALONE.get(role) if role else None
