"""Leaving a model as it was: whatever tracing or running it changes is put back."""

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.MethodType, types.ModuleType)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model back into its state after a block that traces or runs it.

    1. Every attribute of every module is the same object as before, and no attribute is new: parameters, buffers, submodules,
       hooks, plain tensors.
    2. Lists, dicts, sets and objects that attributes hold (a configuration, a cache) have the same content as before.
    3. Tensors other than parameters have the same values as before.
    4. Rotary frequencies that transformers computes in the first run (``long_inv_freq``) stay if a real run made them: the
       next run would make them again.

    Parameters are not copied: running a model does not write to them.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with untouched(model):
        ...     model.left = torch.zeros(1)
        >>> hasattr(model, "left")
        False
    """
    kept = _Remembered()
    for module in model.modules():
        kept.keep(module)
    try:
        yield
    finally:
        kept.put_back()


class _Remembered:
    """Contents of containers and objects, and values of tensors, as they were."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []

    def keep(self, root: Any) -> None:
        stack = [root]
        while stack:
            value = stack.pop()
            if isinstance(value, _PLAIN) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, nn.Parameter):
                continue
            if isinstance(value, Tensor):
                self._keep_tensor(value)
                continue
            stack += self._keep_content(value)

    def _keep_tensor(self, value: Tensor) -> None:
        if type(value) is Tensor and not value.is_meta and value.layout == torch.strided:
            # Tensors made in inference mode have no version.
            self._tensors.append((value, -1 if value.is_inference() else value._version, value.detach().clone()))

    def _keep_content(self, value: Any) -> list[Any]:
        """Remember what a container or object holds, and return it."""
        found: list[Any] = []
        if isinstance(value, dict):
            self._contents.append((value, dict(value)))
            found += value.values()
        elif isinstance(value, list | set):
            self._contents.append((value, list(value)))
            found += value
        elif isinstance(value, tuple | frozenset):
            found += value
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict) and type(value).__module__.split(".")[0] not in sys.stdlib_module_names:
            found.append(own)
        return found

    def put_back(self) -> None:
        for container, content in self._contents:
            if isinstance(container, dict):
                if not _same(container, content):
                    made = {key: value for key, value in container.items() if key not in content and _lasts(key, value)}
                    container.clear()
                    container.update(content | made)
            elif isinstance(container, list):
                container[:] = content
            elif container != set(content):
                container.clear()
                container.update(content)
        with torch.no_grad():
            for tensor, version, value in self._tensors:
                if not tensor.is_inference():
                    if tensor._version != version:
                        tensor.copy_(value)
                elif not torch.equal(tensor, value):
                    with torch.inference_mode():
                        tensor.copy_(value)


def _lasts(name: object, value: object) -> bool:
    return str(name).endswith("inv_freq") and type(value) is Tensor and not value.is_meta


def _same(found: dict[Any, Any], kept: dict[Any, Any]) -> bool:
    return len(found) == len(kept) and all(a is b and found[a] is kept[b] for a, b in zip(found, kept, strict=True))
