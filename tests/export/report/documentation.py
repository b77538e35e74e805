"""The reference part of docs/report.md, made from the models: `python -m tests.export.report.documentation` writes it anew."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sparsepass.export.report import json_schema, markdown_table
from sparsepass.export.report.schema import SECTIONS

FILE: Final = Path(__file__).parents[3] / "docs" / "report.md"
MARK: Final = "<!-- Everything below is made by `python -m tests.export.report.documentation`. -->\n"
_WORDS: Final = {
    "string": "text", "integer": "integer", "number": "number", "boolean": "flag", "object": "object", "array": "list",
}  # fmt: skip


def whole() -> str:
    """docs/report.md as it should be: what was written by hand, and the reference."""
    by_hand, mark, _ = FILE.read_text(encoding="utf-8").partition(MARK)
    assert mark
    return f"{by_hand}{MARK}\n" + "\n\n".join(_reference()) + "\n"


def _reference() -> Iterator[str]:
    schema = json_schema()
    known = schema["$defs"]
    header = {name: part for name, part in schema["properties"].items() if name not in SECTIONS}
    yield "## Header"
    yield _table(header, ["schema", "schema_version", "recipe", "runs"])
    yield from _entries(header, known)
    yield "## Sections"
    yield "All are optional."
    for name, model in SECTIONS.items():
        part = known[model.__name__]
        yield f"### `{name}`"
        yield inspect.cleandoc(model.__doc__ or "")
        yield _table(part["properties"], part.get("required", []))
        yield from _entries(part["properties"], known)


def _entries(fields: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """The tables of what the fields hold, and of what that holds in turn."""
    for name, field in fields.items():
        for entry in _held(field):
            part = known[entry]
            kind = _kind(field)
            many = "An entry of" if "list" in kind else "A value of" if "additionalProperties" in str(field) else "The value of"
            yield f"{many} `{name}`: {part['description'][:1].lower()}{part['description'][1:]}"
            yield _table(part["properties"], part.get("required", []))
            yield from _entries(part["properties"], known)


def _held(field: Any) -> Iterator[str]:
    """Names of the models that a field holds."""
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for value in field.values():
            yield from _held(value)
    elif isinstance(field, list):
        for value in field:
            yield from _held(value)


def _table(fields: dict[str, Any], required: list[str]) -> str:
    rows = [
        (f"`{name}`", _kind(field) + ("" if name in required else ", optional"), field["description"])
        for name, field in fields.items()
    ]
    return markdown_table(("field", "type", "meaning"), rows)


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "object"
    kinds = [part.get("type", "object") for part in field.get("anyOf", [field])]
    found = [_WORDS[kind] for kind in kinds if kind != "null"]
    return ("number" if "number" in found else found[0]) + (" or null" if "null" in kinds else "")


if __name__ == "__main__":
    FILE.write_text(whole(), encoding="utf-8")
