"""The command `sparsepass export`, which is also `sparse-export`; each target adds its own options to it."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepass.export.cli import support, target_options


def export(
    model: support.Model,
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
    passes: Annotated[
        str | None,
        typer.Option(
            "--passes",
            help="Passes in order, as text; 'none' for none. By default nm_sparsify, and none for a saved program.",
            show_default=False,
        ),
    ] = None,
    calibration: support.CalibrationData = None,
    num_sequences: support.NumSequences = 128,
    context: support.Context = None,
    batch_size: support.BatchSize = 8,
    seed: support.Seed = 0,
    compute: support.ComputeOption = support.Compute.auto,
    eval_text: support.EvalText = None,
    eval_context: support.EvalContext = 512,
    max_tokens: support.MaxTokens = None,
    force: support.Force = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open and check what was written.")] = False,
    no_validate: support.NoValidate = False,
    gguf_file: support.GgufFile = None,
    revision: support.Revision = None,
    trust_remote_code: support.TrustRemoteCode = False,
    **options: Any,
) -> None:
    """Apply passes to MODEL, write it as ONNX, TensorRT engines or a Hugging Face folder, open it, and verify it.

    Beside the artifact stand recipe.txt, samples (inputs and outputs) and the report (json, html, md).

    Exit code: 0 verification held (or was switched off), 1 it did not, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.stages import export as write

    chosen = target_options.chosen(target, options)
    if passes is None:
        passes = "none" if _is_program(model) else support.DEFAULT_PASSES
    result = write(
        model,
        chosen,
        out,
        passes=None if support.no_passes(passes) else passes,
        calibration=support.calibration_of(calibration, num_sequences, context, batch_size, seed, compute),
        evaluation=support.evaluation_of(eval_text, eval_context, max_tokens),
        force=force,
        verify=not no_verify,
        validate=not no_validate,
        gguf_file=gguf_file,
        revision=revision,
        trust_remote_code=trust_remote_code,
        command=support.command_line(),
        tell=support.news(),
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
