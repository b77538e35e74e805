"""Calibration for exact passes that also change what makes a layer's input, and so what has run before it.

A sweep rewrites a layer as soon as its inputs are complete. Were what makes them changed then, the activations that have run
already would no longer fit. So the sites that a pass changes together wait until everything that reads their activations has
run. From there on no result depends on the change, and statistics are dropped early here too.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sparsepass.graph import Program, Site
from sparsepass.passes.data import CalibrationBatch
from sparsepass.passes.engine.blocks import SiteGroup, site_groups
from sparsepass.passes.engine.calibration import sweep
from sparsepass.passes.engine.runner import ComputeDtype
from sparsepass.passes.maths import InputStatistics

StatisticsOf = Mapping[str, tuple[InputStatistics, ...]]
"""Weight name -> statistics of its layer's input: one, or one for each expert."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Sites that a pass changes together, with what makes their inputs.

    Attributes:
        sites: The sites; their statistics are gathered.
        tensors: Stored tensors that activations are multiplied by which the change makes others: the weights of the sites, and
            of whatever else reads the same.
    """

    sites: tuple[Site, ...]
    tensors: tuple[str, ...]


def sweep_joined(
    program: Program,
    batches: Sequence[CalibrationBatch],
    joined: Sequence[Joined],
    rewrite: Callable[[Joined, StatisticsOf], None],
    *,
    gram: bool,
    compute: ComputeDtype = "auto",
    device: torch.device | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the graph once over all batches, and rewrite sites that belong together when nothing ahead depends on the change.

    Args:
        program: Changed by ``rewrite`` while it runs; its graph stays as it is.
        batches: As in `sweep`.
        joined: What to rewrite. No site belongs to two of them.
        rewrite: Called once for each of them.
        gram: As in `sweep`.
        compute: As in `sweep`.
        device: As in `sweep`.
        advance: Called with a first site's name when it is rewritten.
    """
    order = {node.name: index for index, node in enumerate(program.graph_module.graph.nodes)}
    last = [max((order[name] for name in _readers(program.graph_module.graph, one.tensors)), default=0) for one in joined]
    weights = {site.weight for one in joined for site in one.sites}
    known: dict[str, tuple[InputStatistics, ...]] = {}
    waiting = dict(zip(range(len(joined)), joined, strict=True))

    def finish(place: int) -> None:
        for number, one in list(waiting.items()):
            if last[number] < place:
                rewrite(one, {site.weight: known.pop(site.weight) for site in one.sites})
                advance(waiting.pop(number).sites[0].name)

    def take(group: SiteGroup, statistics: tuple[InputStatistics, ...]) -> None:
        finish(min(order[name] for site in group.sites for name in site.nodes))
        known.update({site.weight: statistics for site in group.sites})

    groups = site_groups([site for site in program.sites() if site.weight in weights])
    sweep(program, batches, groups, take, gram=gram, compute=compute, device=device)
    finish(len(order))


def _readers(graph: fx.Graph, tensors: Collection[str]) -> list[str]:
    """The operations that bring stored tensors, or what is made of parameters alone with them, together with activations."""
    made: set[fx.Node] = set()
    constant: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and all(each in constant for each in sources)):
            constant.add(node)
            if str(node.target) in tensors or any(each in made for each in sources):
                made.add(node)
        elif any(each in made for each in sources):
            found.append(node.name)
    return found
