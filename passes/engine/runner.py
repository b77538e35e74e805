"""Running a graph for all calibration batches, from one place to the next, while passes rewrite it.

Shape suffixes: B batch, T tokens.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from sparsepass.graph import PassError, Program, SparsepassError
from sparsepass.graph.attention import ATTENTION, is_causal_mask, mask_of, told_causal
from sparsepass.graph.nodes import is_mutable
from sparsepass.graph.placement import moved
from sparsepass.graph.support import fast_low_precision
from sparsepass.passes.data import CalibrationBatch

ComputeDtype = Literal["auto", "bfloat16", "float16", "float32"]
"""Precision of calibration's matmuls and attention."""

_aten = torch.ops.aten
_MATMULS = {
    _aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default, _aten.bmm.default,
    _aten.conv1d.default, _aten.conv2d.default,
}  # fmt: skip


class Runner:
    """Runs a graph for many batches at once, from one place to the next, while it is being rewritten ahead of it."""

    def __init__(
        self, program: Program, batches: Sequence[CalibrationBatch], compute: ComputeDtype, device: torch.device
    ) -> None:
        self.batches = tuple(batches)
        self.parameter = program.tensor
        self._graph = program.graph_module.graph
        self._device = device
        self._moves = device != program.device  # each weight, when it is read
        self._low = _low_precision(compute, program, device)
        self._constants: dict[fx.Node, Any] = {}
        self._known_constants: dict[fx.Node, bool] = {}
        self._last_mask: tuple[Tensor, bool] | None = None
        self._values: list[dict[fx.Node, Any]] = []
        placeholders = [n for n in self._graph.nodes if n.op == "placeholder"]
        for batch in batches:
            bound = program.flat_inputs(**{name: t.to(self._device) for name, t in batch.inputs.items()})
            with program.checked(bound):
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
                del self._constants[constant]
        self._stop = stop

    def rewritten(self, *, reused: bool) -> None:
        """Take note that nodes were inserted and weights replaced.

        Args:
            reused: Whether a site with several uses was rewritten, so that nodes stand at uses that have run. Those ran with
                the dense weight, and their results stand for the rewritten ones.
        """
        self._constants.clear()
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
        self._constants.clear()
        for node in self._ahead(self._stop):
            self._done.add(node)
            source = node.args[0] if node.target is _aten.add.Tensor else None
            for values in self._values:
                if isinstance(source, fx.Node) and source in values:
                    values[node] = values[source]  # a branch: the operation's readers read the sum now

    def mark(self) -> "Mark":
        """Remember this place, to run on from it again."""
        return Mark(stop=self._stop, done=frozenset(self._done), values=tuple(dict(values) for values in self._values))

    def rewind(self, mark: "Mark", nodes: Sequence[fx.Node]) -> None:
        """Go back to a place, behind which ``nodes`` have run since."""
        self._constants.clear()
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
            is_written = any(is_mutable(user.target) for user in node.users)
            is_constant = not is_written and all(self._is_constant(n) for n in node.all_input_nodes)
            self._known_constants[node] = is_constant
        return self._known_constants[node]

    def _constant(self, node: fx.Node) -> Any:
        if node not in self._constants:
            if node.op == "get_attr":
                value = moved(self.parameter(str(node.target)).detach(), self._device)
            else:
                value = self._execute(node, {})
            low = self._low
            if low is not None and isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
                users = list(node.users)
                if users and all(user.target in _MATMULS for user in users):
                    value = value.to(low)  # once here, and not again for every batch by autocast
            self._constants[node] = value
        return self._constants[node]

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
        if self._moves:  # a device that the graph names, as in arange(n, device=cpu)
            args, kwargs = tree_map(lambda value: moved(value, self._device), (args, kwargs))
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
class Mark:
    """A place of a run: what had been run, and all results that were still needed."""

    stop: fx.Node
    done: frozenset[fx.Node]
    values: tuple[Mapping[fx.Node, Any], ...]


def _low_precision(compute: ComputeDtype, program: Program, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, or None to run the graph as it is."""
    own = {t.dtype for t in program.tensors().values() if t.is_floating_point()}
    if own != {torch.float32}:
        return None  # a bf16 or fp16 model runs in its own precision, a float64 one too
    if compute == "auto":
        return fast_low_precision(device)
    if compute not in ("bfloat16", "float16", "float32"):
        raise SparsepassError(f"compute dtype {compute!r} is not known; use auto, bfloat16, float16 or float32")
    return None if compute == "float32" else getattr(torch, compute)
