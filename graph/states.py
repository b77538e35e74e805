"""What the sparse states of a program say about its tensors: the masked weights, and the model without its branches."""

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sparsepass.graph.program import Program


def masked_weight(program: Program, name: str) -> Tensor:
    """A weight as the graph uses it: behind its mask, if it has one. A mask that is being learned counts as the hard one.

    Args:
        program: Not changed.
        name: Of the weight, or one that it is tied to.

    Returns:
        The weight without its gradient; the program's own tensor where there is no mask.

    Exactness: bitwise.

    Example:
        >>> from sparsepass.passes import apply_passes
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> program = apply_passes(net, "nm_sparsify", example_inputs=torch.randn(2, 8))
        >>> int(masked_weight(program, "0.weight").count_nonzero())
        8
    """
    weight = program.tensor(name).detach()
    state = program.sparse.get(program.aliases.get(name, name))
    if state is None or state.mask is None:
        return weight
    found: Tensor = torch.ops.sparsepass.masked_weight(weight, program.tensor(state.mask))
    return found


@contextlib.contextmanager
def without_branches(program: Program, weights: Collection[str] | None = None) -> Iterator[None]:
    """Switch SLoRB branches off for as long as the block runs, to measure the sparse weights alone.

    Args:
        program: It is as before afterwards.
        weights: Names of the weights whose branches are meant; None for all.
    """
    branches = [state.branch for weight, state in program.sparse.items() if weights is None or weight in weights]
    old = {branch.weight: program.tensor(branch.weight) for branch in branches if branch is not None}
    try:
        for name, tensor in old.items():
            program.set_tensor(name, torch.zeros_like(tensor))
        yield
    finally:
        for name, tensor in old.items():
            program.set_tensor(name, tensor)
