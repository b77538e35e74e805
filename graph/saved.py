"""A saved program: its two files, and its graph as JSON and back, without running anything.

torch.export.load may fall back to pickle; this format holds names only. A name is turned into an operator by looking it up
in a short list of namespaces, so a file can make a program compute something else, but never make it run other code.
"""

import json
import keyword
import math
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx

from sparsepass.graph.support import ProgramFormatError, SparsepassError, changed_files, check_inside

FORMAT_VERSION = 2
"""Version of the folder format. A reader refuses a newer one."""

PROGRAM_FILE, TENSORS_FILE = "program.json", "program.safetensors"

JSON = Any

_NAMESPACES = ("aten", "prims", "sparsepass", "transformers")
_FUNCTIONS: dict[str, Any] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem", "eq", "ne", "lt", "le", "gt", "ge",
            "and_", "or_", "not_",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")
    },
}  # fmt: skip
_INPUT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# torch.fx writes these names into the Python text it compiles, so nothing that could end a string may be in them.
_TENSOR_NAME = re.compile(r"[^\x00-\x1f\x7f\"'\\{}]+")
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_TORCH_TYPES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def write_state(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the two files of a program.

    Raises:
        SparsepassError: If a tensor has no values yet.
    """
    if empty := [name for name, t in tensors.items() if t.is_meta]:
        raise SparsepassError(f"the program has no weights yet ({empty[0]} is on the meta device); fill() it before saving")
    (folder / PROGRAM_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: dict[int, str] = {}
    for name, t in plain.items():  # safetensors refuses tensors that share memory
        if t.numel() and seen.setdefault(t.untyped_storage().data_ptr(), name) != name:
            plain[name] = t.clone()
    safetensors.torch.save_file(plain, folder / TENSORS_FILE, metadata={"format": "pt"})


def read_state(place: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read the two files of a program.

    Raises:
        ProgramFormatError: If they are not there, truncated, or of a newer format.
    """
    check_inside(place)
    if not (place / PROGRAM_FILE).is_file():
        raise ProgramFormatError(f"{place} holds no {PROGRAM_FILE}, so it is not a saved program; check the path")
    try:
        document = json.loads((place / PROGRAM_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProgramFormatError(f"{place / PROGRAM_FILE} is damaged ({error}); save the program again") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ProgramFormatError(
            f"{place} has program format {version}, and this sparsepass reads up to {FORMAT_VERSION}; upgrade sparsepass"
        )
    try:
        tensors = safetensors.torch.load_file(place / TENSORS_FILE)
    except (safetensors.SafetensorError, OSError) as error:
        raise ProgramFormatError(
            f"{place / TENSORS_FILE} is missing, truncated or damaged ({error}); copy the folder again"
        ) from error
    return document, tensors


def check_as_written(place: Path) -> None:
    """Refuse a program whose files are not those that were written, as far as the checksums in its folder tell.

    Raises:
        ProgramFormatError: If one is another.
    """
    if changes := changed_files(place, (PROGRAM_FILE, TENSORS_FILE)):
        raise ProgramFormatError(
            f"{place}: {'; '.join(map(str, changes))}; get the folder anew or, if you know why it changed, run "
            f"`sparsepass verify --renew {place}`"
        )


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
        ProgramFormatError: If it names an operator that is unknown or not allowed, or has a name that is none.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    stacks = [{f"L__self__{path}": (path, kind) for path, kind in stack} for stack in document["stacks"]]
    for entry in document["nodes"]:
        args = tuple(_from_json(arg, made) for arg in entry.get("args", ()))
        kwargs = {_plain_name(key): _from_json(value, made) for key, value in entry.get("kwargs", {}).items()}
        target = _target_from_json(entry["op"], entry["target"])
        if entry["op"] == "output":
            node = graph.output(args[0])
        else:
            node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        if "stack" in entry:
            node.meta["nn_module_stack"] = dict(stacks[entry["stack"]])
        made[entry["name"]] = node
    return graph


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
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if not isinstance(target, str) and target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise ProgramFormatError(
        f"node {node.name} calls {target}, which a saved program may not call; it can be used in memory, but not saved"
    )


def _target_from_json(op: str, target: str) -> Any:
    if op == "placeholder":
        return _plain_name(target)
    if op == "get_attr":
        return check_tensor_name(target)
    if op == "output":
        return "output"
    if op != "call_function":
        raise ProgramFormatError(f"a saved program may not hold a node of kind {op!r}")
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.rpartition(".")
    if namespace not in _NAMESPACES or not name.isidentifier() or not overload.isidentifier():
        raise ProgramFormatError(f"a saved program may not call {target!r}")
    if namespace == "transformers":
        import transformers.integrations.moe  # noqa: F401  (registers its grouped matmul)
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as error:
        raise ProgramFormatError(
            f"the program calls {target}, which torch {torch.__version__} does not have; load it with the versions it was "
            "made with (see program.json)"
        ) from error
    if not isinstance(found, torch._ops.OpOverload) or any(a.name == "filename" for a in found._schema.arguments):
        raise ProgramFormatError(f"a saved program may not call {target!r}")  # aten::save and aten::from_file write files
    return found


def check_tensor_name(name: str) -> str:
    """Return the name of a tensor that was read from a file, if it can be one.

    Raises:
        ProgramFormatError: If it holds characters that no name has.
    """
    if not isinstance(name, str) or not all(_TENSOR_NAME.fullmatch(part) for part in name.split(".")):
        raise ProgramFormatError(f"a saved program may not have a tensor named {name!r}")
    return name


def _plain_name(name: str) -> str:
    if not isinstance(name, str) or not _INPUT_NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ProgramFormatError(f"a saved program may not have an input or keyword named {name!r}")
    return name


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
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "tuple":
        return tuple(_from_json(item, made) for item in content)
    if kind == "slice":
        return slice(*(_from_json(item, made) for item in content))
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind in _TORCH_TYPES:
        found = getattr(torch, str(content), None)
        if isinstance(found, _TORCH_TYPES[kind]):
            return found
    raise ProgramFormatError(f"a saved program has an argument that cannot be read: {value!r}")
