"""A GPU that is played by the processor: its tensors say ``second``, and mixing them with others is refused as on a GPU.

torch is told of the device for the whole process, so whoever imports this does so in a process of its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("second")
DEVICE = torch.device("second", 0)
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_ACROSS = (_aten.copy_.default, _aten._to_copy.default)


class OnSecond(Tensor):
    """A tensor that claims to be on the second device; its values are in a tensor of the processor."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnSecond":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE, requires_grad=inner.requires_grad
        )
        made.held = inner
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"OnSecond({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Plays the device as long as the block runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Any:
        self._tensor = torch.tensor
        torch.tensor = _tensor  # it asks no mode
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        torch.tensor = self._tensor
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _tensor(*args: Any, device: Any = None, _made: Any = torch.tensor, **kwargs: Any) -> Tensor:
    made: Tensor = _made(*args, **kwargs)
    return made if device is None else made.to(device)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in given if isinstance(value, OnSecond)]
    here = [value for value in given if not isinstance(value, OnSecond) and value.dim()]
    if there and here and func not in _ACROSS and not _indexes(func, args):
        raise RuntimeError(f"{func}: expected all tensors to be on one device, found {[t.device for t in given]}")
    device = kwargs.get("device")
    results_there = torch.device(device).type == DEVICE.type if device is not None else bool(there)
    if func is _aten.copy_.default:
        results_there = isinstance(args[0], OnSecond)
    unwrapped = tree_map(lambda value: value.held if isinstance(value, OnSecond) else value, (args, kwargs))
    plain_args, plain_kwargs = tree_map_only(torch.device, lambda _: _CPU, unwrapped)
    if func is _aten._to_copy.default and device is not None:
        plain_kwargs = {name: value for name, value in plain_kwargs.items() if name != "pin_memory"}
    result = func(*plain_args, **plain_kwargs)
    if func._schema.is_mutable and func._schema.name.partition("::")[2].partition(".")[0].endswith("_"):
        return args[0]
    if func._schema.is_mutable and "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda value: OnSecond(value) if isinstance(value, Tensor) else value, result) if results_there else result


def _indexes(func: Any, args: Any) -> bool:
    """Indexing takes indices of the processor."""
    return func in (_aten.index.Tensor, _aten.index_put_.default) and isinstance(args[0], OnSecond)
