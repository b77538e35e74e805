"""Dataclasses as text, and back: ``nm_sparsify{criterion=wanda,pattern=2:4}``. Passes and targets are written so.

A value is a bare word, a number, true, false, none, a JSON string, or a JSON list: ``ignore=["lm_head","re:.*q_proj"]``.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from sparsepass.graph.support.errors import SparsepassError
from sparsepass.graph.support.words import nearest

Kind = TypeVar("Kind")
_MISFIT: Final = object()


def parse_items(text: str, what: str) -> list[tuple[str, dict[str, Any]]]:
    """Split text into names and options.

    Args:
        text: Names, each with its options in braces, separated by commas.
        what: What is named, for errors: ``pass`` or ``target``.

    Raises:
        SparsepassError: If it cannot be read.

    Example:
        >>> parse_items("onnx{opset=18}", "target")
        [('onnx', {'opset': 18})]
    """
    found: list[tuple[str, dict[str, Any]]] = []
    position = 0
    while position < len(text):
        word, position = _until("{,}", text, position)
        name = word.strip()
        options: dict[str, Any] = {}
        if text.startswith("}", position):
            raise _unreadable(text, position, "a '}' without its '{'")
        if text.startswith("{", position):
            options, position = _options(text, position + 1)
            if text[position : position + 1].strip() not in (",", ""):
                raise _unreadable(text, position, f"expected ',' before another {what}")
        if not name:
            raise _unreadable(text, position, f"expected the name of a {what}")
        found.append((name, options))
        position = _after_space(text, position)
        if text.startswith(",", position):
            position += 1
            if not text[position:].strip():
                raise _unreadable(text, position, f"expected another {what} after ','")
    return found


def build(table: Mapping[str, type[Kind]], what: str, name: str, options: Mapping[str, Any]) -> Kind:
    """Make an object of a name and its options.

    Args:
        table: Name -> class, a dataclass. A field's metadata may hold ``parse``, which reads the field from text.
        what: What the classes are, for errors: ``pass`` or ``target``.
        name: A name in the table.
        options: Field -> value, as `parse_items` gives it.

    Raises:
        SparsepassError: If a name is unknown (the nearest known one is given), missing, or a value has the wrong type.
    """
    if name not in table:
        raise SparsepassError(f"unknown {what} {name!r}{nearest(name, list(table))}")
    kind = table[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    found = {}
    for key, value in options.items():
        if key not in fields:
            raise SparsepassError(f"{what} {name} has no option {key!r}{nearest(key, list(fields))}")
        parse = fields[key].metadata.get("parse")
        found[key] = parse(value) if parse and isinstance(value, str) else _coerce(f"{what} {name}", key, value, hints[key])
    for key, field in fields.items():
        if key not in found and field.default is field.default_factory is dataclasses.MISSING:
            raise SparsepassError(f"{what} {name} needs the option {key!r}")
    return kind(**found)


def item_to_text(name: str, item: Any, *, defaults: bool = True) -> str:
    """Turn an object into text with all options that are set to something.

    Args:
        name: Its name in the table.
        item: A dataclass.
        defaults: Whether options are named that have their default.
    """
    options = [
        f"{field.name}={_value_to_text(value)}"
        for field in dataclasses.fields(item)
        if (value := getattr(item, field.name)) not in (None, ()) and (defaults or value != field.default)
    ]
    return name + ("{" + ",".join(options) + "}" if options else "")


def _value_to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return json.dumps(list(value), separators=(",", ":"))
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, str) and (not value or set(value) & set('{},="[] ') or value in ("true", "false", "none")):
        return json.dumps(value)
    return str(value)


def _options(text: str, position: int) -> tuple[dict[str, Any], int]:
    options: dict[str, Any] = {}
    while True:
        position = _after_space(text, position)
        if text.startswith("}", position):
            return options, position + 1
        word, equals = _until("=,}", text, position)
        if not text.startswith("=", equals):
            raise _unreadable(text, position, "expected option=value")
        key = word.strip()
        if key in options:
            raise _unreadable(text, position, f"the option {key!r} is given twice")
        position = _after_space(text, equals + 1)
        if text.startswith(('"', "["), position):
            try:
                value, position = json.JSONDecoder().raw_decode(text, position)
            except ValueError as error:
                raise _unreadable(text, position, f"the value of {key!r} is no JSON ({error})") from error
        else:
            word, position = _until(",}", text, position)
            value = _word(word.strip())
        options[key] = value
        position = _after_space(text, position)
        if position == len(text):
            raise _unreadable(text, position, "a '}' is missing")
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("}", position):
            raise _unreadable(text, position, "expected ',' or '}'")


def _until(stops: str, text: str, position: int) -> tuple[str, int]:
    """The text before the next of some characters, and where that stands."""
    end = next((i for i in range(position, len(text)) if text[i] in stops), len(text))
    return text[position:end], end


def _after_space(text: str, position: int) -> int:
    return len(text) - len(text[position:].lstrip())


def _word(word: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if word.lower() in constants:
        return constants[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _unreadable(text: str, position: int, why: str) -> SparsepassError:
    return SparsepassError(f"cannot read {text!r} at position {position}: {why}; write it as name{{option=value,...}}")


def _coerce(what: str, key: str, value: Any, hint: Any) -> Any:
    """Turn a parsed value into the type of a field, or say what was expected."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    choices = typing.get_args(hint) if is_union else (hint,)
    for choice in choices:
        if (found := _fitted(value, choice)) is not _MISFIT:
            return found
    allowed = [str(v) for c in choices if typing.get_origin(c) is typing.Literal for v in typing.get_args(c)]
    if allowed and isinstance(value, str):
        raise SparsepassError(f"{what}: {key}={value!r} is not known{nearest(value, allowed)}")
    expected = " or ".join("none" if c is type(None) else getattr(c, "__name__", str(c)) for c in choices)
    raise SparsepassError(f"{what}: {key} expects {expected}, got {value!r}")


def _fitted(value: Any, kind: Any) -> Any:
    """A parsed value as one type, or `_MISFIT`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value if value in arguments else _MISFIT
    if origin is tuple:
        return _fitted_tuple(value, arguments)
    if kind is type(None):
        return None if value is None else _MISFIT
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    fits = isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    return value if fits else _MISFIT


def _fitted_tuple(value: Any, kinds: tuple[Any, ...]) -> Any:
    """A list as a tuple; a single value as a tuple of one, where any number may stand."""
    any_number = len(kinds) == 2 and kinds[1] is ...
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not any_number and len(items) != len(kinds):
        return _MISFIT
    if kinds[0] is str and not all(isinstance(item, str) for item in items):
        return _MISFIT
    wanted = [kinds[0]] * len(items) if any_number else list(kinds)
    found = tuple(_fitted(item, kind) for item, kind in zip(items, wanted, strict=True))
    return _MISFIT if any(item is _MISFIT for item in found) else found
