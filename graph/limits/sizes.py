"""Limits of the sizes of a program's inputs: conditions that hold for the graph and nothing beyond.

A trace takes one branch wherever a model asks how long its input is, and torch.export notes the question: ``s <= 8``, or
``s % 2 == 0``. A program keeps such conditions as text, ``"input_ids[1] <= 8"``, which is read here and never executed.
"""

import ast
import functools
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sparsepass.graph.support import ProgramFormatError, SparsepassError

Sizes = Mapping[str, Sequence[int]]

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_SIZE = r"\w+\[\d+\]"
_FIRM = re.compile(rf"{_SIZE} (<=|<|==) (\d+|{_SIZE})|\d+ (>=|>|==) {_SIZE}|{_SIZE} (>=|>) {_SIZE}")
_RANGE = re.compile(rf"{_SIZE} (<=|<|>=|>) \d+|\d+ (<=|<|>=|>) {_SIZE}")
_EQUAL = re.compile(rf"{_SIZE} == {_SIZE}")
_LARGEST = 1024
_SHOWN = 4  # ranges of allowed sizes that a message names


def limits_of(placeholders: Iterable[fx.Node]) -> tuple[str, ...]:
    """The conditions on input sizes that torch.export found, from the placeholders of its graph.

    1. The range of each size, unless it is "2 or more": 2 is assumed for every size that varies, not found.
    2. Sizes that are equal, or computed from others.
    3. The questions about sizes that the model, or an operator in it, asked.

    What cannot be written as text that `holds` reads fixes the sizes in it to those of the example.
    """
    shapes = {str(node.target): node.meta["val"].shape for node in placeholders if isinstance(node.meta.get("val"), Tensor)}
    environment = next((size.node.shape_env for shape in shapes.values() for size in shape if not isinstance(size, int)), None)
    if environment is None:
        return ()
    import sympy

    first: dict[Any, str] = {}
    later: list[tuple[str, Any]] = []
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                continue
            expression = size.node.expr
            if isinstance(expression, sympy.Symbol) and expression not in first:
                first[expression] = f"{name}[{axis}]"
            elif expression.free_symbols:
                later.append((f"{name}[{axis}]", expression))
    found = [limit for symbol, place in first.items() for limit in _range(environment, symbol, place)]
    conditions = [sympy.Eq(sympy.Symbol(place, integer=True), expression) for place, expression in later]
    conditions += [environment.simplify(guard.expr).xreplace(environment.replacements) for guard in environment.guards]
    places = {symbol: sympy.Symbol(place, integer=True) for symbol, place in first.items()}
    hints = {place: _hint(shapes, place) for place in first.values()}
    for condition in conditions:
        if condition in (True, False) or free_unbacked_symbols(condition):
            continue
        if any(symbol not in first and "[" not in str(symbol) for symbol in condition.free_symbols):
            continue  # it asks about a stride
        found += _text(condition.xreplace(places), hints)
    return tuple(dict.fromkeys(found))


def _hint(shapes: Mapping[str, Any], place: str) -> int:
    ((name, axis),) = _places(place)
    return int(shapes[name][axis].node.hint)


def _range(environment: Any, symbol: Any, place: str) -> list[str]:
    bounds = environment.var_to_range.get(symbol)
    if bounds is None:
        return []
    found = [f"{place} >= {int(bounds.lower)}"] if bounds.lower.is_finite and bounds.lower > 2 else []
    return found + ([f"{place} <= {int(bounds.upper)}"] if bounds.upper.is_finite and bounds.upper < 2**31 else [])


def _text(condition: Any, hints: Mapping[str, int]) -> list[str]:
    from torch.utils._sympy.printers import PythonPrinter

    names = sorted(map(str, condition.free_symbols))
    try:
        text = PythonPrinter().doprint(condition)
        _parsed(text)
    except (ProgramFormatError, NotImplementedError, SyntaxError):
        return [f"{name} == {hints[name]}" for name in names if name in hints]
    return [text]


def holds(limit: str, sizes: Sizes) -> bool:
    """Whether sizes are within one limit. A division by zero, or too large a number, is outside.

    Args:
        limit: Such as ``"input_ids[1] <= 8"``.
        sizes: Input name -> its shape.

    Raises:
        ProgramFormatError: If the limit is no condition on sizes.

    Example:
        >>> holds("x[1] % 4 == 0 and x[0] == y[0]", {"x": (2, 8), "y": (2, 3)})
        True
    """
    try:
        return bool(_parsed(limit)(sizes))
    except ArithmeticError:
        return False


def broken(limits: Sequence[str], sizes: Sizes) -> str | None:
    """The first limit that sizes break; None if they are within all."""
    return next((limit for limit in limits if not holds(limit, sizes)), None)


