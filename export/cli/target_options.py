"""The options of `sparsepass export` that targets add: one for each field of a target's class."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparsepass._docs import attribute_docs
from sparsepass.export.targets import TARGETS, targets_table

if TYPE_CHECKING:
    from sparsepass.export.targets import Target

_PLAIN: Final = (int, float, Path)
"""Types that the command line reads by itself; all else is text that the target reads."""


def parameters() -> list[Parameter]:
    """The options of all targets. Those of one name are one option, with the help of the first target that has it."""
    try:
        table = targets_table()
    except ValueError:  # of a broken package: every other command works, and this one says what is wrong when it is given
        table = TARGETS
    found: dict[str, Parameter] = {}
    for kind in table.values():
        for name, parameter in _parameters(kind):
            found.setdefault(name, parameter)
    return list(found.values())


def chosen(text: str, given: Mapping[str, Any]) -> "Target":
    """The target that ``--target`` names, with the options that were given beside it.

    Raises:
        SparsepassError: If the target is not known, has no such option, or a value cannot be used.
    """
    from sparsepass.export.stages import refuse_option
    from sparsepass.export.targets import parse_target
    from sparsepass.graph.support import build

    target = parse_target(text)
    kind = type(target)
    switches = {each.name: not each.default for each in dataclasses.fields(kind) if isinstance(each.default, bool)}
    options = {each.name: value for each in dataclasses.fields(kind) if (value := getattr(target, each.name)) != each.default}
    for name, value in given.items():
        if not (value is None or value is False or value == []):
            refuse_option(target, name)
            options[name] = switches.get(name, value)
    return build({target.name: kind}, "target", target.name, options)


def _parameters(kind: "type[Target]") -> Iterator[tuple[str, Parameter]]:
    hints, docs = typing.get_type_hints(kind), attribute_docs(kind)
    for each in dataclasses.fields(kind):
        flag = each.metadata.get("flag") or each.name.replace("_", "-")
        default: Any = None
        if isinstance(each.default, bool):
            flag, annotation, default = f"no-{flag}" if each.default else flag, bool, False
        else:
            annotation = _read_as(hints[each.name], has_parser=bool(each.metadata.get("parse"))) | None
        option = typer.Option(f"--{flag}", help=each.metadata.get("help") or docs.get(each.name, "").replace("`", ""))
        yield each.name, Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option])


def _read_as(hint: Any, *, has_parser: bool) -> Any:
    if has_parser:
        return str
    if typing.get_origin(hint) is tuple:
        return list[_read_as(typing.get_args(hint)[0], has_parser=False)]  # type: ignore[misc]
    return next((kind for kind in (hint, *typing.get_args(hint)) if kind in _PLAIN), str)
