"""The command `size`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import print_json, show
from sparsepass.export.cli.report import AddTo, add_to, check_report


def size_command(
    model: support.ModelWithoutWeights,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files and folders that hold the model's weights in any form, to be measured.", show_default=False),
    ] = None,
    pattern: Annotated[str, typer.Option("--pattern", help="N:M of the sparse forms.")] = "2:4",
    group_size: Annotated[
        int, typer.Option("--group-size", help="Input features that share a scale of int8 and int4; 0 for one a row.")
    ] = 64,
    slorb: Annotated[int, typer.Option("--slorb", help="Count SLoRB branches of this k, too; 0 for none.")] = 0,
    projection: Annotated[str, typer.Option("--projection", help="Of the SLoRB branches: fixed or trainable.")] = "fixed",
    gguf_file: support.GgufFile = None,
    report: AddTo = None,
    as_json: support.AsJson = False,
) -> None:
    """Count what MODEL takes: dense, 2:4, in int8 and int4, with everything that belongs to it; and measure FILES beside it.

    Values, places of the kept ones, scales, SLoRB branches, embedding and head, and all else are columns of their own. They are
    counted from the shapes of the tensors: a configuration is enough. A folder whose configuration states a form is set
    against what that form promises.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    import time

    from sparsepass.export.plan import sizes
    from sparsepass.export.report import plain_json

    check_report(report)
    started = time.perf_counter()
    found = sizes(
        model,
        files or (),
        pattern=pattern,
        group_size=group_size,
        slorb_k=slorb,
        projection=support.projection(projection),
        gguf_file=gguf_file,
    )
    if as_json:
        print_json("size", plain_json(found))
    else:
        from sparsepass.export.cli.show import size_tables

        show(size_tables(found))
    add_to(report, "size", {"size": found}, started)
