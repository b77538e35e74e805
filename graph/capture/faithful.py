"""A captured program against its model: on the example inputs and on other shapes, right after capture."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsepass.graph.limits import as_ranges, broken, holds, is_firm, is_range, position_limit, simplified
from sparsepass.graph.program import Program
from sparsepass.graph.support import CaptureError, first_line

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 4e-2}
_EXACT = 1e-4  # of float32: a graph may add in another order (experts), and nothing else
_LONGEST, _BATCHES = 80, (1, 2, 3, 4)
_RUNS = 6  # comparisons spent on telling limits that matter from questions that operators ask in passing

_Sizes = dict[str, tuple[int, ...]]


def check_against(model: nn.Module, program: Program) -> None:
    """Compare a program with the model it was captured from, and settle which limits of its sizes it keeps.

    1. On its example inputs the two must agree.
    2. On a batch of one and on another length, on sequences of one token: where they do not agree, the axis does not vary,
       or not down to 1.
    3. A condition that torch.export noted is dropped where shapes beyond it give the model's result, twice; ranges and
       equal sizes are kept whatever the comparison says.

    Shapes that the model itself cannot run are not compared. On the meta device nothing is.

    Args:
        model: In evaluation mode.
        program: Changed in place: its limits and dynamic axes.

    Raises:
        CaptureError: If the two differ on the example inputs, or the model cannot run them.

    Exactness: relative error of all outputs together: 1e-4, 2e-2 in float16, 4e-2 in bfloat16.
    """
    shapes = _OtherShapes(program)
    everywhere = shapes.all()
    program.limits = tuple(limit for limit in program.limits if is_firm(limit) or _breaks(limit, everywhere))
    if any(tensor.is_meta for tensor in [*program.tensors().values(), *program.example_inputs.values()]):
        return
    try:
        found = _difference(model, program, program.example_inputs)
    except _ModelError as error:
        if "not implemented for" in str(error):  # a dtype that this device cannot compute
            return
        raise CaptureError(
            f"{type(model).__name__} cannot run the example inputs itself ({error}); give example_inputs that it takes"
        ) from error
    if found is None:
        return
    if found > _allowed(program):
        weights = {name: t for name, t in program.tensors().items() if isinstance(t, nn.Parameter)}
        if odd := next((name for name, t in weights.items() if not t.isfinite().all()), None):
            raise CaptureError(
                f"{odd} holds NaN or infinity, and so does what {type(model).__name__} computes: the checkpoint is broken, "
                "or overflowed when its type was converted; take its weights from the source again"
            )
        raise CaptureError(
            f"the captured graph differs from {type(model).__name__} on its own example inputs (relative error {found:.3g}): "
            "the model behaves otherwise when it is traced. Inputs that it would fill in by itself are the usual cause: give "
            f"them among example_inputs (given: {', '.join(program.example_inputs)}), or capture a submodule"
        )
    _settle_axes(model, program, shapes)
    _settle_limits(model, program, shapes)
    _say_simply(program, shapes)


class _ModelError(Exception):
    """What the model itself says to inputs."""


class _OtherShapes:
    """Other shapes of the example inputs: all batches vary as one, all lengths (axis 1), all heights, all widths."""

    def __init__(self, program: Program) -> None:
        self.example: _Sizes = {name: tuple(t.shape) for name, t in program.example_inputs.items()}
        self.axes = program.dynamic_axes
        self.largest: dict[int, int] = {}
        for name, axes in self.axes.items():
            for axis in axes:
                self.largest[axis] = max(self.largest.get(axis, 0), self.example[name][axis])
        limit = position_limit(program.origin.config)
        self.longest = max(_LONGEST, self.largest.get(1, 0) + 16)
        self.positions = min(self.longest, limit or 2**31)

    def at(self, sizes: Mapping[int, int]) -> _Sizes:
        """The example's sizes with others along some axes: for the largest there, and the rest change by as much."""

        def size(name: str, axis: int, old: int) -> int:
            if axis not in self.axes.get(name, ()) or axis not in sizes:
                return old
            return max(1, old + sizes[axis] - self.largest[axis])

        return {name: tuple(size(name, axis, old) for axis, old in enumerate(shape)) for name, shape in self.example.items()}

    def along(self, axis: int) -> list[_Sizes]:
        """Shapes that differ in one kind of axis; images that stay square are among them."""
        if axis not in self.largest:
            return []
        found = [self.at({axis: value}) for value in self._values(axis)]
        return found + ([self.at({2: value, 3: value}) for value in self._values(axis)] if axis > 1 else [])

    def all(self) -> list[_Sizes]:
        batches, lengths = (self._values(axis) if axis in self.largest else [1] for axis in (0, 1))
        both = [self.at({0: batch, 1: length}) for batch, length in itertools.product(batches, lengths)]
        return both + [shape for axis in self.largest if axis > 1 for shape in self.along(axis)]

    def _values(self, axis: int) -> list[int]:
        """Sizes to try: all small ones, some up to the end, and all about the end."""
        if axis == 0:
            return list(_BATCHES)
        last = self.longest if axis == 1 else max(_LONGEST, self.largest[axis] + 16)
        first = min(_LONGEST, last)
        between = range(first, last - 16, max(7, (last - first) // _LONGEST))
        return [*range(1, first + 1), *between, *range(max(first + 1, last - 16), last + 1)]


def _breaks(limit: str, shapes: Sequence[_Sizes]) -> bool:
    return any(not holds(limit, sizes) for sizes in shapes)


def _settle_axes(model: nn.Module, program: Program, shapes: _OtherShapes) -> None:
    """Compare one other shape for each kind of axis; an axis along which the two differ is fixed."""
    for axis, size in shapes.largest.items():
        if axis == 0:
            candidates = [shapes.at({0: size + more}) for more in (1, 2)]
        elif axis == 1:
            lengths = [size + more for more in (5, 8, -3, 1, -1)]
            candidates = [shapes.at({1: length}) for length in lengths if 1 < length <= shapes.positions]
        else:
            candidates = [shapes.at({2: 2 * size, 3: 2 * size})]
        within = [sizes for sizes in candidates if broken(program.limits, sizes) is None]
        if within and _agree(model, program, within[0]) is False:
            _fix(program, axis)
    for axis in (0, 1):
        one = shapes.at({axis: 1})
        if one != shapes.example and broken(program.limits, one) is None and _agree(model, program, one) is False:
            program.limits += tuple(f"{name}[{axis}] >= 2" for name in _varying(program, axis))


def _varying(program: Program, axis: int) -> list[str]:
    return [name for name, axes in program.dynamic_axes.items() if axis in axes]


def _fix(program: Program, axis: int) -> None:
    program.dynamic_axes = {name: tuple(a for a in axes if a != axis) for name, axes in program.dynamic_axes.items()}


def _settle_limits(model: nn.Module, program: Program, shapes: _OtherShapes) -> None:
    """Drop the conditions beyond which the program still gives the model's result."""
    firm = [limit for limit in program.limits if is_firm(limit)]
    doubtful = [limit for limit in program.limits if not is_firm(limit)]
    possible = [sizes for sizes in shapes.all() if broken(firm, sizes) is None]
    beyond = {limit: [sizes for sizes in possible if not holds(limit, sizes)] for limit in doubtful}
    equal = dict.fromkeys(doubtful, 0)
    kept = {limit for limit in doubtful if not beyond[limit]}
    tried: list[_Sizes] = []
    for _ in range(_RUNS):
        open_limits = [limit for limit in doubtful if limit not in kept and equal[limit] < min(2, len(beyond[limit]))]
        choices = [sizes for limit in open_limits for sizes in (beyond[limit][0], beyond[limit][-1]) if sizes not in tried]
        if not choices:
            break
        sizes = max(choices, key=lambda each: sum(not holds(limit, each) for limit in open_limits))
        tried.append(sizes)
        agrees = _agree(model, program, sizes)
        is_moot = agrees is None and max([shape[1] for shape in sizes.values() if len(shape) > 1], default=0) > shapes.positions
        for limit in doubtful:
            if not holds(limit, sizes):  # beyond its positions, a model that fails there needs no limit
                equal[limit] += agrees is True or is_moot
                kept |= {limit} if agrees is not True and not is_moot else set()
    program.limits = tuple(
        limit for limit in program.limits if limit in firm or limit in kept or equal[limit] < min(2, len(beyond[limit]))
    )


def _say_simply(program: Program, shapes: _OtherShapes) -> None:
    """Say limits as ranges, drop those that ranges imply, and call an axis fixed along which one size is left."""
    ranges = [limit for limit in program.limits if is_range(limit)]
    within = [sizes for sizes in shapes.all() if broken(ranges, sizes) is None]
    needed = [limit for limit in program.limits if limit in ranges or is_firm(limit) or _breaks(limit, within)]
    program.limits = simplified(as_ranges(needed))
    for axis in shapes.largest:
        others = [sizes for sizes in shapes.along(axis) if sizes != shapes.example]
        if not any(broken(program.limits, sizes) is None for sizes in others):
            _fix(program, axis)


def _agree(model: nn.Module, program: Program, sizes: _Sizes) -> bool | None:
    """Whether the two agree on inputs of other sizes; None where the model itself cannot run them."""
    for stretch in (_repeated, _extended):
        inputs = {name: stretch(t, sizes[name]) for name, t in program.example_inputs.items()}
        with contextlib.suppress(_ModelError):
            found = _difference(model, program, inputs)
            return None if found is None else found <= _allowed(program)
    return None


def _repeated(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut a tensor, or go on from its beginning."""
    for axis, size in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor


def _extended(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cut a tensor, or repeat its last entries: special tokens at its beginning stay as many as they are."""
    for axis, size in enumerate(shape):
        index = torch.arange(size, device=tensor.device).clamp(max=tensor.shape[axis] - 1)
        tensor = tensor.index_select(axis, index)
    return tensor


def _difference(model: nn.Module, program: Program, inputs: Mapping[str, Tensor]) -> float | None:
    """Relative error of the program's outputs; None where the model does not agree with itself (it draws random numbers).

    Raises:
        _ModelError: If the model cannot run the inputs.
    """
    expected = _outputs(model, inputs, seed=0)
    found = _relative(expected, _program_outputs(program, inputs))
    if found > _allowed(program) and _relative(expected, _outputs(model, inputs, seed=1)) > _allowed(program):
        return None
    return found


def _outputs(model: nn.Module, inputs: Mapping[str, Tensor], *, seed: int) -> list[Tensor]:
    try:
        with _seeded(seed, inputs):
            output = model(**{name: tensor.clone() for name, tensor in inputs.items()})
    except Exception as error:  # a model's own code raises anything
        raise _ModelError(f"{type(error).__name__}: {first_line(error)}") from error
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _program_outputs(program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor] | None:
    given = {name: inputs[name].clone() for name in program.input_names}
    try:
        with _seeded(0, inputs):
            found = list(program.graph_module(*given.values()))
        return found if all(torch.equal(given[name], inputs[name]) for name in given) else None  # it wrote into its inputs
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # sizes that do not fit
        return None


@contextlib.contextmanager
def _seeded(seed: int, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    devices = {tensor.device for tensor in inputs.values() if tensor.device.type != "cpu"}
    with torch.random.fork_rng([*devices]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def _relative(expected: Sequence[Tensor], found: Sequence[Tensor] | None) -> float:
    """Norm of the difference over the norm of what is expected. The same NaN or infinity in both is no difference."""
    if found is None or [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    off = size = 0.0
    for right, other in zip(expected, found, strict=True):
        a, b = right.double(), other.double()
        same = (a == b) | (a.isnan() & b.isnan())
        off += float(torch.where(same, 0.0, a - b).square().sum())
        size += float(torch.where(a.isfinite(), a, 0.0).square().sum())
    if off != off:
        return float("inf")
    return (off / size) ** 0.5 if size else (float("inf") if off else 0.0)


def _allowed(program: Program) -> float:
    kinds = {t.dtype for t in program.tensors().values() if t.is_floating_point()}
    return max((_TOLERANCE.get(kind, _EXACT) for kind in kinds), default=_EXACT)
