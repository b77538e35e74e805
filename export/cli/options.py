"""From dataclasses that hold settings to the options of a command, and back: a setting has one name, default and help.

A parameter of a command that is annotated ``Annotated[Settings, Fields(...)]`` stands for one option a field of the class.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from sparsepass._docs import attribute_docs

_PLAIN: Final = (int, float, Path)
"""Types that the command line reads by itself; all else is text that the settings read."""


@dataclass(frozen=True)
class Fields:
    """How the fields of a settings class stand on the command line.

    Attributes:
        flags: Field -> its flag, where that is not its name; a word in capitals makes it an argument.
        left_out: Fields that the command does not take.
        defaults: Field -> the command's own default; ``...`` if it has to be given.
        help: Field -> the command's own help.
        repeated: Fields whose option may be given several times: one value stands alone, several are a tuple.
    """

    flags: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its settings, and call it with the settings that were given."""
    groups: dict[str, tuple[type, dict[str, Parameter], bool, Fields]] = {}
    own: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        found = _settings_of(parameter.annotation)
        if found is None:
            own.append(parameter)
            continue
        kind, marks, is_optional = found
        made = settings_options(kind, marks, is_needed=not is_optional)
        groups[parameter.name] = (kind, made, is_optional, marks)
        own += made.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (kind, made, is_optional, marks) in groups.items():
            typed = {field: given.pop(each.name) for field, each in made.items()}
            typed |= {field: _one_or_several(typed[field]) for field in marks.repeated}
            _check_not_in_vain(made, typed)
            values = read_back(kind, typed)
            is_left_out = is_optional and next(iter(values.values())) is None
            given[name] = None if is_left_out else kind(**values)
        command(**given)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own]
    )
    return run


def _one_or_several(values: list[str] | None) -> Any:
    """None for no value, one by itself, several as a tuple."""
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def _check_not_in_vain(made: Mapping[str, Parameter], typed: Mapping[str, Any]) -> None:
    """Raise where settings are given of something that is not: the first field, such as a text, tells what they are of.

    Raises:
        SparsepassError: If the first field was left out, and others were not.
    """
    first, *others = typed
    vain = [field for field in others if typed[field] != made[field].default]
    if typed[first] is None and vain:
        from sparsepass.graph.support import SparsepassError

        raise SparsepassError(
            f"{', '.join(flag_of(made[field]) for field in vain)} would change nothing, because {flag_of(made[first])} was not "
            f"given; give it too, or leave {'that' if len(vain) == 1 else 'them'} out"
        )


def flag_of(parameter: Parameter) -> str:
    """What an option is called on the command line: its first long name; an argument by the name that help shows."""
    for mark in getattr(parameter.annotation, "__metadata__", ()):
        # In an annotation the first name stands where a default would.
        for name in (getattr(mark, "default", None), *(getattr(mark, "param_decls", None) or ())):
            if isinstance(name, str) and name.startswith("--"):
                return name.partition("/")[0]
        if isinstance(mark, typer.models.OptionInfo):
            return f"--{parameter.name.replace('_', '-')}"
    return parameter.name.upper()


def settings_options(kind: type, marks: Fields, *, is_needed: bool) -> dict[str, Parameter]:
    """The options of a settings class: field -> a parameter that typer reads.

    Args:
        kind: The settings class.
        marks: How the command has it.
        is_needed: Whether fields without a default have to be given.
    """
    hints, docs = typing.get_type_hints(kind), attribute_docs(kind)
    found = {}
    for each in fields(kind):
        if each.name not in marks.left_out:
            default = ... if each.default is MISSING and is_needed else None if each.default is MISSING else each.default
            found[each.name] = option(
                f"{kind.__name__.lower()}_{each.name}",
                tuple[str, ...] if each.name in marks.repeated else hints[each.name],
                flag=marks.flags.get(each.name) or f"--{each.name.replace('_', '-')}",
                help=marks.help.get(each.name) or docs.get(each.name, ""),
                default=marks.defaults.get(each.name, default),
            )
    return found


def option(name: str, hint: Any, *, flag: str, help: str, default: Any) -> Parameter:
    """One option, as a parameter that typer reads.

    Args:
        name: Of the parameter; an argument's is its flag in small letters.
        hint: Type of the field that it fills. A switch that is on by default becomes ``--no-x``.
        flag: Its name on the command line; a word without hyphens makes it an argument.
        help: What ``--help`` says of it.
        default: ``...`` if it has to be given.
    """
    annotation = read_as(hint)
    if annotation is bool:
        flag, default = (f"--no-{flag[2:]}", False) if default else (flag, False)
    elif annotation == bool | None:
        flag = f"{flag}/--no-{flag[2:]}"
    elif default is None:
        annotation = annotation | None
    text = help.replace("`", "")
    made: Any
    if flag.startswith("-"):
        made = typer.Option(flag, help=text, show_default=default is not None)
    else:
        made, name = typer.Argument(metavar=flag, help=text, show_default=False), flag.lower()
    given = Parameter.empty if default is ... else default
    return Parameter(name, Parameter.KEYWORD_ONLY, default=given, annotation=Annotated[annotation, made])


def read_back(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the fields hold them: a switch ``--no-x`` was read as its opposite, and several values as a list."""
    switched_on = {each.name for each in fields(kind) if each.default is True}
    return {
        name: not value if name in switched_on else tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
    }


def read_as(hint: Any) -> Any:
    """The type as which the command line reads a field of some type."""
    if hint in (bool, bool | None):
        return hint
    if typing.get_origin(hint) is tuple:
        return list[read_as(typing.get_args(hint)[0])]  # type: ignore[misc]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    return next((found for found in kinds if found in _PLAIN or typing.get_origin(found) is Literal), str)


def _settings_of(annotation: Any) -> tuple[type, Fields, bool] | None:
    """The settings class of a parameter, how it stands there, and whether it may be left out; None for a plain option."""
    marks = next((mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Fields)), None)
    if marks is None:
        return None
    kinds = typing.get_args(annotation.__origin__)
    return (kinds[0], marks, True) if kinds else (annotation.__origin__, marks, False)
