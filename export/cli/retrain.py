"""The commands that train: `retrain`, and `run`, which takes a recipe from the model to the verified export."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import complain, print_json, print_text, say, show, stdout

if TYPE_CHECKING:
    from sparsepass.export.stages import Outcome, RetrainSection

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Set one value, such as train.lr=1e-4. May be repeated.", show_default=False
    ),
]


Result = TypeVar("Result")


def retrain_command(
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="Folder written by `sparsepass prune`.", show_default=False)
    ],
    out: support.Out,
    *,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="YAML file with train: and data:, or a recipe (a file, or the name of one that comes along), of which the "
            "section retrain is used.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="The dense model to learn from: folder, hub id or .gguf file. By default the one that was pruned, as the "
            "program's report names it.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="What to train on: text file (.txt, .jsonl, .parquet), folder, hub data set (name:config:split) or "
            "'python-docs'. May be repeated, for several files.",
            show_default=False,
        ),
    ] = None,
    assignments: Set = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option("--resume", help="auto goes on from the run folder's newest checkpoint; never refuses one."),
    ] = "auto",
    run_folder: Annotated[
        Path | None,
        typer.Option("--run-folder", help="Folder for checkpoints and metrics.jsonl; by default OUT.run.", show_default=False),
    ] = None,
    from_checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--from-checkpoint",
            metavar="FOLDER",
            help="Start from the weights and masks of an earlier run of PROGRAM, with other settings: its run folder, or a "
            "checkpoint in it.",
            show_default=False,
        ),
    ] = None,
    teacher_cache: Annotated[
        str | None,
        typer.Option(
            "--teacher-cache",
            metavar="FOLDER",
            help="Write the teacher's top-k logits there once, and train from them, without the teacher in memory.",
            show_default=False,
        ),
    ] = None,
    cache_only: Annotated[bool, typer.Option("--cache-only", help="Write the teacher's logits, and do not train.")] = False,
    evaluation: support.EvaluationOptions,
    device: support.TrainingDevice = "auto",
    force: support.Force = False,
    trust_remote_code: support.TrustRemoteCode = False,
    as_json: support.AsJson = False,
) -> None:
    """Train PROGRAM against its dense teacher, with masks that move (AST), and save it with its report and curves.

    Checkpoints lie in a run folder beside OUT; a run that was interrupted goes on when the same command is given again.
    Several processes: accelerate launch --multi_gpu --num_processes 8 -m sparsepass.export.cli retrain ...

    Exit code: 0 done, 2 wrong usage or unreadable input, 130 stopped by a signal; the run was saved.
    """
    from sparsepass.export.stages import default_run_folder, retrain_program, write_cache
    from sparsepass.retrain.run import is_first_process

    section = _section(config, assignments or (), teacher=teacher, data=data or (), teacher_cache=teacher_cache)
    if cache_only:
        place = run_folder or default_run_folder(out)
        count = write_cache(program, section, place, trust_remote_code=trust_remote_code, device=device)
        if as_json:
            print_json("retrain", {"teacher_cache": section.teacher_cache, "num_sequences": count})
        else:
            stdout().print(f"{section.teacher_cache} holds the teacher's logits for the {count} sequences of the run.")
        return
    document = until_stopped(
        lambda: retrain_program(
            program,
            section,
            out,
            run_folder=run_folder,
            resume=resume,
            from_checkpoint=from_checkpoint,
            evaluation=evaluation,
            force=force,
            trust_remote_code=trust_remote_code,
            command=support.command_line(),
            device=device,
        )
    )
    if is_first_process():
        support.show_report("retrain", document, out, as_json=as_json)


def run_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="YAML file, or the name of a recipe that comes along (see --list).", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Instead of the recipe's model.", show_default=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder below which each stage writes its own; by default the recipe's."),
    ] = None,
    assignments: Set = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run stages whose settings have changed anew, and those after them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the whole recipe, say what would run, and stop.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a recipe with comments, to start from.")] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes that come along.")] = False,
    print_recipe: Annotated[bool, typer.Option("--print", help="Print the recipe's file, to start from.")] = False,
    device: support.TrainingDevice = "auto",
    allow_unchecked: support.AllowUnchecked = False,
    trust_remote_code: support.TrustRemoteCode = False,
    as_json: support.AsJson = False,
) -> None:
    """Take a model through a recipe: prune, retrain, eval, export, each in a folder of its own, verified; and measure.

    The whole recipe is checked before anything runs. Given again, it goes on where it stopped: stages that are done are
    not run again, and a training goes on from its checkpoints.

    Exit code: 0 done, and verification held; 1 it did not; 2 wrong usage or unreadable input; 3 a part could not be checked
    here (0 with --allow-unchecked); 130 stopped by a signal.
    """
    from sparsepass.export.stages import example_text, read_recipe_text, recipe_names

    if list_recipes:
        titles = dict(map(_title, recipe_names()))
        _print(as_json, {"recipes": titles}, "\n".join(f"{name}: {title}" for name, title in titles.items()))
        return
    if example:
        _print(as_json, {"recipe": example_text()}, example_text().removesuffix("\n"))
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe, or see --example and --list", param_hint="RECIPE")
    if print_recipe:
        _print(as_json, {"recipe": read_recipe_text(recipe)}, read_recipe_text(recipe).removesuffix("\n"))
        return
    from sparsepass.export.stages import Outcome, planned, read_recipe, run_recipe

    checked = read_recipe(recipe, assignments or (), model=model, out=out)
    if dry_run:
        lines = planned(checked, trust_remote_code=trust_remote_code, device=device)
        _print(as_json, {"planned": lines}, "\n".join(lines))
        return
    found: list[Outcome] = until_stopped(
        lambda: run_recipe(
            checked,
            force=force,
            trust_remote_code=trust_remote_code,
            command=support.command_line(),
            device=device,
        )
    )
    if not found:
        return
    code = support.code_of((outcome.state for outcome in found), allow_unchecked=allow_unchecked)
    if as_json:
        print_json("run", {"stages": [vars(outcome) | {"folder": str(outcome.folder)} for outcome in found]}, exit_code=code)
    else:
        _show_outcomes(found)
    for outcome in found:
        if outcome.state == "did_not_hold":
            complain(f"{outcome.name}: verification did not hold; {outcome.folder / 'report.html'} says what differs")
        if outcome.state == "not_checked":
            say(f"{outcome.name}: not everything could be checked; {outcome.folder / 'report.html'} says what")
    support.finish(code)


def _print(as_json: bool, document: dict[str, Any], text: str) -> None:
    if as_json:
        print_json("run", document)
    else:
        print_text(text)


def until_stopped(train: Callable[[], Result]) -> Result:
    """Train, and turn a run that a signal stopped into its message and exit code 130."""
    from sparsepass.retrain.loop import TrainingStoppedError

    try:
        return train()
    except TrainingStoppedError as stopped:
        complain(str(stopped))
        raise typer.Exit(support.INTERRUPTED) from None


def _title(name: str) -> tuple[str, str]:
    """A recipe's name, and the first sentence of its comment."""
    from sparsepass.export.stages import read_recipe_text

    comment: list[str] = []
    for line in read_recipe_text(name).splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return name, " ".join(comment).split(": ")[0].split(". ")[0]


