"""The command `sensitivity`."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.options import Fields
from sparsepass.export.cli.output import NAME_WIDTH, print_json, show, stdout
from sparsepass.export.stages import Calibration

if TYPE_CHECKING:
    from sparsepass.export.stages import Sensitivity


def sensitivity_command(
    model: support.DenseModel,
    *,
    calibration: Annotated[
        Calibration,
        Fields(
            flags={"data": "--calibration"},
            left_out=("batch_size",),
            defaults={"data": ..., "num_sequences": 32},
            help=support.DATA,
            repeated=("data",),
        ),
    ],
    budget: Annotated[
        float, typer.Option("--budget", help="Share of the bytes saved that may be given up for accuracy.")
    ] = 0.05,
    unit: Annotated[
        Literal["layer", "block"], typer.Option("--unit", help="Prune one layer or one block at a time.")
    ] = "layer",
    loss: Annotated[
        Literal["kl", "layer-error"],
        typer.Option("--loss", help="Rank by the divergence of the logits (kl), or by the layers' own errors: much cheaper."),
    ] = "kl",
    criterion: Annotated[str | None, typer.Option("--criterion", help="Of the pruning; by default sparsegpt.")] = None,
    pattern: support.Pattern = "2:4",
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Leave these layers alone in any case. May be repeated.")
    ] = None,
    loss_sequences: Annotated[
        int, typer.Option("--loss-sequences", min=1, help="The first so many of them are what the divergence is measured on.")
    ] = 4,
    device: support.Device = "auto",
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of the table that are shown.")] = 20,
    as_json: support.AsJson = False,
) -> None:
    """Measure which layers of MODEL suffer most from pruning for each byte that it saves, and list those to leave dense.

    All layers are pruned once; then each is put into the dense model alone. The list is printed as text for `--passes`.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.stages import auto_ignore, sensitivity_pass
    from sparsepass.graph.support import find_device

    calibration.check()
    sensitivity_pass(budget, pattern=pattern, criterion=criterion, ignore=ignore or ())
    place = find_device(device)
    loaded = model.load()
    keywords = calibration.keywords()
    del keywords["batch_size"]
    found = auto_ignore(
        loaded.model,
        budget=budget,
        unit=unit,
        loss=loss,
        criterion=criterion,
        pattern=pattern,
        ignore=ignore or (),
        tokenizer=loaded.tokenizer,
        loss_sequences=loss_sequences,
        device=place,
        **keywords,
    )
    if as_json:
        print_json("sensitivity", found.to_dict())
        return
    _show(found, top)


def _show(found: "Sensitivity", top: int) -> None:
    from rich.table import Table

    what = "KL, nats a token" if found.loss == "kl" else "squared relative error"
    title = f"Sensitivity, one {found.unit} at a time: loss is {what}"
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column(found.unit, overflow="fold", min_width=min(max(len(row.name) for row in found.rows[:top]), NAME_WIDTH))
    for heading in ("loss", "saved MB", "loss for each MB"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in found.rows[:top]:
        mark = "leave dense" if row.is_kept_dense else ""
        table.add_row(row.name, f"{row.loss:.4g}", f"{row.saved_bytes / 1e6:.2f}", f"{row.loss_per_mb:.4g}", mark)
    show(table)
    console = stdout()
    if len(found.rows) > top:
        console.print(f"and {len(found.rows) - top} more; --top or --json shows them")
    dense = sum(row.is_kept_dense for row in found.rows)
    share = f"{found.given_up:.1%} of what 2:4 saves" if dense else "nothing: no row fits the budget"
    console.print(f"{dense} of {len(found.rows)} to leave dense, which gives up {share}.", highlight=False)
    console.print(f"--passes '{found.text}'", highlight=False, markup=False)
