"""The command line: `sparsepass`, and `sparse-export`, which is `sparsepass export`."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.bench import bench_command
from sparsepass.export.cli.channels import channels_command
from sparsepass.export.cli.check import compare_command, eval_command
from sparsepass.export.cli.criteria import OldJson, criteria_command
from sparsepass.export.cli.export import export_command
from sparsepass.export.cli.masks import masks_command
from sparsepass.export.cli.output import complain
from sparsepass.export.cli.plan import plan_command
from sparsepass.export.cli.report import report_command
from sparsepass.export.cli.retrain import retrain_command, run_command
from sparsepass.export.cli.sample import sample_command
from sparsepass.export.cli.sensitivity import sensitivity_command
from sparsepass.export.cli.size import size_command
from sparsepass.export.cli.unpack import unpack_command
from sparsepass.export.cli.verify import verify_command

app = typer.Typer(
    name="sparsepass",
    help="N:M (2:4) sparsity for transformers: prune, retrain, export, and check what was kept.",
    no_args_is_help=True,
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
    model: support.Model,
    out: support.Out,
    *,
    passes: support.Passes = support.DEFAULT_PASSES,
    calibration: support.CalibrationOptions,
    evaluation: support.EvaluationOptions,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", help="Rewrite only these layers: name, glob, 're:...' or class. May be repeated."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Leave these layers alone. Same patterns. May be repeated.")
    ] = None,
    device: support.Device = "auto",
    force: support.Force = False,
    no_validate: support.NoValidate = False,
    as_json: support.AsJson = False,
) -> None:
    """Rewrite the linear layers of MODEL with passes, and save the program with its report.

    The folder holds the program (masks beside the weights), the tokenizer, recipe.txt and the report (json, html, md). It
    can be given as MODEL to `export`, `eval`, `compare` and `verify`.
    """
    from sparsepass.export.stages import inputs_of, prepare, write_program
    from sparsepass.graph.support import check_free, find_device
    from sparsepass.passes import parse_pipeline

    pipeline = tuple(
        replace(item, targets=(*item.targets, *(targets or ())), ignore=(*item.ignore, *(ignore or ())))
        for item in parse_pipeline(passes)
    )
    check_free(out, force=force, inputs=inputs_of(model, calibration, evaluation, pipeline))
    prepared = prepare(
        model,
        passes=pipeline,
        calibration=calibration,
        evaluation=evaluation,
        validate=not no_validate,
        device=find_device(device),
    )
    document = write_program(prepared, out, command=support.command_line(), force=force)
    support.show_report("prune", document, out, as_json=as_json)


_export_command = export_command()
_EXPORT_SHORT = "Rewrite, write as ONNX, TensorRT or Hugging Face folder, and verify."
app.command("plan", short_help="What would 2:4 gain on a GPU, and where?")(support.clean(plan_command))
app.command("retrain", short_help="Train a pruned program against its dense teacher.")(support.clean(retrain_command))
app.command("sample", short_help="Let a model write training text itself.")(support.clean(sample_command))
app.command("run", short_help="Take a model through a recipe: prune, retrain, eval, export.")(support.clean(run_command))
app.command("export", short_help=_EXPORT_SHORT)(_export_command)
app.command("eval", short_help="Measure perplexity, or run lm-eval tasks.")(support.clean(eval_command))
app.command("bench", short_help="How fast is a model, and how large?")(support.clean(bench_command))
app.command("size", short_help="What does a model take, in each form?")(support.clean(size_command))
app.command("compare", short_help="Do two models compute the same function?")(support.clean(compare_command))
app.command("verify", short_help="Does a file or folder hold the N:M pattern?")(support.clean(verify_command))
app.command("unpack", short_help="Write the plain folder of a packed one.")(support.clean(unpack_command))
app.command("channels", short_help="Where do channels come from, and what can be done to them?")(
    support.clean(channels_command)
)
app.command("masks", short_help="Write, show or compare masks apart from the weights.")(support.clean(masks_command))
_CRITERIA_SHORT = "Compare pruning criteria on a model, on one calibration."
app.command("criteria", cls=OldJson, short_help=_CRITERIA_SHORT)(support.clean(criteria_command))
app.command("sensitivity", short_help="Which layers should stay dense?")(support.clean(sensitivity_command))
app.command("report", short_help="Show a report, and render its pages anew.")(support.clean(report_command))

export_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
export_app.command()(_export_command)


def main() -> None:
    """Run `sparsepass`."""
    _run(app, "sparsepass")


def sparse_export() -> None:
    """Run `sparse-export`."""
    _run(export_app, "sparse-export")


def _run(command: typer.Typer, name: str) -> None:
    support.quiet_bars()
    try:
        command(prog_name=name)
    except KeyboardInterrupt:  # while options were still read; see support.clean for the rest
        complain("interrupted")
        sys.exit(support.INTERRUPTED)
