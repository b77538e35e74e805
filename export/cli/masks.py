"""The command `masks`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsepass.export.cli import support
from sparsepass.export.cli.output import NAME_WIDTH, print_json, show, stdout

if TYPE_CHECKING:
    from sparsepass.passes.masks import MaskDifference, MaskPack


def masks_command(
    first: Annotated[
        str, typer.Argument(metavar="PROGRAM_OR_PACK", help="A saved program with masks, or a mask pack.", show_default=False)
    ],
    second: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Compare its masks with these.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the masks as a pack to this file.", show_default=False)
    ] = None,
    about: Annotated[
        str, typer.Option("--about", help="What the pack is for, such as a domain; goes into it.", show_default=False)
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that stands at --out.")] = False,
    as_json: support.AsJson = False,
) -> None:
    """Write a program's masks as a pack, a small file apart from the weights; show a pack; or compare two.

    A pack is applied with --passes 'nm_sparsify{masks="FILE"}', to the model whose weights it was made with.

    Exit code: 0 done, 2 wrong usage or unreadable input.
    """
    from sparsepass.graph import SparsepassError
    from sparsepass.graph.support import check_place
    from sparsepass.passes.masks import compare_masks, describe, is_mask_pack

    if out is not None and second is not None:
        raise SparsepassError("--out writes the masks of one program, and two are compared; leave one of them out")
    if about and out is None:
        raise SparsepassError("--about goes into a pack that is written; name the file with --out")
    if out is not None:
        check_place(out, force=force, inputs=[first], is_ours=is_mask_pack)
    for name in (first, second):
        if name is not None and not Path(name).exists():
            raise SparsepassError(f"there is no {name}; give a folder that `sparsepass prune` wrote, or a mask pack")
    pack = _read(first, about)
    if second is not None:
        found = compare_masks(pack, _read(second, ""))
        if as_json:
            print_json("masks", {"layers": [_as_json(one) for one in found], "total": _as_json(_total(found))})
        else:
            _show_differences(found)
        return
    if out is not None:
        pack.save(out)
    if as_json:
        print_json("masks", describe(pack))
        return
    known = describe(pack)
    held = f"{known['num_masks']} masks of {known['model_class']}, {', '.join(known['patterns'])}"
    size = f"{known['num_weights']:,} weights, {known['bits_per_weight']:.3f} bits a weight"
    console = stdout()
    console.print(f"{held}, {size}" + (f": {pack.about}" if pack.about else ""), highlight=False, markup=False)
    written = f". Written to {out}" if out is not None else ""
    console.print(f"Made by {pack.recipe}{written}", highlight=False, markup=False)


def _read(name: str, about: str) -> "MaskPack":
    from sparsepass.graph import Program
    from sparsepass.passes.masks import MaskPack, pack_program

    path = Path(name)
    return pack_program(Program.load(path), about=about) if path.is_dir() else MaskPack.load(path)


def _total(found: "list[MaskDifference]") -> "MaskDifference":
    from sparsepass.passes.masks import MaskDifference

    return MaskDifference(
        weight="all",
        num_entries=sum(one.num_entries for one in found),
        num_flipped=sum(one.num_flipped for one in found),
        num_kept=sum(one.num_kept for one in found),
    )


def _as_json(one: "MaskDifference") -> dict[str, object]:
    return {
        "weight": one.weight, "num_entries": one.num_entries, "num_flipped": one.num_flipped, "overlap": one.overlap,
    }  # fmt: skip


def _show_differences(found: "list[MaskDifference]") -> None:
    from rich.table import Table

    table = Table(title="Masks", title_justify="left", show_edge=False)
    table.add_column("weight", overflow="fold", min_width=min(max(len(one.weight) for one in found), NAME_WIDTH))
    table.add_column("entries that differ", justify="right")
    table.add_column("kept by both", justify="right")
    for one in [*found, _total(found)]:
        table.add_row(one.weight, f"{one.num_flipped / one.num_entries:.2%}", f"{one.overlap:.2%}")
    show(table)
