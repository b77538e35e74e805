"""What the packages offer: names, parameters with their defaults, and what the documentation imports."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.compatibility.command_line import ROOT, commands

PACKAGES = ("sparsepass", "sparsepass.graph", "sparsepass.passes", "sparsepass.retrain", "sparsepass.export")
_PAGES = ("README.md", "docs/*.md", "examples/**/*.py")
_IMPORT = re.compile(r"from (sparsepass[\w.]*) import ([\w, ]+)")


def surface() -> dict[str, Any]:
    """All of it, as JSON."""
    packages = {name: dict(_names(name)) for name in PACKAGES}
    return {"packages": packages, "documented": sorted(set(_documented())), "commands": commands()}


def parameters(value: Any) -> dict[str, str | None] | None:
    """Parameter -> its default as text, None for none; None for what cannot be called so."""
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return {p.name: None if p.default is p.empty else _text(p.default) for p in found}


def members(value: Any) -> dict[str, Any]:
    """The public members of a class, with the parameters of its methods."""
    found = {name: inspect.getattr_static(value, name) for name in dir(value) if not name.startswith("_")}
    own = {name for kind in value.__mro__ if kind.__module__.startswith("sparsepass") for name in vars(kind)}
    fields = {name: None for name in getattr(value, "__dataclass_fields__", {}) if not name.startswith("_")}
    return fields | {name: parameters(getattr(value, name)) for name in found if name in own}


def _names(package: str) -> Iterator[tuple[str, Any]]:
    module = importlib.import_module(package)
    for name in sorted(getattr(module, "__all__", ())):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield name, {"kind": "class", "parameters": parameters(value), "members": members(value)}
        elif isinstance(value, Mapping):
            yield name, {"kind": "table", "keys": sorted(value)}
        else:
            yield name, {"kind": "function" if callable(value) else "value", "parameters": parameters(value)}


def _documented() -> Iterator[str]:
    for pattern in _PAGES:
        for page in ROOT.glob(pattern):
            for module, names in _IMPORT.findall(page.read_text(encoding="utf-8")):
                yield from (f"{module}:{name.strip()}" for name in names.split(",") if name.strip())


def _text(default: Any) -> str:
    """A default as text that says the same wherever its class lies."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(default))