def simplified(limits: Iterable[str]) -> tuple[str, ...]:
    """The limits without the ranges that another range says as well or more exactly.

    Example:
        >>> simplified(["x[1] <= 8", "x[1] == y[1]", "x[1] <= 64", "x[1] < 9", "3 < x[1]"])
        ('x[1] <= 8', 'x[1] == y[1]', '3 < x[1]')
    """
    tightest: dict[tuple[str, bool], tuple[int, str]] = {}
    for limit in limits:
        if is_range(limit):
            left, sign, right = limit.split()
            number = right if right.isdigit() else left
            is_end = sign.startswith("<") is (number == right)
            bound = int(number) - (len(sign) == 1 if is_end else -(len(sign) == 1))
            key = (left if number == right else right, is_end)
            known = tightest.get(key)
            if known is None or (bound < known[0] if is_end else bound > known[0]):
                tightest[key] = (bound, limit)
    kept = {limit for _, limit in tightest.values()}
    return tuple(limit for limit in dict.fromkeys(limits) if limit in kept or not is_range(limit))


def as_ranges(limits: Sequence[str]) -> tuple[str, ...]:
    """The limits, with those about one size alone as its range, where the sizes that they allow are one run and end.

    Sizes above 1024 that other limits than ranges would allow again are given up.

    Example:
        >>> as_ranges(["(x[1] + 63) // 64 == 1", "x[1] == y[1]"]), as_ranges(["x[1] % 2 == 0"])
        (('x[1] == y[1]', 'x[1] <= 64'), ('x[1] % 2 == 0',))
    """
    found = list(limits)
    for place in dict.fromkeys(_places(limit) for limit in limits if not is_range(limit)):
        if len(place) != 1:
            continue
        ((name, axis),) = place
        sizes = allowed(limits, name, axis, range(1, _LARGEST + 1))
        if sizes and sizes[-1] < _LARGEST and len(sizes) == sizes[-1] - sizes[0] + 1:
            ends = [f"{name}[{axis}] >= {sizes[0]}"] * (sizes[0] > 1) + [f"{name}[{axis}] <= {sizes[-1]}"]
            found = [limit for limit in found if _places(limit) != place] + ends
    return tuple(found)


def is_range(limit: str) -> bool:
    """Whether a limit compares one size with a number.

    Example:
        >>> is_range("x[1] >= 4"), is_range("x[1] == y[1]")
        (True, False)
    """
    return bool(_RANGE.fullmatch(limit))


