"""The command line: `sparsepass`, and `sparse-export`, which is `sparsepass export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsepass.export.cli import semi_structured as torch, support, tensorrt
from sparsepass.export.cli.check import compare_command, eval_command
from sparsepass.export.cli.criteria import criteria_command
from sparsepass.export.cli.masks import masks_command
from sparsepass.export.cli.plan import plan_command
from sparsepass.export.cli.report import report_command
from sparsepass.export.cli.retrain import retrain_command, run_command
from sparsepass.export.cli.sample import sample_command
from sparsepass.export.cli.sensitivity import sensitivity_command
from sparsepass.export.cli.verify import verify_command

if TYPE_CHECKING:
    from sparsepass.export.stages import Calibration, Evaluation
    from sparsepass.passes import Pass

_MODEL_HELP = "Folder, hub id, .gguf file, or folder written by `sparsepass prune`."
_DEFAULT_PASSES = "nm_sparsify"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]

app = typer.Typer(
    name="sparsepass",
    help="N:M (2:4) sparsity for transformers: prune, retrain, export, and check what was kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        typer.echo(f"sparsepass {version('sparsepass')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    del version


@app.command("prune", short_help="Rewrite a model with passes and save the program.")
@support.clean
def prune_command(
    model: Model,
    out: Out,
    passes: support.Passes = _DEFAULT_PASSES,
    calibration: support.CalibrationData = None,
    num_sequences: support.NumSequences = 128,
    context: support.Context = None,
    batch_size: support.BatchSize = 8,
    seed: support.Seed = 0,
    compute: support.ComputeOption = support.Compute.auto,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", help="Rewrite only these layers: name, glob, 're:...' or class. May be repeated."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Leave these layers alone. Same patterns. May be repeated.")
    ] = None,
    dtype: support.Dtype = None,
    task: support.Task = None,
    eval_text: support.EvalText = None,
    eval_context: support.EvalContext = 512,
    max_tokens: support.MaxTokens = None,
    force: support.Force = False,
    no_validate: support.NoValidate = False,
    gguf_file: support.GgufFile = None,
    revision: support.Revision = None,
    trust_remote_code: support.TrustRemoteCode = False,
) -> None:
    """Rewrite the linear layers of MODEL with passes, and save the program with its report.

    The folder holds the program (masks beside the weights), the tokenizer, recipe.txt and the report (json, html, md). It
    can be given as MODEL to `export`, `eval`, `compare` and `verify`.
    """
    from sparsepass.export.stages import prepare, write_program
    from sparsepass.graph.support import check_free

    pipeline = _pipeline(passes, targets or (), ignore or ())
    check_free(out, force=force)
    prepared = prepare(
        model,
        passes=pipeline,
        calibration=_calibration(calibration, num_sequences, context, batch_size, seed, compute),
        evaluation=_evaluation(eval_text, eval_context, max_tokens),
        dtype=dtype,
        task=task,
        gguf_file=gguf_file,
        revision=revision,
        trust_remote_code=trust_remote_code,
        validate=not no_validate,
        tell=support.news(),
    )
    _show(write_program(prepared, out, command=support.command_line(), force=force), out)


def export_command(
    model: Model,
    target: Annotated[
        str, typer.Option("--target", "-t", help="What to write: onnx, hf, tensorrt or torch.", show_default=False)
    ],
    out: Out,
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
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Write the weights as float32, bfloat16 or float16; by default as they are."),
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="ONNX operator set; by default the newest that is tried.")
    ] = None,
    task: support.Task = None,
    runtime: tensorrt.Runtime = None,
    sm: tensorrt.Sm = None,
    profile: tensorrt.Profile = None,
    timeout: tensorrt.Timeout = None,
    timing_cache: tensorrt.TimingCache = None,
    hardware_compatible: tensorrt.HardwareCompatible = False,
    one_engine: tensorrt.OneEngine = False,
    no_sparse: tensorrt.NoSparse = False,
    no_measure: tensorrt.NoMeasure = False,
    timings: torch.Timings = None,
    measure_shapes: torch.MeasureShapes = None,
    compiled: torch.Compiled = False,
    sparse_only: torch.SparseOnly = False,
    eval_text: support.EvalText = None,
    eval_context: support.EvalContext = 512,
    max_tokens: support.MaxTokens = None,
    force: support.Force = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open and check what was written.")] = False,
    no_validate: support.NoValidate = False,
    gguf_file: support.GgufFile = None,
    revision: support.Revision = None,
    trust_remote_code: support.TrustRemoteCode = False,
) -> None:
    """Apply passes to MODEL, write it as ONNX, TensorRT engines or a Hugging Face folder, open it, and verify it.

    Beside the artifact stand recipe.txt, samples (inputs and outputs) and the report (json, html, md).

    Exit code: 0 verification held (or was switched off), 1 it did not, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.stages import export

    if passes is None:
        pipeline = () if _is_program(model) else _pipeline(_DEFAULT_PASSES)
    else:
        pipeline = () if support.no_passes(passes) else _pipeline(passes)
    result = export(
        model,
        target,
        out,
        passes=pipeline or None,
        calibration=_calibration(calibration, num_sequences, context, batch_size, seed, compute),
        evaluation=_evaluation(eval_text, eval_context, max_tokens),
        dtype=dtype,
        opset=opset,
        task=task,
        engine=tensorrt.engine_options(
            runtime=runtime,
            sm=sm,
            profiles=profile,
            timeout_s=timeout,
            timing_cache=timing_cache,
            hardware_compatible=hardware_compatible,
            one_engine=one_engine,
            sparse=not no_sparse,
            measure=not no_measure or target == "torch",
        ),
        semi_structured=torch.semi_structured_options(
            timings=timings,
            shapes=measure_shapes,
            compiled=compiled,
            sparse_only=sparse_only,
            measure=not no_measure or target != "torch",
        ),
        force=force,
        verify=not no_verify,
        validate=not no_validate,
        gguf_file=gguf_file,
        revision=revision,
        trust_remote_code=trust_remote_code,
        command=support.command_line(),
        tell=support.news(),
    )
    _show(result.report, out)
    for failure in result.failures:
        support.complain(failure)
    support.finish(result.held is not False)


