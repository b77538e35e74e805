"""A program from a file is run once on the meta device before it is run for good: what fails there, or grows there, is refused.

On the meta device tensors have shapes and no values, so a trial takes milliseconds and no memory. It is made with the example
inputs while a program is loaded, and again for every new shape of its inputs before the graph itself runs: a file can make
sizes depend on sizes in any way.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx

from sparsepass.graph.saved.costs import needed_bytes, num_pieces, operations, tensors_in
from sparsepass.graph.saved.operators import DTYPES, arguments_fit, is_number, names_fit
from sparsepass.graph.support import ProgramFormatError, SparsepassError, first_line

_SMALL_BYTES = 256 * 2**20
"""A value of this size is let through in any program."""
_TIMES_FILE, _TIMES_INPUTS, _ALL_VALUES = 16, 64, 4
_SMALL_WORK = 2 * 10**11
"""Operations that any program may take: some seconds."""
_WORK_OF_WEIGHT, _WORK_OF_INPUT = 2 * 10**5, 10**4
_MOST_AXES, _MOST_PIECES, _HIGHEST_POWER = 64, 2**16, 64
_META = torch.device("meta")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes.

    Attributes:
        value_bytes: Name of each node -> size of what it gives, or needs for it.
        peak_bytes: Of all values that are kept at one time.
        work: Operations.
    """

    value_bytes: Mapping[str, int]
    peak_bytes: int
    work: int


