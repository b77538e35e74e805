"""The program's own integers: what the pass `quantize` has fitted is stored as it is, and never rounded again."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from sparsepass.export.targets.packed.survey import LayerChoice
from sparsepass.graph.integers import integers_of
from sparsepass.graph.program import Program
from sparsepass.graph.rounding import RoundingGrid
from sparsepass.graph.support import SparsepassError


def own_grid(program: Program, layers: Iterable[LayerChoice], values: str | None, group_size: int) -> RoundingGrid | None:
    """The grid of the layers that are packed; None if they are not quantized.

    Args:
        program: What is lowered.
        layers: What can become of each layer.
        values: Kind of the values that is asked for; None for the program's own.
        group_size: Of integers, as it is asked for.

    Raises:
        SparsepassError: If they have several grids, no integers, zero points, or another one than is asked for.
    """
    states = {layer.layer: program.quantized.get(layer.weight) for layer in layers if not layer.reason}
    grids = {state.grid: name for name, state in states.items() if state is not None}
    if not grids:
        return None
    if len(grids) > 1:
        said = "; ".join(f"{name}: {grid.text}" for grid, name in grids.items())
        raise SparsepassError(
            f"a packed folder holds integers of one grid, and this program has several ({said}); quantize alike"
        )
    ((grid, name),) = grids.items()
    check_own(name, grid, values, group_size)
    return grid


def check_own(name: str, grid: RoundingGrid, values: str | None, group_size: int) -> None:
    """Raise unless packed layers hold the integers of a grid.

    Args:
        name: Of a layer with this grid, or of what is going to round layers to it.
        grid: The grid.
        values: As for `own_grid`.
        group_size: As for `own_grid`.

    Raises:
        SparsepassError: If it has no integers, zero points, or is another one than is asked for.
    """
    if grid.format != "int":
        raise SparsepassError(
            f"packed layers hold integers or 16-bit values, and {name} is {grid.kind}; quantize with format=int, "
            "or write the target hf or onnx"
        )
    if not grid.symmetric:
        raise SparsepassError(
            f"packed layers have no zero points, and {name} is {grid.kind}, which has them; quantize with symmetric=true, or "
            "write another target"
        )
    if values is not None and (values, group_size) != (f"int{grid.bits}", grid.group_size):
        raise SparsepassError(
            f"{name} is {grid.text}, and values={values} with group_size={group_size} would round it again; leave both out"
        )


def own_table(program: Program, path: str) -> tuple[Tensor, Tensor] | None:
    """The bytes ``[V, D]`` and scales ``[V, 1]`` of an embedding or head as a packed folder holds them.

    Args:
        program: What is lowered.
        path: Of the module.

    Returns:
        None if the program does not round it, or to another grid than int8 with one scale a row.
    """
    name = program.aliases.get(f"{path}.weight", f"{path}.weight")
    state = program.quantized.get(name)
    if state is None or state.axis != 1 or state.grid != RoundingGrid(bits=8, group_size=0):
        return None
    found = integers_of(program, name)
    assert found is not None
    return found.numbers_OI, found.scales_OG


def own_tables(program: Program, tables: Mapping[str, str]) -> dict[str, str]:
    """Those of the embeddings and heads that the program itself rounds to bytes."""
    return {path: name for path, name in tables.items() if own_table(program, path) is not None}


def without_others(program: Program, layers: Iterable[LayerChoice], grid: RoundingGrid) -> tuple[LayerChoice, ...]:
    """The layers, those dense that could be packed and are not quantized.

    Args:
        program: What is lowered.
        layers: What can become of each layer.
        grid: Of the others.
    """
    reason = f"not quantized, and a packed folder holds values of one kind ({grid.text})"
    return tuple(
        layer if layer.reason or layer.weight in program.quantized else replace(layer, reason=reason) for layer in layers
    )
