"""The command `sparsepass export`, which is also `sparse-export`; each target adds its own options to it."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsepass._docs import attribute_docs
from sparsepass.export.cli import support
from sparsepass.export.cli.options import Fields, option
from sparsepass.export.cli.output import complain, say
from sparsepass.export.stages import ModelSource
from sparsepass.export.targets import TARGETS, targets_table

if TYPE_CHECKING:
    from sparsepass.export.targets import Target


def _export(
    model: Annotated[ModelSource, Fields(flags={"source": "MODEL"}, left_out=("dtype", "task"))],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            help=f"What to write: {', '.join(TARGETS)}; options may stand with it: 'onnx{{opset=18}}'.",
            show_default=False,
        ),
    ],
    out: support.Out,
    *,
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            help="Passes in order, as text; 'none' for none. By default nm_sparsify, and none for a saved program.",
            show_default=False,
        ),
    ] = None,
    calibration: support.CalibrationOptions,
    evaluation: support.EvaluationOptions,
    device: support.Device = "auto",
    force: support.Force = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open and check what was written.")] = False,
    no_validate: support.NoValidate = False,
    allow_unchecked: support.AllowUnchecked = False,
    as_json: support.AsJson = False,
    **options: Any,
) -> None:
    """Apply passes to MODEL, write it in the form of a target, open what was written, and verify it.

    Beside the artifact stand recipe.txt, samples (inputs and outputs) and the report (json, html, md).

    Exit code: 0 verification held (or was switched off), 1 it did not, 2 wrong usage or unreadable input, 3 a part could not
    be checked here (0 with --allow-unchecked).
    """
    from sparsepass.export.stages import export as write

    chosen = chosen_target(target, options)
    if passes is None:
        passes = "none" if _is_program(model.source) else support.DEFAULT_PASSES
    result = write(
        model,
        chosen,
        out,
        passes=None if support.no_passes(passes) else passes,
        calibration=calibration,
        evaluation=evaluation,
        device=device,
        force=force,
        verify=not no_verify,
        validate=not no_validate,
        command=support.command_line(),
    )
    code = support.code_of(() if no_verify else (result.state,), allow_unchecked=allow_unchecked)
    more = {"state": result.state, "failures": result.failures, "unchecked": result.unchecked}
    support.show_report("export", result.report, out, as_json=as_json, exit_code=code, **more)
    for failure in result.failures:
        complain(failure)
    for line in result.unchecked:
        say(line, lead="Not checked: ")
    support.finish(code)


def export_command() -> Callable[..., None]:
    """The command, with an option for each option of each target."""

    def command(*args: Any, **kwargs: Any) -> None:
        _export(*args, **kwargs)

    own = list(inspect.signature(_export).parameters.values())[:-1]
    command.__doc__ = _export.__doc__
    command.__signature__ = inspect.Signature([*own, *target_options()])  # type: ignore[attr-defined]
    return support.clean(command)


def target_options() -> list[Parameter]:
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


def chosen_target(text: str, given: Mapping[str, Any]) -> "Target":
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


def _is_program(model: str) -> bool:
    from sparsepass.graph.saved import PROGRAM_FILE

    return (Path(model).expanduser() / PROGRAM_FILE).is_file()