@functools.lru_cache(maxsize=1024)
def refused(limits: tuple[str, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> str | None:
    """What to say to inputs of these shapes if they are beyond the limits; None if they are not.

    Example:
        >>> refused(("x[1] <= 8",), (("x", (2, 8)),)) is None
        True
    """
    sizes = dict(shapes)
    limit = broken(limits, sizes)
    return refusal(limits, limit, sizes) if limit is not None else None


def check_input(name: str, value: Tensor, example: Tensor, dynamic: Collection[int]) -> None:
    """Refuse an input of another size than the graph has built in: it could broadcast to a wrong result instead of failing.

    Args:
        name: Of the input.
        value: What was given for it.
        example: What it was captured with.
        dynamic: Axes that may vary.

    Raises:
        SparsepassError: It names both shapes.
    """
    sizes = ["any" if axis in dynamic else str(size) for axis, size in enumerate(example.shape)]
    if value.dim() != example.dim() or any(
        size != example.shape[axis] for axis, size in enumerate(value.shape) if axis not in dynamic
    ):
        raise SparsepassError(
            f"the program's input {name!r} has shape [{', '.join(sizes)}], got {list(value.shape)}; capture the model "
            "again with example_inputs (of at least 2 along each axis that varies) or dynamic_axes that allow it"
        )


def refusal(limits: Sequence[str], limit: str, sizes: Sizes) -> str:
    """Say which sizes would be within the limits, where one of them is broken.

    Example:
        >>> refusal(["x[1] <= 8"], "x[1] <= 8", {"x": (2, 9)})
        "the program's input 'x' has size 9 along axis 1, and the graph holds for 1 to 8 there (x[1] <= 8)"
    """
    places = sorted(_places(limit))
    if len(places) > 1:
        given = " and ".join(f"{name!r} has size {sizes[name][axis]} along axis {axis}" for name, axis in places)
        return f"the program's input {given}, and the graph holds only for sizes with {limit}"
    name, axis = places[0]
    size = sizes[name][axis]
    words = _ranges(allowed(limits, name, axis, range(1, max(256, 2 * size))))
    return f"the program's input {name!r} has size {size} along axis {axis}, and the graph holds for {words} there ({limit})"


def allowed(limits: Sequence[str], name: str, axis: int, sizes: Iterable[int]) -> list[int]:
    """Those of several sizes along one axis of an input that are within the limits about that size alone.

    Example:
        >>> allowed(["x[1] <= 8", "x[1] % 4 == 0", "x[1] == y[1]"], "x", 1, range(1, 20))
        [4, 8]
    """
    own = [limit for limit in limits if _places(limit) == {(name, axis)}]
    return [size for size in sizes if all(holds(limit, {name: (*(1,) * axis, size)}) for limit in own)]


def end_before(limits: Sequence[str], examples: Mapping[str, Tensor], length: int) -> bool:
    """Whether sequences that are about that long are beyond the limits, all of them.

    Args:
        limits: Of a program.
        examples: Its example inputs; their second axis is what grows, everywhere by as much.
        length: Of the longest of them.

    Example:
        >>> from torch import zeros
        >>> end_before(["x[1] <= 8"], {"x": zeros(2, 8)}, 20), end_before(["x[1] % 2 == 0"], {"x": zeros(2, 8)}, 20)
        (True, False)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in examples.items()}
    longest = max([shape[1] for shape in shapes.values() if len(shape) > 1], default=length)

    def grown(more: int) -> Sizes:
        return {name: shape[:1] + tuple(size + more for size in shape[1:2]) + shape[2:] for name, shape in shapes.items()}

    about = [grown(max(other - longest, 1)) for other in range(length - 7, length + 1)]
    return any(all(not holds(limit, sizes) for sizes in about) for limit in limits)


def unusual(limits: Sequence[str], longest: int | None) -> tuple[str, ...]:
    """The limits that users would not expect: not that sizes are equal, nor the model's number of positions.

    Args:
        limits: Of a program.
        longest: The number of positions; None if there is no such limit.

    Example:
        >>> unusual(["x[1] == y[1]", "x[1] <= 64", "x[1] <= 8"], 64)
        ('x[1] <= 8',)
    """
    ends = set() if longest is None else {f"<= {longest}", f"< {longest + 1}"}
    plain = [limit for limit in limits if not _EQUAL.fullmatch(limit) and limit.partition(" ")[2] not in ends]
    return tuple(plain)


@functools.lru_cache(maxsize=4096)
def is_firm(limit: str) -> bool:
    """Whether a limit is the end of a size, or says that two are equal: what lies beyond cannot be compared whole.

    Example:
        >>> is_firm("x[1] <= 8"), is_firm("x[1] == y[1]"), is_firm("x[1] >= 4"), is_firm("x[1] % 2 == 0")
        (True, True, False, False)
    """
    return bool(_FIRM.fullmatch(limit))


@functools.lru_cache(maxsize=4096)
def _places(limit: str) -> frozenset[tuple[str, int]]:
    found = [node for node in ast.walk(ast.parse(limit, mode="eval")) if isinstance(node, ast.Subscript)]
    return frozenset((ast.unparse(node.value), int(ast.unparse(node.slice))) for node in found)


def _ranges(sizes: Sequence[int]) -> str:
    """Words for a list of sizes: the ends of its runs."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size - 1:
            runs[-1][1] = size
        else:
            runs.append([size, size])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:_SHOWN]]
    return ", ".join(words) + (", ..." if len(runs) > _SHOWN else "") if words else "no such size"


@functools.lru_cache(maxsize=4096)
def _parsed(limit: str) -> Callable[[Sizes], Any]:
    try:
        return _reader(ast.parse(limit, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ProgramFormatError(f"{limit!r} is no condition on the sizes of inputs") from error


def _reader(node: ast.expr) -> Callable[[Sizes], Any]:
    """Turn a parsed condition into a function of the sizes. Only arithmetic on sizes is read."""
    match node:
        case ast.Constant(value=bool() | int() | float()):
            constant = node.value
            return lambda _: constant
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int() as axis)):
            return lambda sizes: sizes[name][axis]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            combine, a, b = _BINARY[type(op)], _reader(left), _reader(right)
            return lambda sizes: combine(a(sizes), b(sizes))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _reader(operand)
            return lambda sizes: -inner(sizes)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _reader(operand)
            return lambda sizes: not inner(sizes)
        case ast.BoolOp(op=op, values=values):
            parts, joined = [_reader(value) for value in values], all if isinstance(op, ast.And) else any
            return lambda sizes: joined(part(sizes) for part in parts)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            compare, a, b = _COMPARE[type(op)], _reader(left), _reader(right)
            return lambda sizes: compare(a(sizes), b(sizes))
        case ast.Call(func=ast.Name(id="max" | "min" as name), args=arguments, keywords=[]):
            read, pick = [_reader(argument) for argument in arguments], max if name == "max" else min
            return lambda sizes: pick(part(sizes) for part in read)
    raise ProgramFormatError(f"{ast.unparse(node)!r} is no condition on the sizes of inputs")
