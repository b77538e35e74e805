"""The command `sparsepass export`, which is also `sparse-export`; each target adds its own options to it."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepass.export.cli import support, target_options
from sparsepass.export.cli.options import Fields
from sparsepass.export.stages import ModelSource


def export(
    model: Annotated[ModelSource, Fields(flags={"source": "MODEL"}, left_out=("dtype", "task"))],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            help="What to write: onnx, hf, tensorrt or torch; options may stand with it: 'onnx{opset=18}'.",
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
    force: support.Force = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open and check what was written.")] = False,
    no_validate: support.NoValidate = False,
    **options: Any,
) -> None:
    """Apply passes to MODEL, write it as ONNX, TensorRT engines or a Hugging Face folder, open it, and verify it.

    Beside the artifact stand recipe.txt, samples (inputs and outputs) and the report (json, html, md).

    Exit code: 0 verification held (or was switched off), 1 it did not, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.stages import export as write

    chosen = target_options.chosen(target, options)
    if passes is None:
        passes = "none" if _is_program(model.source) else support.DEFAULT_PASSES
    result = write(
        model,
        chosen,
        out,
        passes=None if support.no_passes(passes) else passes,
        calibration=calibration,
        evaluation=evaluation,
        force=force,
        verify=not no_verify,
        validate=not no_validate,
        command=support.command_line(),
    )
    support.show_report(result.report, out)
    for failure in result.failures:
        support.complain(failure)
    support.finish(result.held is not False)


def export_command() -> Callable[..., None]:
    """The command, with an option for each option of each target."""

    def command(*args: Any, **kwargs: Any) -> None:
        export(*args, **kwargs)

    own = list(inspect.signature(export).parameters.values())[:-1]
    command.__doc__ = export.__doc__
    command.__signature__ = inspect.Signature([*own, *target_options.parameters()])  # type: ignore[attr-defined]
    return support.clean(command)


def _is_program(model: str) -> bool:
    from sparsepass.graph.saved import PROGRAM_FILE

    return (Path(model).expanduser() / PROGRAM_FILE).is_file()
