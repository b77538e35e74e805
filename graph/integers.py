"""The numbers of quantized weights, for whatever writes them."""

from sparsepass.graph.ops import rounded_rows, where_kept
from sparsepass.graph.program import Program
from sparsepass.graph.rounding import Rounded


def integers_of(program: Program, name: str) -> Rounded | None:
    """The numbers, scales and zero points of a weight: what the graph computes with, before it is made floating-point again.

    Args:
        program: Not changed.
        name: Of the weight, or one that it is tied to.

    Returns:
        Rows as `Site.to_matrix` gives them, N:M and groups along the last axis; None for a weight that is not quantized.

    Exactness: the integers are made of the weight by one rounding, and they are those of the graph.

    Example:
        >>> import torch
        >>> from sparsepass.passes import apply_passes
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> program = apply_passes(net, "quantize", example_inputs=torch.randn(2, 8))
        >>> found = integers_of(program, "0.weight")
        >>> found.numbers_OI.dtype, found.numbers_OI.shape
        (torch.int8, torch.Size([2, 8]))
    """
    name = program.aliases.get(name, name)
    state, sparse = program.quantized.get(name), program.sparse.get(name)
    if state is None:
        return None
    weight = program.tensor(name).detach()
    if sparse is not None and sparse.mask is not None:
        weight = where_kept(weight, program.tensor(sparse.mask))
    zero_points = None if state.zero_points is None else program.tensor(state.zero_points)
    return rounded_rows(weight, program.tensor(state.scales), zero_points, *state.call)  # type: ignore[arg-type]
