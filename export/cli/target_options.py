"""The options of `sparsepass export` that targets add: one for each field of a target's class."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from sparsepass._docs import attribute_docs
from sparsepass.export.cli.options import option
from sparsepass.export.targets import TARGETS, targets_table

if TYPE_CHECKING:
    from sparsepass.export.targets import Target


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
        yield (
            each.name,
            option(
                each.name,
                str if each.metadata.get("parse") else hints[each.name],
                flag="--" + (each.metadata.get("flag") or each.name.replace("_", "-")),
                help=each.metadata.get("help") or docs.get(each.name, ""),
                default=each.default if isinstance(each.default, bool) else None,
            ),
        )
