"""The graph of a saved program as JSON and back, without running anything.

torch.export.load may fall back to pickle; this format holds names only. A name is turned into an operator by looking it up
in a list, so a file can make a program compute something else, but never make it run other code.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sparsepass.graph.saved.names import check_input_name, check_keyword, check_node_name, check_tensor_name
from sparsepass.graph.saved.operators import DTYPES, FUNCTIONS, is_number, operator_named, text_of_operator
from sparsepass.graph.support import ProgramFormatError

JSON = Any

_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
_TORCH_TYPES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_NAMES_OF_TYPES: dict[str, Mapping[str, Any]] = {
    "dtype": DTYPES,
    "layout": {"strided": torch.strided},
    "memory_format": {
        name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
}
_DEVICE = re.compile(r"(cpu|meta|cuda|mps|xpu|hpu|npu|xla)(:[0-9]{1,3})?")


def graph_to_json(graph: fx.Graph) -> JSON:
    """Describe a flat graph as JSON.

    Raises:
        ProgramFormatError: If it calls something that is outside the namespaces a saved program may use.
    """
    nodes = []
    stacks: dict[tuple[tuple[str, str], ...], int] = {}
    for node in graph.nodes:
        entry: dict[str, JSON] = {"name": node.name, "op": node.op, "target": _target_to_json(node)}
        if node.args:
            entry["args"] = [_to_json(arg, node) for arg in node.args]
        if node.kwargs:
            entry["kwargs"] = {key: _to_json(value, node) for key, value in node.kwargs.items()}
        stack = module_stack(node)
        if stack:
            entry["stack"] = stacks.setdefault(stack, len(stacks))
        nodes.append(entry)
    return {"nodes": nodes, "stacks": [[list(level) for level in stack] for stack in stacks]}


def graph_from_json(document: JSON) -> fx.Graph:
    """Build the graph that `graph_to_json` described.

    Raises:
        ProgramFormatError: If it names an operator that is unknown or not allowed, has a name that is none, or reads a node
            that does not stand before.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    stacks = [{f"L__self__{path}": (path, kind) for path, kind in stack} for stack in document["stacks"]]
    for entry in document["nodes"]:
        name = check_node_name(entry["name"])
        try:
            args = tuple(_from_json(arg, made) for arg in entry.get("args", ()))
            kwargs = {check_keyword(key): _from_json(value, made) for key, value in entry.get("kwargs", {}).items()}
            target = _target_from_json(entry["op"], entry["target"])
            _check_ends(entry["op"], args, kwargs)
        except ProgramFormatError as error:
            raise ProgramFormatError(f"node {name}: {error}") from error
        if entry["op"] == "output":
            node = graph.output(args[0])
            name = node.name
        else:
            node = graph.create_node(entry["op"], target, args, kwargs, name=name)
        if node.name != name:
            raise ProgramFormatError(f"a saved program may not have a node named {name!r}, or two of that name")
        if entry.get("stack") is not None:
            node.meta["nn_module_stack"] = dict(stacks[entry["stack"]])
        made[name] = node
    if not graph.nodes or next(iter(reversed(graph.nodes))).op != "output":
        raise ProgramFormatError("the graph of a saved program ends with its output")
    return graph


def _check_ends(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if op == "output":
        is_flat = len(args) == 1 and isinstance(args[0], list | tuple) and all(isinstance(item, fx.Node) for item in args[0])
        if not is_flat or kwargs:
            raise ProgramFormatError("the output of a saved program is one list of nodes")
    elif op != "call_function" and (args or kwargs):
        raise ProgramFormatError(f"a node of kind {op} has no arguments")


def module_stack(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """The modules a node was traced in, outermost first, as (path, class name) pairs."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}") for path, kind in stack.values()
    )


def _target_to_json(node: fx.Node) -> str:
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return str(target)
    if (text := text_of_operator(target)) is not None:
        return text
    if not isinstance(target, str) and target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise ProgramFormatError(
        f"node {node.name} calls {target}, which a saved program may not call; it can be used in memory, but not saved"
    )


def _target_from_json(op: str, target: str) -> Any:
    if op == "placeholder":
        return check_input_name(target)
    if op == "get_attr":
        return check_tensor_name(target)
    if op == "output":
        return "output"
    if op != "call_function" or not isinstance(target, str):
        raise ProgramFormatError(f"a saved program may not hold a node of kind {op!r:.100} and target {target!r:.100}")
    return FUNCTIONS[target] if target in FUNCTIONS else operator_named(target)


def _to_json(value: Any, node: fx.Node) -> JSON:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | fx.immutable_collections.immutable_list):
        return [_to_json(item, node) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item, node) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_to_json(item, node) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _TORCH_TYPES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise ProgramFormatError(f"node {node.name} has an argument of type {type(value).__name__}, which cannot be saved")


def _from_json(value: JSON, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, made) for item in value]
    if not isinstance(value, dict):
        if value is None or isinstance(value, str) or is_number(value):
            return value
        raise ProgramFormatError(f"{str(value)[:50]} is too large a number")
    if len(value) == 1:
        ((kind, content),) = value.items()
        if (found := _special(kind, content, made)) is not None:
            return found
    raise ProgramFormatError(f"an argument that cannot be read: {value!r:.200}")


def _special(kind: str, content: JSON, made: Mapping[str, fx.Node]) -> Any:
    """What an object among the arguments stands for; None if for nothing."""
    if kind in ("tuple", "slice") and isinstance(content, list):
        items = [_from_json(item, made) for item in content]
        if kind == "tuple":
            return tuple(items)
        return slice(*items) if len(items) == 3 else None
    if not isinstance(content, str):
        return None
    if kind == "node":
        if content not in made:
            raise ProgramFormatError(f"it reads {content!r:.200}, and no node before it has that name")
        return made[content]
    if kind == "float":
        return float(content) if content in ("inf", "-inf", "nan") else None
    if kind == "device":
        return torch.device(content) if _DEVICE.fullmatch(content) else None
    return _NAMES_OF_TYPES.get(kind, {}).get(content)
