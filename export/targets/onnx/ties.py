"""Models that keep the k largest of several values: where values are equal, each runtime keeps others."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, fx

from sparsepass.graph.nodes import module_path
from sparsepass.graph.program import Program

_PICK = torch.ops.aten.topk.default


def picks(program: Program) -> bool:
    """Whether a program keeps the k largest of some values."""
    return any(node.target is _PICK for node in program.graph_module.graph.nodes)


def tie_in(program: Program, inputs: Mapping[str, Tensor]) -> str | None:
    """Where a program picks among values that are equal, in words; None where it does not.

    Args:
        program: What is run.
        inputs: Its inputs, in its order.
    """
    if not picks(program):
        return None
    watch = _Watch(program.graph_module)
    with torch.no_grad():
        watch.run(*inputs.values())
    if watch.found is None:
        return None
    where = module_path(watch.found) or watch.found.name
    return f"{where} keeps the largest of values some of which are equal here: which of those it keeps is up to the runtime"


@final
class _Watch(fx.Interpreter):
    """Runs a graph, and notes the first node whose last kept value equals the first one left out."""

    found: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and look at what it picks."""
        if n.target is _PICK and self.found is None:
            arguments, options = self.fetch_args_kwargs_from_env(n)
            if _is_tied(*arguments, **options):
                self.found = n
        return super().run_node(n)


def _is_tied(values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> bool:
    """Whether the last of k kept values equals the first one left out. Takes the arguments of `torch.topk`."""
    del sorted
    if not 0 < k < values.shape[dim]:
        return False
    last, next_one = values.sort(dim, descending=largest).values.narrow(dim, k - 1, 2).unbind(dim)
    if values.is_floating_point():  # what is masked has the lowest number: any of those is as good as another
        return bool(((last == next_one) & (last > torch.finfo(last.dtype).min)).any())
    return bool((last == next_one).any())
