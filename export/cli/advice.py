"""Errors speak of what the caller can give. The library names parameters of Python; a command says its options instead."""

import inspect
import re
from collections.abc import Callable
from typing import Any, Final

from sparsepass.export.cli.options import flag_of

_NAMED: Final = re.compile(
    r"""(?<![\w.`'"{-])([a-z][a-z0-9_]*)(=(?:'[^']*'|"[^"]*"|\.\.\.|[\w.:/\[\]{}+-]*[\w\]}]))?(?![\w(=])"""
)

_PYTHON_ONLY: Final = ("dynamic_axes", "example_inputs", "tokenizer")
"""Parameters of Python that no command has an option for, because what they take is an object."""


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """What a command has options for: name in Python -> its option.

    The settings of an evaluation have ``evaluation.`` before their names: others may have settings of the same names.

    Args:
        command: A command whose signature typer reads.
    """
    found: dict[str, str] = {}
    for parameter in inspect.signature(command).parameters.values():
        flag = flag_of(parameter)
        if not flag.startswith("--"):
            continue
        # Settings' parameters are called class_field.
        group, _, field = parameter.name.partition("_")
        names = {parameter.name, field, flag.removeprefix("--").replace("-", "_")} - {""}
        found |= {f"evaluation.{name}" if group == "evaluation" else name: flag for name in names}
    return found


def as_options(text: str, flags: dict[str, str]) -> str:
    """A message with a command's options in place of parameters of Python: ``force=True`` becomes ``--force``.

    A plain word stays; a parameter is one with an underscore or a value. Of parameters that no option stands for, the end
    of the message says so.

    Args:
        text: The message.
        flags: See `flags_of`.

    Example:
        >>> flags = {"force": "--force", "gguf_file": "--gguf-file", "dtype": "--dtype"}
        >>> as_options("use force=True, or choose one with gguf_file and dtype=bfloat16 by force", flags)
        'use --force, or choose one with --gguf-file and --dtype bfloat16 by force'
    """
    left: list[str] = []

    def option(match: re.Match[str]) -> str:
        name, value = match[1], (match[2] or "")[1:]
        if not (value or "_" in name):
            return match[0]
        of_evaluation = flags.get(f"evaluation.{name}") if "evaluation" in text else None
        flag = of_evaluation or flags.get(name)
        if flag is None:
            if name in _PYTHON_ONLY:
                left.append(name)
            return match[0]
        if value in ("", "True", "..."):
            return flag
        if value == "False":
            return flag if flag.startswith("--no-") else f"--no-{flag[2:]}"
        return f"{flag} {value}"

    said = _NAMED.sub(option, text)
    return f"{said}. The command line has no option for {' and '.join(dict.fromkeys(left))}: Python has" if left else said
