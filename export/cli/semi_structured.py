"""The options of `sparsepass export` that only the target torch reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparsepass.export.targets.torch import SemiStructuredOptions

Timings = Annotated[
    Path | None,
    typer.Option(
        "--timings",
        help="Times recorded before, for the target torch: a torch_semi_structured.json, its folder, or a result of "
        "benchmarks/gpu_torch.py. By default they are measured on this machine's GPU, or where the folder is loaded.",
    ),
]
MeasureShapes = Annotated[
    str | None,
    typer.Option(
        "--measure-shapes",
        help="Sizes at which the target torch measures, BATCHxSEQUENCE: 1x1,1x512,8x2048. By default from one token to 16384.",
    ),
]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="The target torch measures compiled layers, for a model that torch.compile will run.")
]
SparseOnly = Annotated[
    bool,
    typer.Option(
        "--sparse-only",
        help="The target torch lowers a layer only if 2:4 is faster at every size, so that no dense weight is kept beside it.",
    ),
]


def semi_structured_options(
    *, timings: Path | None, shapes: str | None, compiled: bool, sparse_only: bool, measure: bool
) -> "SemiStructuredOptions | None":
    """Bring the options together; None if none was given.

    Raises:
        SparsepassError: If one cannot be used.
    """
    if timings is None and shapes is None and not (compiled or sparse_only) and measure:
        return None
    from sparsepass.export.targets.torch import SemiStructuredOptions, parse_shapes

    return SemiStructuredOptions(
        timings=timings,
        shapes=parse_shapes(shapes) if shapes is not None else (),
        compiled=compiled,
        sparse_only=sparse_only,
        measure=measure,
    )
