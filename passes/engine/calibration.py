"""The calibration engine: one run of the graph over all batches, in which each site is rewritten once its inputs are known.

The graph runs segment by segment. A segment ends before the first operation that reads a group of sites' activation. There
the activations of all batches are complete and went through already rewritten predecessors; their statistics are taken, the
group is rewritten, the statistics are dropped, and the run goes on with the rewritten weights. So there is one forward pass,
not two per block, memory for one group's statistics, and the part of the graph after the last site never runs.

Where a pass rewrites whole blocks, a second run of the dense model goes ahead by one block and leaves its outputs as targets;
when the groups of a block are rewritten, the block itself is, from the inputs that were kept; then the run goes back to the
block's beginning and takes it with its last weights.

Shape suffixes: B batch, T tokens, I in, K kernel positions.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx

from sparsepass.graph import PassError, Program, Site, SparsepassError
from sparsepass.graph.attention import ATTENTION, is_causal_mask, mask_of, told_causal
from sparsepass.graph.support import fast_low_precision, give_back_freed_memory
from sparsepass.passes.base import BlockRun, SiteGroup
from sparsepass.passes.data import CalibrationBatch
from sparsepass.passes.engine.blocks import Block
from sparsepass.passes.maths import InputStatistics

ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]

_aten = torch.ops.aten
_MATMULS = {
    _aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default, _aten.bmm.default,
    _aten.conv1d.default, _aten.conv2d.default,
}  # fmt: skip


class WeightSource(Protocol):
    """Where the engine reads parameters and buffers from: memory now; a checkpoint's shards when models outgrow it."""

    def read(self, name: str) -> Tensor:
        """Return a tensor by name, on the device that computes."""

    def release(self, name: str) -> None:
        """Say that the engine will not read this tensor again in this run."""


class ProgramWeights:
    """Weights that are in memory, in the program itself."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def read(self, name: str) -> Tensor:
        """Return the program's own tensor."""
        return self._program.tensor(name).detach()

    def release(self, name: str) -> None:
        """Do nothing: the program keeps its tensors."""


def site_groups(sites: Sequence[Site]) -> list[SiteGroup]:
    """Group sites that read the same activations, in graph order. Expert and convolution weights stand alone."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        alone = site.layout not in ("linear", "conv1d_hf") or len(site.nodes) > 1
        groups.setdefault(site.weight if alone else (site.inputs, site.in_features), []).append(site)
    return [SiteGroup(sites=tuple(found)) for found in groups.values()]


def sweep(
    program: Program,
    batches: Sequence[CalibrationBatch],
    groups: Sequence[SiteGroup],
    rewrite: Callable[[SiteGroup, tuple[InputStatistics, ...]], None],
    *,
    gram: bool,
    compute: ComputeDtype = "auto",
    weights: WeightSource | None = None,
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
        weights: Where parameters come from.
        blocks: What to rewrite as a whole, from `find_blocks`; ``groups`` are then those of the blocks and of no block.
        rewrite_block: Called once for each block, after its groups.
        advance: Called with a group's first site name when it is done, and by `BlockRun.advance`.

    Raises:
        PassError: If activations are NaN or Inf, with the site.
    """
    runner = _Runner(program, list(batches), weights or ProgramWeights(program), compute)
    dense = _Runner(program, list(batches), weights or ProgramWeights(program), compute) if blocks else None
    block_of = {site.weight: block for block in blocks for site in block.sites}
    current: _Stretch | None = None
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
            current = _Stretch(block, runner, dense, advance)
        runner.run_before(reader)
        for group in readers[reader]:
            key = group.sites[0].weight
            site = group.sites[0]
            if key not in statistics:
                statistics[key] = _empty(site, gram, program.device)
            try:
                for index, batch in enumerate(runner.batches):
                    _update(statistics[key], site, reader, functools.partial(runner.argument, reader, index=index), batch)
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