@dataclass(kw_only=True)
class Guard:
    """What a program from a file may take: made while it is loaded, asked before it runs on inputs of other shapes. Final.

    Attributes:
        examples: Shapes of its example inputs.
        weight_bytes: Size of its tensors.
        num_weights: Entries of its tensors.
        cost: Of a run on the example inputs.
        seen: Shapes that have been found to be right.
    """

    examples: Shapes
    weight_bytes: int
    num_weights: int
    cost: Cost
    seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = field(default_factory=set)

    @classmethod
    def of(cls, graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Self:
        """Run a graph once on the meta device with the example inputs.

        Args:
            graph: Not changed.
            tensors: What it reads.
            inputs: Name of each input -> an example.

        Raises:
            ProgramFormatError: If it fails there, or takes far more than its tensors and inputs explain. It names the node.
        """
        guard = cls(
            examples={name: tuple(t.shape) for name, t in inputs.items()},
            weight_bytes=sum(t.nbytes for t in tensors.values()),
            num_weights=sum(t.numel() for t in tensors.values()),
            cost=Cost(value_bytes={}, peak_bytes=0, work=0),
        )
        guard.cost = _trial(graph, tensors, inputs, guard)
        guard.seen.add(_key(inputs))
        return guard

    def check(self, graph: fx.Graph, tensors: Callable[[], Mapping[str, Tensor]], inputs: Mapping[str, Tensor]) -> None:
        """Refuse inputs on which the graph fails, or takes more than their larger size explains. Once for each shape.

        Raises:
            ProgramFormatError: It names the node.
        """
        if _key(inputs) not in self.seen and _is_plain(inputs):
            _trial(graph, tensors(), inputs, self)
            self.seen.add(_key(inputs))

    @contextlib.contextmanager
    def checked(
        self, graph: fx.Graph, tensors: Callable[[], Mapping[str, Tensor]], inputs: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Check inputs, and say what fails while the block runs the graph on them.

        Raises:
            SparsepassError: If the inputs are refused, or an operator fails: an index that is out of range, for one.
        """
        self.check(graph, tensors, inputs)
        try:
            yield
        except (torch.OutOfMemoryError, SparsepassError):
            raise
        except (RuntimeError, LookupError, ArithmeticError, ValueError, TypeError) as error:
            raise SparsepassError(f"the program fails when it is run: {first_line(error)[:300]}") from error

    def limits(self, inputs: Mapping[str, Tensor]) -> "_Limits":
        """What may be taken for inputs of these shapes.

        What grows faster than the square of the inputs is refused once it is large: attention grows that fast.
        """
        sizes = [(t.numel(), math.prod(self.examples.get(name, (1,)))) for name, t in inputs.items()]
        grown = max([1.0, *(now / max(1, before) for now, before in sizes)])
        input_bytes, num_inputs = sum(t.nbytes for t in inputs.values()), sum(now for now, _ in sizes)
        value = _SMALL_BYTES + _TIMES_FILE * self.weight_bytes + _TIMES_INPUTS * input_bytes
        work = _SMALL_WORK + _WORK_OF_WEIGHT * self.num_weights + _WORK_OF_INPUT * num_inputs
        return _Limits(
            value_bytes=int(max(value, 4 * self.cost.peak_bytes * grown)),
            peak_bytes=int(max(_ALL_VALUES * value, 4 * self.cost.peak_bytes * grown**2)),
            work=int(max(work, 4 * self.cost.work * grown**2)),
            of_node={name: int(2 * size * grown**2) for name, size in self.cost.value_bytes.items()},
        )


@dataclass(frozen=True, kw_only=True)
class _Limits:
    value_bytes: int
    peak_bytes: int
    work: int
    of_node: Mapping[str, int]


def _key(inputs: Mapping[str, Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(t.shape)) for name, t in inputs.items())


def _is_plain(inputs: Mapping[str, Tensor]) -> bool:
    """Whether this is a run, and nobody is tracing it."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in inputs.values())
        and not torch.compiler.is_compiling()
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _trial(graph: fx.Graph, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor], guard: Guard) -> Cost:
    limits = guard.limits(inputs)
    run = _Trial({name: _on_meta(t) for name, t in tensors.items()}, {name: _on_meta(t) for name, t in inputs.items()})
    sizes: dict[str, int] = {}
    work = 0
    with torch.no_grad():
        for node in graph.nodes:
            try:
                size, took = run.step(node)
            except Exception as error:  # operators raise anything
                raise ProgramFormatError(f"node {node.name} ({node.target}) {_told(error)}") from error
            sizes[node.name], work = size, work + took
            if size > max(limits.value_bytes, limits.of_node.get(node.name, 0)):
                raise ProgramFormatError(
                    f"node {node.name} ({node.target}) takes {size:,} bytes, far more than the program's tensors and inputs "
                    f"explain ({limits.value_bytes:,})"
                )
            if work > limits.work:
                raise ProgramFormatError(
                    f"node {node.name} ({node.target}): so far {work:,} operations, far more than the program's tensors and "
                    f"inputs explain ({limits.work:,})"
                )
    peak = run.peak_bytes()
    if peak > limits.peak_bytes:
        raise ProgramFormatError(
            f"the graph takes {peak:,} bytes at one time, far more than its tensors and inputs explain ({limits.peak_bytes:,})"
        )
    return Cost(value_bytes=sizes, peak_bytes=peak, work=work)


def _told(error: Exception) -> str:
    if isinstance(error, ProgramFormatError):
        return str(error)
    return f"fails on its inputs: {type(error).__name__}: {first_line(error)[:300]}"


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_META)


