"""The state of a run as JSON: checked before it is written, compared when it is read."""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from sparsepass.graph.support import SparsepassError

JSON = Any


def to_json_text(value: JSON, where: str) -> str:
    """Write JSON as text, refusing what would come back as something else (tuples alone come back as lists).

    Args:
        value: What to write.
        where: What it is called in errors.

    Raises:
        SparsepassError: If it holds something that is not JSON, or a key that is not a string.

    Example:
        >>> to_json_text({"seen": 640, "order": (2, 1)}, "state")
        '{"seen": 640, "order": [2, 1]}'
    """
    _check(value, where)
    return json.dumps(value)


def differences(expected: JSON, found: JSON, where: str = "") -> list[str]:
    r"""Say how two pieces of JSON differ: one sentence for each place; texts are compared by lines.

    Args:
        expected: What this run has.
        found: What the checkpoint has.
        where: Path of the place, for the sentences.

    Example:
        >>> differences({"lr": 0.1, "data": {"length": 8}}, {"lr": 0.1, "data": {"length": 9}})
        ['data.length is 8 here and 9 in the checkpoint']
        >>> differences("a: 1\nb: 2", "a: 1\nb: 3", "config")
        ["config, line 2, is 'b: 2' here and 'b: 3' in the checkpoint"]
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        keys = dict.fromkeys([*expected, *found])
        inside = [(f"{where}.{key}" if where else key, expected.get(key), found.get(key)) for key in keys]
        return [line for path, here, there in inside for line in differences(here, there, path)]
    if isinstance(expected, str) and isinstance(found, str) and "\n" in expected + found:
        here, there = expected.splitlines(), found.splitlines()
        changes = difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes()
        return [
            f"{where}, line {i + 1}, is {chr(10).join(here[i:j])!r} here and {chr(10).join(there[k:n])!r} in the checkpoint"
            for kind, i, j, k, n in changes
            if kind != "equal"
        ]
    return [] if expected == found else [f"{where} is {_short(expected)} here and {_short(found)} in the checkpoint"]


def _check(value: JSON, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise SparsepassError(f"{where} has the key {key!r}; keys of JSON are strings")
            _check(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not isinstance(value, str | int | float | None):
        raise SparsepassError(f"{where} is a {type(value).__name__}, which is not JSON; store tensors as tensors")


def _short(value: JSON) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
