"""Computing on a device that need not hold the whole model: weights stay where they are, and move when they are needed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final, final

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from sparsepass.graph.program import Program
from sparsepass.graph.support import free_bytes

_SHARE: Final = 0.7
"""Of a device's free memory, what weights may take; activations and logits need the rest."""


def home_of(model: nn.Module) -> torch.device:
    """The device that a model's weights are on; the processor's memory if it has none."""
    if isinstance(model, Program):
        return model.device
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether a device has room for all weights of a model at once; where its memory is not known, it has."""
    free = free_bytes(device)
    tensors = {tensor.data_ptr(): tensor.nbytes for group in (model.parameters(), model.buffers()) for tensor in group}
    return free is None or sum(tensors.values()) <= _SHARE * free


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on a device, or whatever else it is; and for the name of a device that name."""
    if isinstance(value, torch.device):
        return device
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def placed(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have a model compute on a device as long as the block runs. Afterwards its weights are where they were.

    1. Where the device has room for all weights, they move there together.
    2. Elsewhere they stay, and each moves there for as long as it is read: slower, but it takes the room of one layer.

    Args:
        model: A model or program.
        device: Where to compute; None for where the model is.
    """
    home = home_of(model)
    if device is None or device == home:
        yield
    elif isinstance(model, Program):
        with _copied(model, device) if fits(model, device) else nullcontext(), streamed(model, device):
            yield
    else:
        with _copied(model, device) if fits(model, device) else _offloaded(model, device):
            yield


@contextmanager
def streamed(program: Program, device: torch.device) -> Iterator[None]:
    """Have a program compute on a device, and move each weight there only as long as it is read."""
    graph_module = program.graph_module
    graph_module.forward = _Streamed(graph_module, device).run  # of this object alone; its class has the graph's code
    try:
        yield
    finally:
        del graph_module.forward


@contextmanager
def lent(program: Program, names: Collection[str], device: torch.device | None) -> Iterator[None]:
    """Have some weights of a program on a device as long as the block runs; what was made there comes back with them.

    Values that changed are written into the tensors that were there before, for whoever else holds those.

    Args:
        program: Its graph is not run meanwhile.
        names: Parameters and buffers.
        device: Where to; None for where they are.
    """
    home = program.device
    if device is None or device == home:
        yield
        return
    before = {name: program.tensor(name) for name in {program.aliases.get(name, name) for name in names}}
    for name, tensor in before.items():
        program.set_tensor(name, moved(tensor.detach(), device))
    try:
        yield
    finally:
        for name, now in program.tensors().items():
            there = before.get(name)
            if there is not None and now is not there and (now.shape, now.dtype) == (there.shape, there.dtype):
                there.detach().copy_(now)
                program.set_tensor(name, there)
            elif now.device != home:
                program.set_tensor(name, moved(now.detach(), home))


@contextmanager
def _copied(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put copies on a device in the place of all tensors, those that are tied as one. The tensors themselves come back."""
    groups: list[dict[str, Any]] = [group for module in model.modules() for group in (module._parameters, module._buffers)]
    before = [(group, dict(group)) for group in groups]
    copies: dict[int, Tensor] = {}
    try:
        for group, tensors in before:
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _like(tensor, device)
                    group[name] = copies[id(tensor)]
        yield
    finally:
        for group, tensors in before:
            group.update(tensors)


@contextmanager
def _offloaded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have each module fetch its own weights for as long as it runs; tensors that it is given move along.

    accelerate's `cpu_offload` does the same, but leaves other parameter objects behind than there were.
    """
    held: dict[nn.Module, Any] = {}

    def fetch(module: nn.Module, args: Any, kwargs: Any) -> Any:
        groups: list[dict[str, Any]] = [module._parameters, module._buffers]
        before = [(group, dict(group)) for group in groups]
        held[module] = before
        for group, tensors in before:
            group.update({name: None if tensor is None else _like(tensor, device) for name, tensor in tensors.items()})
        return tree_map(lambda value: moved(value, device), (args, kwargs))

    def give_back(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        del args, kwargs, output
        for group, tensors in held.pop(module, ()):
            group.update(tensors)

    hooks: list[Any] = []
    for module in model.modules():
        if module._parameters or module._buffers:
            hooks.append(module.register_forward_pre_hook(fetch, with_kwargs=True))
            hooks.append(module.register_forward_hook(give_back, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a parameter stays one."""
    there = moved(tensor.detach(), device)
    return nn.Parameter(there, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


@final
class _Streamed(fx.Interpreter):
    """Runs a graph on a device that does not hold its weights."""

    def __init__(self, graph_module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph_module)
        self._device = device
        self.extra_traceback = False

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An input."""
        return moved(super().placeholder(target, args, kwargs), self._device)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight; it is dropped behind its last reader."""
        return moved(super().get_attr(target, args, kwargs), self._device)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation; where it makes a tensor on a device (``arange(n, device=cpu)``), it is this one."""
        args, kwargs = tree_map(lambda value: moved(value, self._device), (args, kwargs))
        return super().call_function(target, args, kwargs)
