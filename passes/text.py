"""Pipelines as text, and back: ``nm_sparsify{criterion=wanda,pattern=2:4},slorb{k=16}``.

A value is a bare word, a number, true, false, none, a JSON string, or a JSON list: ``ignore=["lm_head","re:.*q_proj"]``.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from typing import Any

from sparsepass.graph import SparsepassError
from sparsepass.passes.base import Pass, nearest
from sparsepass.passes.table import passes_table


def parse_pipeline(passes: str | Pass | Iterable[str | Pass]) -> tuple[Pass, ...]:
    """Turn names, pass objects and text into a tuple of passes.

    Args:
        passes: A pass, text with any number of passes, or an iterable of both.

    Raises:
        SparsepassError: If a pass or option is unknown (the nearest known name is given), a value has the wrong type, or
            the text cannot be read.

    Example:
        >>> parse_pipeline("nm_sparsify{criterion=wanda},slorb")[1].name
        'slorb'
    """
    if isinstance(passes, str):
        return tuple(_build(name, options) for name, options in _parse(passes))
    if isinstance(passes, Pass):
        return (passes,)
    found: list[Pass] = []
    for item in passes:
        if not isinstance(item, str | Pass):
            raise SparsepassError(f"a pass is a name, text or a Pass object, got {type(item).__name__} ({item!r})")
        found.extend(parse_pipeline(item))
    return tuple(found)


def pipeline_to_text(passes: Iterable[Pass]) -> str:
    """Turn passes into text that `parse_pipeline` reads back as equal passes."""
    return ",".join(pass_to_text(item) for item in passes)


def pass_to_text(item: Pass) -> str:
    """Turn one pass into text with all options that are set to something."""
    options = [
        f"{field.name}={_value_to_text(getattr(item, field.name))}"
        for field in dataclasses.fields(item)
        if getattr(item, field.name) not in (None, ())
    ]
    return item.name + ("{" + ",".join(options) + "}" if options else "")


def _value_to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return json.dumps(list(value), separators=(",", ":"))
    if isinstance(value, str) and (not value or set(value) & set('{},="[] ') or value in ("true", "false", "none")):
        return json.dumps(value)
    return str(value)


def _parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Split text into names and options."""
    found: list[tuple[str, dict[str, Any]]] = []
    position = 0
    while position < len(text):
        end = next((i for i in range(position, len(text)) if text[i] in "{,}"), len(text))
        name = text[position:end].strip()
        options: dict[str, Any] = {}
        if end < len(text) and text[end] == "}":
            raise _unreadable(text, end, "a '}' without its '{'")
        position = end
        if position < len(text) and text[position] == "{":
            options, position = _options(text, position + 1)
            if position < len(text) and text[position : position + 1].strip() not in (",", ""):
                raise _unreadable(text, position, "expected ',' between passes")
        if not name:
            raise _unreadable(text, position, "expected the name of a pass")
        found.append((name, options))
        while position < len(text) and text[position].isspace():
            position += 1
        if position < len(text) and text[position] == ",":
            position += 1
            if not text[position:].strip():
                raise _unreadable(text, position, "expected another pass after ','")
    if not found:
        raise SparsepassError("the pipeline is empty; name at least one pass, such as nm_sparsify")
    return found


def _options(text: str, position: int) -> tuple[dict[str, Any], int]:
    options: dict[str, Any] = {}
    while True:
        while position < len(text) and text[position] in " \n\t":
            position += 1
        if position < len(text) and text[position] == "}":
            return options, position + 1
        equals = text.find("=", position)
        stop = next((i for i in range(position, len(text)) if text[i] in ",}"), len(text))
        if equals < 0 or equals > stop:
            raise _unreadable(text, position, "expected option=value")
        key = text[position:equals].strip()
        if key in options:
            raise _unreadable(text, position, f"the option {key!r} is given twice")
        position = equals + 1
        while position < len(text) and text[position] == " ":
            position += 1
        if position < len(text) and text[position] in '"[':
            try:
                value, position = json.JSONDecoder().raw_decode(text, position)
            except ValueError as error:
                raise _unreadable(text, position, f"the value of {key!r} is no JSON ({error})") from error
        else:
            end = next((i for i in range(position, len(text)) if text[i] in ",}"), len(text))
            value, position = _word(text[position:end].strip()), end
        options[key] = value
        while position < len(text) and text[position] in " \n\t":
            position += 1
        if position >= len(text):
            raise _unreadable(text, position, "a '}' is missing")
        if text[position] == ",":
            position += 1
        elif text[position] != "}":
            raise _unreadable(text, position, "expected ',' or '}'")


def _word(word: str) -> Any:
    lowered = word.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered == "none":
        return None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _unreadable(text: str, position: int, why: str) -> SparsepassError:
    return SparsepassError(
        f"cannot read the pipeline {text!r} at position {position}: {why}; write it as name{{option=value,...}},name"
    )


def _build(name: str, options: dict[str, Any]) -> Pass:
    table = passes_table()
    if name not in table:
        raise SparsepassError(f"unknown pass {name!r}{nearest(name, list(table))}")
    kind = table[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key, value in options.items():
        if key not in fields:
            raise SparsepassError(f"pass {name} has no option {key!r}{nearest(key, list(fields))}")
        options[key] = _coerce(name, key, value, hints[key])
    return kind(**options)


def _coerce(name: str, key: str, value: Any, hint: Any) -> Any:
    """Turn a parsed value into the type of a field, or say what was expected."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    choices = typing.get_args(hint) if is_union else (hint,)
    for choice in choices:
        origin = typing.get_origin(choice)
        if origin is typing.Literal:
            if value in typing.get_args(choice):
                return value
        elif origin is tuple:
            if isinstance(value, str):
                return (value,)
            if isinstance(value, list) and all(isinstance(v, str) for v in value):
                return tuple(value)
        elif choice is type(None):
            if value is None:
                return None
        elif choice is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif choice is str:
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                return str(value)
        elif isinstance(choice, type) and isinstance(value, choice) and isinstance(value, bool) == (choice is bool):
            return value
    allowed = [str(v) for c in choices if typing.get_origin(c) is typing.Literal for v in typing.get_args(c)]
    if allowed and isinstance(value, str):
        raise SparsepassError(f"pass {name}: {key}={value!r} is not known{nearest(value, allowed)}")
    expected = " or ".join("none" if c is type(None) else getattr(c, "__name__", str(c)) for c in choices)
    raise SparsepassError(f"pass {name}: {key} expects {expected}, got {value!r}")
