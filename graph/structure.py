"""The structure of a model's output, as data: what stands around its tensors, and how to build it again.

torch.export describes outputs by pytree specs that hold Python classes. A saved program must run nothing on load, so the
structure is kept as plain JSON, and only output classes of transformers and plain containers are ever built from it.
"""

import importlib
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sparsepass.graph.support import CaptureError, ProgramFormatError

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


def check(structure: JSON) -> None:
    """Check a structure that was read from a file: only tensors, plain containers and outputs of transformers.

    Raises:
        ProgramFormatError: If it names anything else.
    """
    if structure is None or structure == "tensor":
        return
    if not isinstance(structure, dict) or not isinstance(structure.get("items"), list):
        raise ProgramFormatError(f"a saved program has an output that cannot be read: {structure!r}")
    kind = structure.get("kind")
    if kind not in ("tuple", "list"):
        keys = structure.get("keys")
        if not isinstance(keys, list) or len(keys) != len(structure["items"]):
            raise ProgramFormatError(f"a saved program has an output whose keys do not fit: {structure!r}")
        if kind != "dict":
            _output_class(str(kind))
    for item in structure["items"]:
        check(item)


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
    if not module.startswith("transformers."):
        raise ProgramFormatError(f"a program may only build output classes of transformers, not {path}")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ProgramFormatError(
            f"the program returns a {path}, which the installed transformers does not have; install the version it was "
            "made with (see program.json)"
        ) from error
    if not (isinstance(kind, type) and _is_model_output(kind)):
        raise ProgramFormatError(f"a program may only build output classes of transformers, and {path} is none")
    return kind
