"""A program without its branches, for as long as something is measured."""

import contextlib
from collections.abc import Collection, Iterator

import torch

from sparsepass.graph.program import Program


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