def _show_outcomes(outcomes: Sequence["Outcome"]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sparsepass.export.cli.show import sections
    from sparsepass.export.report import find_report

    table = Table(title="Stages", title_justify="left", show_edge=False)
    for heading in ("stage", "", "verification", "folder"):
        table.add_column(heading, overflow="fold")
    said = {
        "held": Text("held", "green"),
        "did_not_hold": Text("did NOT hold", "bold red"),
        "not_checked": Text("not checked", "yellow"),
    }
    for outcome in outcomes:
        done = f"{outcome.seconds:.0f} s" if outcome.ran else "done before"
        table.add_row(outcome.name, done, said.get(outcome.state or "", ""), str(outcome.folder))
    if (last := find_report(outcomes[-1].folder)) is not None:
        show(sections(last, "retraining", "accuracy", "size", "speed"))
    show(table)


def _section(
    config: str | None, assignments: Sequence[str], *, teacher: str | None, data: Sequence[str], teacher_cache: str | None
) -> "RetrainSection":
    from sparsepass.export.stages import read_retrain_section

    given: dict[str, Any] = {"teacher": teacher, "teacher_cache": teacher_cache}
    source = None if not data else data[0] if len(data) == 1 else list(data)
    return read_retrain_section(config, assignments, {k: v for k, v in given.items() if v is not None}, source=source)
