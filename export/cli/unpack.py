"""The command `unpack`: the plain folder of a packed one."""

from pathlib import Path
from typing import Annotated

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import print_json, stdout


def unpack_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A folder that `export --target packed` wrote.", show_default=False),
    ],
    out: support.Out,
    force: support.Force = False,
    as_json: support.AsJson = False,
) -> None:
    """Write the plain Hugging Face folder of a packed one: weights with their zeros, for programs that know no packed layers.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    from sparsepass.export.targets.packed import unpack_folder

    done = unpack_folder(folder, out, force=force)
    if as_json:
        print_json("unpack", vars(done) | {"folder": str(done.folder)})
        return
    branches = f", {done.num_branches} SLoRB branches in its adapter/" if done.num_branches else ""
    stdout().print(
        f"{done.folder}: {done.num_layers} layers unpacked, {done.weights_bytes / 1e6:.1f} MB of {done.dtype}{branches}",
        highlight=False,
    )
