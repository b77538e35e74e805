"""Modules that documentation named by another path before: the old path still imports, and warns."""

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOMES = {
    "sparsepass.export.retraining": "sparsepass.export.stages",
    "sparsepass.export.sensitivity": "sparsepass.export.stages",
    "sparsepass.export.tensorrt_onnxruntime": "sparsepass.export.targets.tensorrt",
    "sparsepass.export.tensorrt_options": "sparsepass.export.targets.tensorrt",
    "sparsepass.export.torch": "sparsepass.export.targets.torch",
    "sparsepass.passes.mask_pack": "sparsepass.passes.masks",
}
"""Old path -> where its public names are now."""


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        return ModuleSpec(name, self) if name in HOMES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """A module of the usual kind."""

    def exec_module(self, module: ModuleType) -> None:
        home = HOMES[module.__name__]
        warnings.warn(f"{module.__name__} has moved; its public names are in {home} now", DeprecationWarning, stacklevel=2)
        module.__dict__["__getattr__"] = partial(getattr, import_module(home))


sys.meta_path.append(_MovedModules())
