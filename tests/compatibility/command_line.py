"""The command line by its entry points alone, so that nothing here depends on where the code of a command lies."""

import importlib
import io
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer.core

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).with_name("fixtures")


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    output: str
    errors: str


def run(*arguments: object, script: str = "sparsepass") -> Done:
    """Run a command in this process."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr("sys.argv", [script, *map(str, arguments)])
        patch.setenv("COLUMNS", "400")
        try:
            _entry(script)()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Done(code=code, output=output.getvalue(), errors=errors.getvalue())


def commands() -> dict[str, dict[str, dict[str, Any]]]:
    """Each command with its options and arguments: name -> what it is, and its default."""
    found = {}
    for script in ("sparsepass", "sparse-export"):
        top = _command(script)
        for name, command in {"": top, **getattr(top, "commands", {})}.items():
            found[f"{script} {name}".strip()] = dict(_parameters(command))
    return found


def _parameters(command: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        kind: Any = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
        about = {
            "default": repr(getattr(parameter.default, "value", parameter.default)),
            "required": parameter.required,
            "is_flag": bool(getattr(parameter, "is_flag", False)),
            "multiple": bool(getattr(parameter, "multiple", False)),
            "choices": _choices(kind),
        }
        for name in (*parameter.opts, *parameter.secondary_opts) if is_option else (f"ARGUMENT {parameter.name}",):
            yield name, about


def _choices(kind: Any) -> list[str] | None:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    members: dict[str, Enum] = getattr(kind, "__members__", {})
    return [str(member.value) for member in members.values()] or None


def _command(script: str) -> Any:
    """What an entry point runs: caught before it does anything."""
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (typer.core.TyperGroup, typer.core.TyperCommand):
            patch.setattr(kind, "main", lambda command, *_, **__: found.append(command))
        patch.setattr("sys.argv", [script])
        _entry(script)()
    return found[0]


def _entry(script: str) -> Callable[[], None]:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, name = scripts[script].partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
