"""What a layer is to its model: its output head, a router, a gate, a table, or one layer among others.

Read from what the graph does with its result, whatever the layer is called.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, fx, nn

from sparsepass.graph.nodes import op_name, tensor_of

Role = Literal["embedding", "table", "head", "router", "gate"]

_SHAPES = {
    "view", "reshape", "_unsafe_view", "slice", "select", "squeeze", "unsqueeze", "transpose", "permute", "contiguous",
    "clone", "to", "_to_copy", "alias", "flatten", "unflatten", "expand", "split", "split_with_sizes", "chunk", "getitem", "t",
    "index", "index_select", "gather", "type_as", "float", "expand_as", "unbind", "detach", "take_along_dim", "movedim", "cat",
    "roll", "_assert_tensor_metadata", "dropout", "feature_dropout", "alpha_dropout",
}  # fmt: skip
_NORMALIZING = {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid"}
# Functions of one number that models put behind their head: probabilities, soft caps, bounds.
_SQUASHING = _NORMALIZING | {
    "tanh", "log_sigmoid", "logsigmoid", "softplus", "exp", "log", "clamp", "clamp_min", "clamp_max", "hardtanh", "hardsigmoid",
    "neg", "nan_to_num", "log1p", "expm1",
}  # fmt: skip
_SCALING = {"mul", "div", "add", "sub", "true_divide", "rsub"}
_POOLING = {"mean", "sum", "amax", "max", "logsumexp", "cumsum"}  # over tokens, as a rule
_MASKING = {"masked_fill", "where"}
_PICKING = {"topk", "sort", "argsort", "argmax", "kthvalue", "multinomial"}
_COMPARING = {"gt", "ge", "lt", "le", "eq", "greater", "greater_equal", "less", "less_equal"}
_WEIGHING = {"mul", "matmul", "bmm", "mm", "baddbmm", "einsum", "linear", "sum"}
_MEETING = {"matmul", "bmm", "baddbmm", "einsum"}
_SMALL = 4  # a gate has a few outputs: at most one for this many inputs


def role_of(node: fx.Node, in_features: int, out_features: int) -> Role | None:
    """What the result of a matmul is used for.

    1. ``head``: it is an output of the graph, but for its shape, dtype, order and rows, a constant scale or shift, a mask,
       a mean over tokens, and functions such as softmax, sigmoid and tanh (tanh not where it has as many outputs as
       inputs). Values that attention reads are none, though a key-value cache is an output.
    2. ``router``: something is picked by it: top-k, sort, argmax, the place of a maximum, a comparison.
    3. ``gate``: a few numbers a token that weigh other results through a softmax or sigmoid: a router that takes all
       experts, a shared expert's gate.

    Args:
        node: The matmul.
        in_features: Length of its inputs.
        out_features: Length of its outputs.
    """
    # A square layer before tanh, as BERT's pooler, makes hidden features of hidden features.
    follows = _scaled if in_features != out_features else _scaled_without_tanh
    if _reaches(node, follows, lambda user, _: user.op == "output") and not _is_attended(node):
        return "head"
    if _reaches(node, _mixed, lambda user, _: op_name(user) in _PICKING) or _reaches(node, _scaled, _compared):
        return "router"
    if out_features * _SMALL <= in_features and any(_weighs(user) for user in _users_through(node, _shaped)):
        return "gate"
    return None


def role_of_table(indices: Iterable[fx.Node]) -> Role:
    """What a weight is that is looked up: an ``embedding`` of the tokens that the model is given, or another ``table``.

    Args:
        indices: What it is looked up by, wherever it is.
    """
    return "embedding" if any(_is_tokens(each) for each in indices) else "table"


def _is_tokens(node: fx.Node) -> bool:
    """Whether a value is an input, up to its shape and type, and no input of positions or kinds of tokens."""
    while node.op == "call_function" and op_name(node) in _SHAPES:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and not any(word in str(node.target) for word in ("position", "type", "mask"))


def _reaches(node: fx.Node, follows: Callable[[fx.Node, fx.Node], bool], found: Callable[[fx.Node, fx.Node], bool]) -> bool:
    stack = [(user, node) for user in node.users]
    seen = set()
    while stack:
        user, source = stack.pop()
        if found(user, source):
            return True
        if user not in seen and user.op == "call_function" and follows(user, source):
            seen.add(user)
            stack.extend((later, user) for later in user.users)
    return False


def _is_attended(node: fx.Node) -> bool:
    """Whether the result, up to its shape, meets other results in a product, as keys and values do."""
    users = _users_through(node, _shaped)
    meeting = (user for user in users if op_name(user) in _MEETING or "attention" in op_name(user))
    return any(sum(not _is_constant(source) for source in user.all_input_nodes) > 1 for user in meeting)


def _users_through(node: fx.Node, follows: Callable[[fx.Node, fx.Node], bool]) -> list[fx.Node]:
    """Every node that reads the result, directly or through nodes that are followed."""
    found: list[fx.Node] = []

    def note(user: fx.Node, _: fx.Node) -> bool:
        found.append(user)
        return False

    _reaches(node, follows, note)
    return found


def _shaped(user: fx.Node, source: fx.Node) -> bool:
    return op_name(user) in _SHAPES or (op_name(user) in _SCALING and _by_constant(user, source))


def _scaled(user: fx.Node, source: fx.Node) -> bool:
    """Whether a result goes on as itself, up to shape, scale, shift and a squashing function."""
    name = op_name(user)
    if name in _SHAPES or name in _SQUASHING or name in _POOLING:
        return True
    if name in _MASKING:
        return user.args[0] is source or source in user.args[1:]
    if name in ("div", "true_divide") and user.args[0] is source:  # by its own norm, or a temperature
        return True
    return name in _SCALING and all(other is source or _is_constant(other) or _is_mask(other) for other in user.all_input_nodes)


def _scaled_without_tanh(user: fx.Node, source: fx.Node) -> bool:
    return op_name(user) != "tanh" and _scaled(user, source)


def _mixed(user: fx.Node, source: fx.Node) -> bool:
    """As for a router: scores may be added to and multiplied by others before they are sorted."""
    return _scaled(user, source) or op_name(user) in ("add", "mul", "layer_norm", "rms_norm")


def _compared(user: fx.Node, source: fx.Node) -> bool:
    """Whether a choice is made here: a comparison, or the place of a maximum."""
    if op_name(user) in ("max", "min"):
        return any(op_name(part) == "getitem" and part.args[1] == 1 and part.users for part in user.users)
    return op_name(user) in _COMPARING


def _weighs(user: fx.Node) -> bool:
    return op_name(user) in _NORMALIZING and any(
        op_name(later) in _WEIGHING and not _by_constant(later, user) for later in _users_through(user, _shaped)
    )


def _by_constant(user: fx.Node, source: fx.Node) -> bool:
    """Whether the other operands depend on no input."""
    return all(other is source or _is_constant(other) for other in user.all_input_nodes)


def _is_constant(node: fx.Node) -> bool:
    return not _depends(node, lambda source: source.op == "placeholder")


def _is_mask(node: fx.Node) -> bool:
    """Whether a value is computed from masks and whole numbers alone, and from no weight."""

    def is_other(source: fx.Node) -> bool:
        if source.op == "placeholder":
            return "mask" not in str(source.target) and not _is_whole(source)
        return source.op == "get_attr" and isinstance(_read(source), nn.Parameter)

    return not _depends(node, is_other)


def _depends(node: fx.Node, on: Callable[[fx.Node], bool]) -> bool:
    """Whether a node, or one that it is computed from, is such."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if on(current):
            return True
        new = [source for source in current.all_input_nodes if source not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _read(node: fx.Node) -> Tensor:
    return tensor_of(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]


def _is_whole(placeholder: fx.Node) -> bool:
    value = placeholder.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point()