class _Runner:
    """Runs a graph for many batches at once, from one place to the next, while it is being rewritten ahead of it."""

    def __init__(self, program: Program, batches: list[CalibrationBatch], weights: WeightSource, compute: ComputeDtype) -> None:
        self.batches = batches
        self.parameter = program.tensor
        self._graph = program.graph_module.graph
        self._weights = weights
        self._device = program.device
        self._low = _low_precision(compute, program)
        self._constants: dict[fx.Node, Any] = {}
        self._known_constants: dict[fx.Node, bool] = {}
        self._last_mask: tuple[Tensor, bool] | None = None
        self._values: list[dict[fx.Node, Any]] = []
        placeholders = [n for n in self._graph.nodes if n.op == "placeholder"]
        for batch in batches:
            bound = program.flat_inputs(**{name: t.to(self._device) for name, t in batch.inputs.items()})
            self._values.append({node: bound[str(node.target)] for node in placeholders})
        self._done: set[fx.Node] = set(placeholders)
        self._stop = placeholders[0]

    @torch.no_grad()
    def run_before(self, stop: fx.Node) -> None:
        """Run every node up to ``stop``, which is not run, for all batches."""
        nodes = []
        for node in self._ahead(stop):
            if self._is_constant(node):
                self._done.add(node)  # computed when something reads it
            else:
                nodes.append(node)
        frees = self._frees(nodes)
        with self._precision():
            for values in self._values:
                for n in nodes:
                    values[n] = self._execute(n, values)
                    for dead in frees.get(n, ()):
                        values.pop(dead, None)
        self._done.update(nodes)
        for constant in list(self._constants):
            if all(user in self._done for user in constant.users):
                self._forget(constant)
        self._stop = stop

    def rewritten(self, *, reused: bool) -> None:
        """Take note that nodes were inserted and weights replaced.

        Args:
            reused: Whether a site with several uses was rewritten, so that nodes stand at uses that have run. Those ran with
                the dense weight, and their results stand for the rewritten ones.
        """
        for constant in list(self._constants):
            self._forget(constant)
        if not reused:
            return
        inserted = self._ahead(self._stop)
        for node in inserted:
            source = node.args[0] if node.target is _aten.add.Tensor else None
            if isinstance(source, fx.Node) and source in self._done:
                self._done.add(node)
                for values in self._values:
                    if source in values:
                        values[node] = values[source]
        for node in reversed(inserted):
            if node.users and all(user in self._done for user in node.users):
                self._done.add(node)

    def run_past(self, nodes: Sequence[fx.Node]) -> None:
        """Run until all of these are run."""
        order = {node: index for index, node in enumerate(self._graph.nodes)}
        last = max(nodes, key=order.__getitem__)
        if order[last] >= order[self._stop]:
            self.run_before(last.next)

    def overtaken(self) -> None:
        """Take note that a run behind this one has rewritten what this one ran when it was dense. That is not run again."""
        for constant in list(self._constants):
            self._forget(constant)
        for node in self._ahead(self._stop):
            self._done.add(node)
            source = node.args[0] if node.target is _aten.add.Tensor else None
            for values in self._values:
                if isinstance(source, fx.Node) and source in values:
                    values[node] = values[source]  # a branch: the operation's readers read the sum now

    def mark(self) -> "_Mark":
        """Remember this place, to run on from it again."""
        return _Mark(stop=self._stop, done=frozenset(self._done), values=tuple(dict(values) for values in self._values))

    def rewind(self, mark: "_Mark", nodes: Sequence[fx.Node]) -> None:
        """Go back to a place, behind which ``nodes`` have run since."""
        for constant in list(self._constants):
            self._forget(constant)
        self._done = (set(mark.done) | self._done) - set(nodes)
        self._values = [dict(values) for values in mark.values]
        self._stop = nodes[0]

    def value(self, node: fx.Node, index: int) -> Any:
        """What a node gave for one batch, or gives for all."""
        return self._lookup(node, self._values[index])

    def run_block(
        self, nodes: Sequence[fx.Node], known: Mapping[fx.Node, Any], tensors: Mapping[str, Tensor]
    ) -> dict[fx.Node, Any]:
        """Run nodes for one batch with some tensors in the place of the graph's own; gradients reach them.

        Args:
            nodes: A stretch of the graph.
            known: Results of nodes in front of it.
            tensors: Name -> value.
        """
        results: dict[fx.Node, Any] = {}
        differs: dict[fx.Node, bool] = {}

        def is_other(constant: fx.Node) -> bool:
            if constant not in differs:
                differs[constant] = (
                    str(constant.target) in tensors
                    if constant.op == "get_attr"
                    else any(map(is_other, constant.all_input_nodes))
                )
            return differs[constant]

        def look_up(node: fx.Node) -> Any:
            if node in results:
                return results[node]
            if node in known:
                return known[node]
            if not is_other(node):
                return self._constant(node)
            results[node] = tensors[str(node.target)] if node.op == "get_attr" else execute(node)
            return results[node]

        def execute(node: fx.Node) -> Any:
            return self._call(node, *fx.node.map_arg((node.args, node.kwargs), look_up))

        with self._precision():
            for node in nodes:
                if not self._is_constant(node):
                    results[node] = execute(node)
        return results

    def _ahead(self, stop: fx.Node) -> list[fx.Node]:
        """Nodes in front of ``stop`` that have not run. Rewriting may insert some anywhere before it."""
        return [node for node in itertools.takewhile(lambda n: n is not stop, self._graph.nodes) if node not in self._done]

    def argument(self, reader: fx.Node, position: int, index: int) -> Any:
        """An argument of a node that was not run yet, for one batch."""
        if position >= len(reader.args):
            return None
        value = reader.args[position]
        return self._lookup(value, self._values[index]) if isinstance(value, fx.Node) else value

    def _lookup(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        return values[node] if node in values else self._constant(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters only, so that it is computed once for all batches."""
        if node.op == "get_attr":
            return True
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        if node not in self._known_constants:  # asked in graph order, so that it never goes deep
            is_constant = all(self._is_constant(n) for n in node.all_input_nodes) and not any(map(_writes, node.users))
            self._known_constants[node] = is_constant
        return self._known_constants[node]

    def _constant(self, node: fx.Node) -> Any:
        if node not in self._constants:
            value = self._weights.read(str(node.target)) if node.op == "get_attr" else self._execute(node, {})
            low = self._low
            if low is not None and isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
                users = list(node.users)
                if users and all(user.target in _MATMULS for user in users):
                    value = value.to(low)  # once here, and not again for every batch by autocast
            self._constants[node] = value
        return self._constants[node]

    def _forget(self, constant: fx.Node) -> None:
        del self._constants[constant]
        if constant.op == "get_attr":
            self._weights.release(str(constant.target))

    def _execute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op != "call_function":
            raise PassError("calibration", node.name, f"the engine cannot run a node of kind {node.op}")
        return self._call(node, *fx.node.map_arg((node.args, node.kwargs), lambda n: self._lookup(n, values)))

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if node.target is ATTENTION and isinstance(mask := mask_of(args, kwargs), Tensor):
            known, is_causal = self._last_mask or (None, False)
            if known is not mask:  # one mask serves many layers
                is_causal = args[0].shape[-2] == args[1].shape[-2] and is_causal_mask(mask, args[0].shape[-2])
                self._last_mask = mask, is_causal
            if is_causal:
                args, kwargs = told_causal(args, kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _frees(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Which values die after which node of this segment."""
        position = {n: i for i, n in enumerate(nodes)}
        frees: dict[fx.Node, list[fx.Node]] = {}
        candidates = {a for n in nodes for a in n.all_input_nodes} | set(nodes)
        for value in candidates:
            pending = [user for user in value.users if user not in self._done]
            if all(user in position for user in pending):
                last = max(pending, key=position.__getitem__, default=value if value in position else None)
                if last is not None:
                    frees.setdefault(last, []).append(value)
        return frees

    def _precision(self) -> AbstractContextManager[Any]:
        if self._low is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._low)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mark:
    """A place of a run: what had been run, and all results that were still needed."""

    stop: fx.Node
    done: frozenset[fx.Node]
    values: tuple[Mapping[fx.Node, Any], ...]


class _Stretch:
    """A block while the run is in it, from before its first group is rewritten until it is rewritten itself."""

    def __init__(self, block: Block, runner: _Runner, dense: _Runner, advance: Callable[[str], None]) -> None:
        self.block = block
        self._runner, self._advance = runner, advance
        runner.run_before(block.before.next)
        self._mark = runner.mark()
        dense.run_before(block.after)
        outputs = block.outputs()
        self._targets = [tuple(dense.value(node, index) for node in outputs) for index in range(len(runner.batches))]
        self._nodes: list[fx.Node] = []
        self._outputs: list[fx.Node] = []

    def finish(self, rewrite_block: Callable[[Block, BlockRun], None] | None) -> None:
        """Rewrite the block, and send the run back to its beginning."""
        assert rewrite_block is not None
        self._nodes, self._outputs = self.block.nodes(), self.block.outputs()
        self._runner.rewind(self._mark, self._nodes)
        rewrite_block(self.block, self)
        self._runner.rewritten(reused=False)
        give_back_freed_memory()

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def num_batches(self) -> int:
        return len(self._targets)

    def targets(self, batch: int) -> tuple[Tensor, ...]:
        return self._targets[batch]

    def valid_BT(self, batch: int) -> Tensor | None:  # noqa: N802
        return self._runner.batches[batch].valid_BT

    def outputs(self, batch: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        results = self._runner.run_block(self._nodes, self._mark.values[batch], tensors)
        return tuple(results[node] for node in self._outputs)

    def own_vectors(self) -> tuple[str, ...]:
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
        self._advance(f"{self.name}: {word}")


def _low_precision(compute: ComputeDtype, program: Program) -> torch.dtype | None:
    """The dtype to autocast to, or None to run the graph as it is."""
    own = {t.dtype for t in program.tensors().values() if t.is_floating_point()}
    if own != {torch.float32}:
        return None  # a bf16 or fp16 model runs in its own precision, a float64 one too
    if compute == "auto":
        return fast_low_precision(program.device)
    if compute not in ("bfloat16", "float16", "float32"):
        raise SparsepassError(f"compute dtype {compute!r} is not known; use auto, bfloat16, float16 or float32")
    return None if compute == "float32" else getattr(torch, compute)


def _empty(site: Site, gram: bool, device: torch.device) -> tuple[InputStatistics, ...]:
    features = site.in_features
    if site.layout in ("conv1d", "conv2d"):
        features = site.num_weights // site.shape[0]
    count = site.shape[0] if site.layout.startswith("experts") else 1
    return tuple(InputStatistics.zeros(features, gram=gram, device=device) for _ in range(count))


def _update(
    statistics: tuple[InputStatistics, ...],
    site: Site,
    reader: fx.Node,
    argument: Callable[[int], Any],
    batch: CalibrationBatch,
) -> None:
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


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)
