"""The calibration engine: the graph runs once over all batches, and each group of sites is rewritten on the way.

The run goes from group to group. It stops before the first operation that reads the group's activation. At that place:

1. The activations of all batches are there. They went through the layers before it, which are rewritten already.
2. The engine adds up their statistics and has the group rewritten.
3. It drops the statistics and goes on, with the rewritten weights.

So there is one forward pass in all, memory for the statistics of one group, and no work behind the last site.

Some passes rewrite whole blocks. The engine then runs a second copy of the graph, the dense one, one block ahead. Block by
block:

1. The dense copy runs the block. Its outputs are the targets.
2. The groups of the block are rewritten, as above. The block's inputs are kept.
3. The pass rewrites the block, from these inputs and targets.
4. The run goes back to the block's first operation and takes the block again, with its final weights.

Shape suffixes: B batch, T tokens, E experts, I in, K kernel positions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sparsepass.graph import PassError, Program, Site, SparsepassError
from sparsepass.graph.support import give_back_freed_memory
from sparsepass.passes.data import CalibrationBatch
from sparsepass.passes.engine.blocks import Block, SiteGroup
from sparsepass.passes.engine.runner import ComputeDtype, Runner
from sparsepass.passes.maths import InputStatistics

_aten = torch.ops.aten


class BlockRun:
    """A block while the run is in it, from before its first group is rewritten until it is rewritten itself.

    The pass that rewrites it can run it meanwhile.
    """

    def __init__(self, block: Block, runner: Runner, dense: Runner, advance: Callable[[str], None]) -> None:
        self.block = block
        self._runner, self._advance = runner, advance
        runner.run_before(block.before.next)
        self._mark = runner.mark()
        dense.run_before(block.after)
        outputs = block.outputs()
        self._targets = [tuple(dense.value(node, index) for node in outputs) for index in range(len(runner.batches))]
        self._nodes: list[fx.Node] = []
        self._outputs: list[fx.Node] = []

    def finish(self, rewrite_block: Callable[[Block, "BlockRun"], None] | None) -> None:
        """Rewrite the block, and send the run back to its beginning."""
        assert rewrite_block is not None
        self._nodes, self._outputs = self.block.nodes(), self.block.outputs()
        self._runner.rewind(self._mark, self._nodes)
        rewrite_block(self.block, self)
        self._runner.rewritten(reused=False)
        give_back_freed_memory()

    @property
    def name(self) -> str:
        """Path of the block's module."""
        return self.block.name

    @property
    def num_batches(self) -> int:
        """Number of calibration batches."""
        return len(self._targets)

    def targets(self, batch: int) -> tuple[Tensor, ...]:
        """What the block gave in the dense model, for one batch."""
        return self._targets[batch]

    def valid_BT(self, batch: int) -> Tensor | None:  # noqa: N802
        """Which tokens of a batch are no padding; None if all are."""
        return self._runner.batches[batch].valid_BT

    def outputs(self, batch: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run the block, whose predecessors are rewritten already, with other values for some parameters and buffers."""
        results = self._runner.run_block(self._nodes, self._mark.values[batch], tensors)
        return tuple(results[node] for node in self._outputs)

    def own_vectors(self) -> tuple[str, ...]:
        """Names of the one-dimensional parameters (norms, biases) that this block alone reads."""
        inside = set(self._nodes)
        readers: dict[str, set[fx.Node]] = {}
        for node in self.block.before.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), set()).update(node.users)
        names = [name for name, users in readers.items() if users and users <= inside]
        tensors = {name: self._runner.parameter(name) for name in names}
        return tuple(
            name
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.nn.Parameter) and tensor.dim() == 1 and tensor.is_floating_point()
        )

    def advance(self, word: str) -> None:
        """Say that one of the steps of the pass's `BlockWork` is done."""
        self._advance(f"{self.name}: {word}")


def sweep(
    program: Program,
    batches: Sequence[CalibrationBatch],
    groups: Sequence[SiteGroup],
    rewrite: Callable[[SiteGroup, tuple[InputStatistics, ...]], None],
    *,
    gram: bool,
    compute: ComputeDtype = "auto",
    device: torch.device | None = None,
    blocks: Sequence[Block] = (),
    rewrite_block: Callable[[Block, BlockRun], None] | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the graph once over all batches and rewrite each group when its statistics are complete.

    Args:
        program: Changed by ``rewrite`` while it runs.
        batches: Calibration inputs. All are held (their activations at one place of the graph, not at all places).
        groups: What to rewrite, from `site_groups`.
        rewrite: Called once for each group with the statistics of its input: one, or one for each expert.
        gram: Whether the Gram matrix is needed, or norms only.
        compute: Precision of matmuls and attention; statistics are always fp32. ``auto``: bfloat16 where the processor
            computes in it, else float32.
        device: Where to compute; by default where the program is. Elsewhere each weight moves there as long as it is needed.
        blocks: What to rewrite as a whole, from `find_blocks`; ``groups`` are then those of the blocks and of no block.
        rewrite_block: Called once for each block, after its groups.
        advance: Called with a group's first site name when it is done, and by `BlockRun.advance`.

    Raises:
        PassError: If activations are NaN or Inf, with the site.
    """
    place = device or program.device
    runner = Runner(program, batches, compute, place)
    dense = Runner(program, batches, compute, place) if blocks else None
    block_of = {site.weight: block for block in blocks for site in block.sites}
    current: BlockRun | None = None
    by_name = {node.name: node for node in program.graph_module.graph.nodes}
    readers: dict[fx.Node, list[SiteGroup]] = {}
    last_reader: dict[str, fx.Node] = {}
    order = {node: index for index, node in enumerate(program.graph_module.graph.nodes)}
    for group in groups:
        uses = [by_name[name] for name in group.sites[0].nodes]
        firsts = uses if len(uses) > 1 else [min((by_name[n] for s in group.sites for n in s.nodes), key=order.__getitem__)]
        for use in firsts:
            readers.setdefault(use, []).append(group)
        last_reader[group.sites[0].weight] = max(firsts, key=order.__getitem__)
    statistics: dict[str, tuple[InputStatistics, ...]] = {}
    for reader in sorted(readers, key=order.__getitem__):
        block = block_of.get(readers[reader][0].sites[0].weight)
        if current is not None and current.block is not block:
            current.finish(rewrite_block)
            current = None
        if dense is not None and block is not None and current is None:
            current = BlockRun(block, runner, dense, advance)
        runner.run_before(reader)
        for group in readers[reader]:
            key = group.sites[0].weight
            site = group.sites[0]
            if key not in statistics:
                statistics[key] = empty_statistics(site, gram=gram, device=place)
            try:
                for index, batch in enumerate(runner.batches):
                    add_inputs(statistics[key], site, reader, functools.partial(runner.argument, reader, index=index), batch)
            except SparsepassError as error:
                raise PassError("calibration", site.name, f"{error}") from error
            if reader is last_reader[key]:
                if dense is not None and block is None:
                    dense.run_past([by_name[name] for one in group.sites for name in one.nodes])
                rewrite(group, statistics.pop(key))
                runner.rewritten(reused=len(site.nodes) > 1)
                if dense is not None:
                    dense.overtaken()
                give_back_freed_memory()
                advance(site.name)
    if current is not None:
        current.finish(rewrite_block)


def empty_statistics(site: Site, *, gram: bool, device: torch.device) -> tuple[InputStatistics, ...]:
    """Statistics of no tokens yet: one, or one for each expert."""
    features = site.in_features
    if site.layout in ("conv1d", "conv2d"):
        features = site.num_weights // site.shape[0]
    count = site.shape[0] if site.layout.startswith("experts") else 1
    return tuple(InputStatistics.zeros(features, gram=gram, device=device) for _ in range(count))


def add_inputs(
    statistics: tuple[InputStatistics, ...],
    site: Site,
    reader: fx.Node,
    argument: Callable[[int], Any],
    batch: CalibrationBatch,
) -> None:
    """Add what a site reads in one batch to its statistics. Padding is left out.

    Args:
        statistics: From `empty_statistics`.
        site: The site.
        reader: The operation that reads its weight, and has not run yet.
        argument: Index of one of the operation's arguments -> its value.
        batch: The batch.

    Raises:
        SparsepassError: If a value is NaN or Inf.
    """
    x = argument(1 if reader.target is _aten.addmm.default else 0)
    if site.layout.startswith("experts"):
        _update_experts(statistics, x, argument(2))
        return
    if site.layout in ("conv1d", "conv2d"):
        x = _unfolded(x, site, argument, reader)
    elif batch.valid_BT is not None:
        x = _without_padding(x, batch.valid_BT.to(x.device))
    statistics[0].update(x.reshape(-1, x.shape[-1]))


def _without_padding(x: Tensor, valid_BT: Tensor) -> Tensor:
    if x.dim() >= 2 and x.shape[:2] == valid_BT.shape:
        return x[valid_BT]
    if x.dim() == 2 and x.shape[0] == valid_BT.numel():
        return x[valid_BT.reshape(-1)]
    return x


def _update_experts(statistics: tuple[InputStatistics, ...], x_TI: Tensor, offsets_E: Any) -> None:
    """Tokens are sorted by expert; the offsets say where each expert's tokens end."""
    if not isinstance(offsets_E, Tensor):
        for known in statistics:
            known.update(x_TI)
        return
    start = 0
    for known, end in zip(statistics, offsets_E.tolist(), strict=True):
        known.update(x_TI[start : int(end)])
        start = int(end)


def _unfolded(x: Tensor, site: Site, argument: Callable[[int], Any], reader: fx.Node) -> Tensor:
    """What a convolution multiplies its weight with, in the order of `Site.to_matrix`: [B*T, K*I]."""
    names = ("stride", "padding", "dilation")
    bound = {name: argument(i) for i, name in enumerate(names, 3) if i < len(reader.args)} | dict(reader.kwargs)
    kernel = tuple(site.shape[2:])
    stride, dilation = bound.get("stride", 1), bound.get("dilation", 1)
    padding = bound.get("padding", 0)
    if site.layout == "conv1d":
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, dilation = ((1, _one(stride)), (1, _one(dilation)))
    if isinstance(padding, str):
        steps = dilation if isinstance(dilation, list | tuple) else (dilation, dilation)
        total = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)] if padding == "same" else [0, 0]
        left = [t // 2 for t in total]
        x = torch.nn.functional.pad(x, (left[1], total[1] - left[1], left[0], total[0] - left[0]))
        padding = (0, 0)
    elif site.layout == "conv1d":
        padding = (0, _one(padding))
    columns = torch.nn.functional.unfold(x.float(), kernel, dilation=dilation, padding=padding, stride=stride)
    batch, _, places = columns.shape
    channels = site.shape[1]
    return columns.reshape(batch, channels, -1, places).permute(0, 3, 2, 1).reshape(batch * places, -1)


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)
