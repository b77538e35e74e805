"""The structure of a model's output, as data: what stands around its tensors, and how to build it again.

torch.export describes outputs by pytree specs that hold Python classes. A saved program must run nothing on load, so the
structure is kept as plain JSON, and only output classes of transformers and plain containers are ever built from it.
"""

import dataclasses
import importlib
import re
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sparsepass._terminal import one_line
from sparsepass.graph.support import CaptureError, ProgramFormatError

_DEEPEST = 16
# Importing a module runs it, so only those are imported that hold models.
_HOME_OF_OUTPUTS = re.compile(r"transformers\.(modeling_\w+|models\.\w+\.(modeling|modular)_\w+|generation\.utils)")

JSON = Any  # nested dicts, lists, strings, numbers, booleans, None


def describe(spec: pytree.TreeSpec) -> JSON:
    """Turn a pytree spec of an output into JSON.

    Raises:
        CaptureError: If the output holds a container that cannot be rebuilt without running unknown code.
    """
    if spec.is_leaf():
        return "tensor"
    children = [describe(child) for child in spec.children()]
    kind, context = spec.type, spec.context
    if kind is type(None):
        return None
    if kind in (tuple, list):
        return {"kind": kind.__name__, "items": children}
    if kind is dict:
        return {"kind": "dict", "keys": list(context), "items": children}
    if _is_model_output(kind):
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", "keys": list(context), "items": children}
    raise CaptureError(
        f"the model returns a {kind.__module__}.{kind.__qualname__}, which cannot be part of a program; wrap the model "
        "so that it returns tensors, tuples, lists, dicts or a transformers ModelOutput (for a cache: use_cache=False)"
    )


def check(structure: JSON, depth: int = 0) -> None:
    """Check a structure that was read from a file: only tensors, plain containers and outputs of transformers.

    Args:
        structure: What is checked.
        depth: In how many others it stands.

    Raises:
        ProgramFormatError: If it names anything else.
    """
    if structure is None or structure == "tensor":
        return
    if not isinstance(structure, dict) or not isinstance(structure.get("items"), list) or depth > _DEEPEST:
        raise ProgramFormatError(f"a saved program has an output that cannot be read: {structure!r:.200}")
    kind: JSON = structure.get("kind")
    keys: JSON = structure.get("keys")
    if kind in ("tuple", "list"):
        is_sound = structure.keys() == {"kind", "items"}
    else:
        allowed = keys if kind == "dict" else [field.name for field in dataclasses.fields(_output_class(str(kind)))]
        is_list = isinstance(keys, list) and all(type(key) in (str, int) for key in keys)
        is_sound = is_list and len(set(keys)) == len(structure["items"]) == len(keys) and set(keys) <= set(allowed)
    if not is_sound:
        raise ProgramFormatError(f"a saved program has an output whose keys do not fit: {structure!r:.200}")
    for item in structure["items"]:
        check(item, depth + 1)


def without(structure: JSON, dropped: list[bool]) -> JSON:
    """Turn the tensors that are ``dropped`` into None. Consumes ``dropped`` from the front."""
    if structure is None:
        return None
    if structure == "tensor":
        return None if dropped.pop(0) else structure
    return {**structure, "items": [without(item, dropped) for item in structure["items"]]}


def names(structure: JSON, prefix: str = "") -> list[str]:
    """Flat names of the tensors of an output, such as ``logits`` or ``hidden_states.0``."""
    if structure is None:
        return []
    if structure == "tensor":
        return [prefix or "output"]
    keys = structure.get("keys", range(len(structure["items"])))
    return [
        name
        for key, item in zip(keys, structure["items"], strict=True)
        for name in names(item, f"{prefix}.{key}" if prefix else str(key))
    ]


def build(structure: JSON, leaves: list[torch.Tensor]) -> Any:
    """Put tensors back into the structure. Consumes ``leaves`` from the front."""
    if structure is None:
        return None
    if structure == "tensor":
        return leaves.pop(0)
    items = [build(item, leaves) for item in structure["items"]]
    kind = structure["kind"]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    if kind == "dict":
        return dict(zip(structure["keys"], items, strict=True))
    return _output_class(kind)(**dict(zip(structure["keys"], items, strict=True)))


def _is_model_output(kind: type) -> bool:
    from transformers.utils.generic import ModelOutput

    return issubclass(kind, ModelOutput) and kind.__module__.startswith("transformers.")


def _output_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    shown = one_line(path[:200])
    if not _HOME_OF_OUTPUTS.fullmatch(module):
        raise ProgramFormatError(f"a program may only build output classes of transformers, not {shown}")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ProgramFormatError(
            f"the program returns a {shown}, which the installed transformers does not have; install the version it was "
            "made with (see program.json)"
        ) from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and _is_model_output(kind)):
        raise ProgramFormatError(f"a program may only build output classes of transformers, and {shown} is none")
    return kind
