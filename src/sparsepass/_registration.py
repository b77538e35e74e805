"""Packed folders become known to transformers when its table of quantizers is loaded, and no earlier.

`import sparsepass` loads neither torch nor transformers, so if they are not there yet, a hook waits for the one module that
holds the table. It goes away when it has done its work.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        if name != _TABLE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The module's own loader; when it is done, packed folders are registered."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        # Who asks the module for its loader (for its source, say) has to meet its own one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    from sparsepass.graph.packed_folder import register_quantizer

    register_quantizer()


def register_or_wait() -> None:
    """Register packed folders with transformers now if its table is there, else as soon as it is."""
    if _TABLE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


register_or_wait()
