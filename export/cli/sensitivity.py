"""The command `sensitivity`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sparsepass.export.cli import support

if TYPE_CHECKING:
    from sparsepass.export.stages import Sensitivity


class UnitOption(StrEnum):
    """What is pruned at a time."""

    layer = "layer"
    block = "block"


class LossOption(StrEnum):
    """What is measured."""

    kl = "kl"
    layer_error = "layer-error"


def sensitivity_command(
    model: support.DenseModel,
    calibration: support.CalibrationNeeded,
    budget: Annotated[
        float, typer.Option("--budget", help="Share of the bytes saved that may be given up for accuracy.")
    ] = 0.05,
    unit: Annotated[UnitOption, typer.Option("--unit", help="Prune one layer or one block at a time.")] = UnitOption.layer,
    loss: Annotated[
        LossOption,
        typer.Option("--loss", help="Rank by the divergence of the logits (kl), or by the layers' own errors: much cheaper."),
    ] = LossOption.kl,
    criterion: Annotated[str | None, typer.Option("--criterion", help="Of the pruning; by default sparsegpt.")] = None,
    pattern: support.Pattern = "2:4",
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Leave these layers alone in any case. May be repeated.")
    ] = None,
    num_sequences: support.NumSequences = 32,
    loss_sequences: Annotated[
        int, typer.Option("--loss-sequences", min=1, help="The first so many of them are what the divergence is measured on.")
    ] = 4,
    context: support.Context = None,
    seed: support.Seed = 0,
    compute: support.ComputeOption = support.Compute.auto,
    dtype: support.Dtype = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of the table that are shown.")] = 20,
    gguf_file: support.GgufFile = None,
    revision: support.Revision = None,
    as_json: support.AsJson = False,
) -> None:
    """Measure which layers of MODEL suffer most from pruning for each byte that it saves, and list those to leave dense.

    All layers are pruned once; then each is put into the dense model alone. The list is printed as text for `--passes`.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    import json

    from sparsepass.export.stages import PYTHON_DOCS, auto_ignore
    from sparsepass.graph.load import load_model, parse_dtype
    from sparsepass.passes.data import default_text

    loaded = load_model(model, dtype=None if dtype is None else parse_dtype(dtype), gguf_file=gguf_file, revision=revision)
    found = auto_ignore(
        loaded.model,
        default_text("calibration") if calibration == PYTHON_DOCS else calibration,
        budget=budget,
        unit=unit.value,
        loss=loss.value,
        criterion=criterion,
        pattern=pattern,
        ignore=ignore or (),
        tokenizer=loaded.tokenizer,
        num_sequences=num_sequences,
        loss_sequences=loss_sequences,
        context=context,
        seed=seed,
        compute=compute.value,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
        return
    _show(found, top)


def _show(found: "Sensitivity", top: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    what = "KL, nats a token" if found.loss == "kl" else "squared relative error"
    table = Table(title=f"Sensitivity, one {found.unit} at a time", title_justify="left", show_edge=False)
    table.add_column(found.unit, overflow="fold")
    for heading in (what, "saved MB", "loss for each MB"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in found.rows[:top]:
        mark = "leave dense" if row.is_kept_dense else ""
        table.add_row(escape(row.name), f"{row.loss:.4g}", f"{row.saved_bytes / 1e6:.2f}", f"{row.loss_per_mb:.4g}", mark)
    console = support.stdout()
    console.print(table)
    if len(found.rows) > top:
        console.print(f"and {len(found.rows) - top} more; --top or --json shows them")
    dense = sum(row.is_kept_dense for row in found.rows)
    share = f"{found.given_up:.1%} of what 2:4 saves" if dense else "nothing: no row fits the budget"
    console.print(f"{dense} of {len(found.rows)} to leave dense, which gives up {share}.", highlight=False)
    console.print(f"--passes '{found.text}'", highlight=False, markup=False)