_EXPORT_SHORT = "Rewrite, write as ONNX, TensorRT or Hugging Face folder, and verify."
app.command("plan", short_help="What would 2:4 gain on a GPU, and where?")(support.clean(plan_command))
app.command("retrain", short_help="Train a pruned program against its dense teacher.")(support.clean(retrain_command))
app.command("sample", short_help="Let a model write training text itself.")(support.clean(sample_command))
app.command("run", short_help="Take a model through a recipe: prune, retrain, eval, export.")(support.clean(run_command))
app.command("export", short_help=_EXPORT_SHORT)(support.clean(export_command))
app.command("eval", short_help="Measure perplexity, or run lm-eval tasks.")(support.clean(eval_command))
app.command("compare", short_help="Do two models compute the same function?")(support.clean(compare_command))
app.command("verify", short_help="Does a file or folder hold the N:M pattern?")(support.clean(verify_command))
app.command("masks", short_help="Write, show or compare masks apart from the weights.")(support.clean(masks_command))
app.command("criteria", short_help="Compare pruning criteria on a model, on one calibration.")(support.clean(criteria_command))
app.command("sensitivity", short_help="Which layers should stay dense?")(support.clean(sensitivity_command))
app.command("report", short_help="Show a report, and render its pages anew.")(support.clean(report_command))

export_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
export_app.command()(support.clean(export_command))


def main() -> None:
    """Run `sparsepass`."""
    support.quiet_bars()
    app(prog_name="sparsepass")


def sparse_export() -> None:
    """Run `sparse-export`."""
    support.quiet_bars()
    export_app(prog_name="sparse-export")


def _pipeline(
    text: str, targets: "list[str] | tuple[str, ...]" = (), ignore: "list[str] | tuple[str, ...]" = ()
) -> "tuple[Pass, ...]":
    from dataclasses import replace

    from sparsepass.passes import parse_pipeline

    pipeline = parse_pipeline(text)
    return tuple(
        replace(item, targets=(*item.targets, *targets), ignore=(*item.ignore, *ignore)) if targets or ignore else item
        for item in pipeline
    )


def _calibration(
    data: str | None, num_sequences: int, context: int | None, batch_size: int, seed: int, compute: support.Compute
) -> "Calibration":
    from sparsepass.export.stages import Calibration

    return Calibration(
        data=data,
        num_sequences=num_sequences,
        context=context,
        batch_size=batch_size,
        seed=seed,
        compute=compute.value,
    )


def _evaluation(text: str | None, context: int, max_tokens: int | None) -> "Evaluation | None":
    from sparsepass.export.stages import Evaluation

    return None if text is None else Evaluation(text=text, context=context, max_tokens=max_tokens)


def _is_program(model: str) -> bool:
    from sparsepass.graph.program import PROGRAM_FILE

    return (Path(model).expanduser() / PROGRAM_FILE).is_file()


def _show(document: Any, out: Path) -> None:
    from sparsepass.export.cli.show import summary

    support.stdout().print(summary(document, str(out)))
