"""Models that keep the k largest of several values: where values are equal, each runtime keeps others."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, fx

from sparsepass.graph import capture
from sparsepass.graph.fused_model import fuse_layers
from sparsepass.graph.limits import broken
from sparsepass.graph.nodes import module_path
from sparsepass.graph.program import Program
from sparsepass.graph.support import SparsepassError

_PICK = torch.ops.aten.topk.default
_FEW = 8  # tokens


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


def repeating(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with tokens that come twice in each row, as they do in texts."""
    ids = {name: tensor for name, tensor in inputs.items() if name.endswith("input_ids") and tensor.dim() == 2}
    return {**inputs, **{name: t[:, torch.arange(t.shape[1]) // 2] for name, t in ids.items()}}


def without_ties(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The program whose graph is written, and what to tell of it.

    1. That is the given one, unless it holds for long inputs only and picks among equal values there.
    2. Then the model is captured anew on few tokens. If it does not pick there, that graph is written: no runtime can give
       what the model gives on longer inputs, which the graph's limits refuse.

    Args:
        program: Not changed. A model whose class cannot be built again, or with SLoRB branches, is left alone.

    Returns:
        The program, and a note if it is another: with masks folded.
    """
    inputs = {name: program.example_inputs[name] for name in program.input_names}
    few = {name: t[:, :_FEW] if 1 in program.dynamic_axes.get(name, ()) else t for name, t in inputs.items()}
    is_long = broken(program.limits, {name: tuple(tensor.shape) for name, tensor in few.items()}) is not None
    if not is_long or program.origin.model_class is None or any(state.branch for state in program.sparse.values()):
        return program, ()
    said = next((said for each in (inputs, repeating(inputs)) if (said := tie_in(program, each))), None)
    if said is None:
        return program, ()
    with contextlib.suppress(SparsepassError):
        model = program.to_model()
        fuse_layers(model, program.fused)
        short = capture(model, few)
        if not picks(short):
            folded = {name: replace(state, mask=None, learned=None) for name, state in program.sparse.items()}
            told = f"the graph is that of short inputs, because on longer ones {said}"
            return short.sharing(sparse=folded, history=program.history, retraining=program.retraining), (told,)
    return program, ()


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