class _Trial:
    """One run on the meta device, step by step."""

    def __init__(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
        self._tensors, self._inputs = tensors, inputs
        self._values: dict[fx.Node, Any] = {}  # all are kept, so that no storage gets the address of another
        self._foreign = {_storage(t) for t in [*tensors.values(), *inputs.values()]}
        self._lives: dict[int, tuple[int, int, int]] = {}  # storage -> its size, first and last step
        self._order: dict[fx.Node, int] = {}

    def step(self, node: fx.Node) -> tuple[int, int]:
        """Run a node. Returns the bytes and the operations that it takes."""
        self._order[node] = len(self._order)
        given: Any = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        args, kwargs = given
        if node.op == "output":
            for value in args[0]:
                if not isinstance(value, Tensor):
                    raise ProgramFormatError(f"returns a {type(value).__name__}, and a program returns tensors")
            return 0, 0
        if node.op == "placeholder":
            value = self._inputs[str(node.target)]
        elif node.op == "get_attr":
            value = self._tensors[str(node.target)]
        else:
            value = self._called(node.target, args, kwargs)
        self._values[node] = value
        found = list(tensors_in(value))
        for tensor in found:
            _check_tensor(tensor)
            self._note(tensor, node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return 0, 0
        return needed_bytes(node.target, args, found), operations(node.target, args, found)

    def peak_bytes(self) -> int:
        """The most that all values made so far take at one time."""
        changes = [0] * (len(self._order) + 1)
        for size, first, last in self._lives.values():
            changes[first] += size
            changes[last + 1] -= size
        peak = now = 0
        for change in changes:
            now += change
            peak = max(peak, now)
        return peak

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        storage = _storage(tensor)
        if storage in self._foreign:
            return
        _, first, _ = self._lives.get(storage, (0, self._order[node], 0))
        self._lives[storage] = (tensor.untyped_storage().nbytes(), first, self._order[node])
        for source in node.all_input_nodes:
            for read in tensors_in(self._values.get(source)):
                if (key := _storage(read)) in self._lives:
                    size, start, _ = self._lives[key]
                    self._lives[key] = (size, start, self._order[node])

    def _called(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            return _counted(target, args, kwargs)
        words = names_fit(target, len(args), kwargs) or arguments_fit(target, args, kwargs)
        if words or (words := self._forbidden(target, args, kwargs)):
            raise ProgramFormatError(f"does not fit: {words}")
        args = tuple(_META if isinstance(value, torch.device) else value for value in args)
        if any(a.name == "device" and a.kwarg_only for a in target._schema.arguments):
            kwargs = {**kwargs, "device": _META}
        return target(*args, **kwargs)

    def _forbidden(self, target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if kwargs.get("pin_memory"):
            return "a saved program makes no pinned memory"
        for argument, value in zip(target._schema.arguments, args, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, Tensor) and _storage(value) in self._foreign:
                return "it would change an input or a tensor of the file"
        if (pieces := num_pieces(target, args)) > _MOST_PIECES:
            return f"it would give {pieces:,} tensors"
        return _beyond(*args) if target._opname == "as_strided" else None


def _beyond(tensor: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> str | None:
    """Why a view of its own sizes and strides is not within a tensor's entries; None if it is."""
    if not tensor.is_contiguous() or tensor.storage_offset() or offset or min([*size, *stride, 0]) < 0:
        return "such a view of this tensor could leave its memory"
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=False))
    return None if last < tensor.numel() else f"it reads entry {last:,} of {tensor.numel():,}"


def _counted(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of a function of numbers."""
    if getattr(target, "__name__", "") == "getitem" and len(args) == 2:
        values, index = args
        if not isinstance(values, list | tuple) or type(index) is not int:
            raise ProgramFormatError("takes one of several results by its number, and nothing else")
        return values[index]
    if kwargs or not 1 <= len(args) <= 3 or not all(is_number(value) for value in args):
        raise ProgramFormatError("takes numbers, one to three of them")
    if getattr(target, "__name__", "") == "pow" and not abs(args[-1]) <= _HIGHEST_POWER:
        raise ProgramFormatError(f"raises to the power {args[-1]}")
    value = target(*args)
    if not is_number(value):
        raise ProgramFormatError("gives a number that is too large")
    return value


def _check_tensor(tensor: Tensor) -> None:
    if type(tensor) is not Tensor or tensor.device != _META or tensor.layout != torch.strided:
        raise ProgramFormatError("gives what is no plain tensor")
    if tensor.dtype not in DTYPES.values() or tensor.dim() > _MOST_AXES:
        raise ProgramFormatError(f"gives a tensor of {tensor.dim()} axes and dtype {tensor.dtype}")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
