"""Walks a graph in its order and follows channels from where they are made to where they are summed up.

Operations that only move elements run on labels as they do on values, so views into heads, splits and repeats need no rules of
their own. What is computed from the inputs alone (masks, positions, rotary angles) is computed, since channels that meet
different values do not change places.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from sparsepass.graph.channels import ops
from sparsepass.graph.channels.labels import Ints, Labels
from sparsepass.graph.channels.values import Channels, Leaf, distinct, fits_fewer, rows_met, shape_of, varying
from sparsepass.graph.nodes import is_mutable, module_path, op_name, tensor_of
from sparsepass.graph.placement import moved
from sparsepass.graph.program import Program

_aten = torch.ops.aten
_HERE = torch.device("cpu")
"""Labels and data are computed here, wherever the program is: on a GPU, or on the meta device."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Axes of a stored tensor that channels run along.

    Attributes:
        tensor: Its name.
        axes: Which of its axes; several where channels are told apart by several.
        reads: Whether the tensor sums over the channels there; otherwise it makes them, or is applied element by element.
        offset: What the graph adds to the tensor, as in ``1 + weight``.
        places: Label of each element along the axes, flat.
        scales: Label of the factor that it can take up, flat.
    """

    tensor: str
    axes: tuple[int, ...]
    reads: bool
    places: Ints
    scales: Ints
    offset: float = 0.0


def is_tensor(value: Any) -> bool:
    """Whether a value of the walk stands for a tensor."""
    return isinstance(value, Tensor | Leaf | Channels)


@final
class Walk:
    """One walk over a program's graph.

    Attributes:
        places: What is found out about who moves with whom.
        scales: What is found out about factors.
        slots: Where channels lie in stored tensors.
        masks: Weight -> the mask that it stands behind.
        salt: Another number at each operation.
        gains: Slots whose channels' numbers are multiplied into others, tensor and axes.
        factors: Slots that are multiplied into anything element by element, data included.
        terms: Slots that are added element by element.
        vectors: Slots that make channels by themselves.
        even: Parts of one value that have to stay equally long.
        given: Nodes whose values come from the inputs of the model: what they hold is an example, and says nothing of others.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.places, self.scales = Labels(), Labels()
        self.slots: dict[tuple[str, tuple[int, ...], bool], Slot] = {}
        self.masks: dict[str, str] = {}
        self.node: fx.Node
        self._lost: dict[str, str] = {}
        self.salt = 0
        self.gains: set[tuple[str, tuple[int, ...]]] = set()
        self.factors: set[tuple[str, tuple[int, ...]]] = set()
        self.terms: set[tuple[str, tuple[int, ...]]] = set()
        self.vectors: set[tuple[str, tuple[int, ...]]] = set()
        self.even: list[tuple[Ints, ...]] = []
        self.given: set[fx.Node] = set()

    def run(self, rules: Mapping[str, Callable[..., Any]]) -> None:
        """Walk the whole graph, each operation by the rule of its name."""
        env: dict[fx.Node, Any] = {}
        last = {source: node for node in self.program.graph_module.graph.nodes for source in node.all_input_nodes}
        for node in self.program.graph_module.graph.nodes:
            self.node, self.salt = node, self.salt + 1
            of_inputs = op_name(node) not in ops.BY_SHAPE and not self.given.isdisjoint(node.all_input_nodes)
            if node.op == "placeholder" or of_inputs:
                self.given.add(node)
            if node.op == "placeholder":
                env[node] = _standing_in(self.program.example_inputs[str(node.target)])
            elif node.op == "get_attr":
                env[node] = self._read(str(node.target))
            elif node.op == "output":
                self._outputs(fx.node.map_arg(node.args, env.__getitem__))
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = self._call(rules, node, args, kwargs)
                if is_mutable(node.target):
                    env[node.args[0]] = env[node]
                    self.given |= {node.args[0]} if node in self.given else set()
            for source in node.all_input_nodes:
                if last[source] is node:
                    env.pop(source, None)
        for name, reason in self._lost.items():
            self._pin_slots(name, reason)

    def _read(self, name: str) -> Any:
        tensor = tensor_of(self.program.graph_module, name)
        if isinstance(tensor, torch.nn.Parameter):
            return Leaf(name, torch.arange(tensor.numel()).reshape(tensor.shape))
        return _standing_in(tensor) if tensor.is_meta else tensor.to(_HERE)

    def _call(self, rules: Mapping[str, Callable[..., Any]], node: fx.Node, args: tuple[Any, ...], kwargs: Any) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        found = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs), is_leaf=is_tensor) if is_tensor(leaf)]
        if all(isinstance(leaf, Tensor) for leaf in found):
            args, kwargs = tree_map(lambda leaf: moved(leaf, _HERE), (args, kwargs))
            if node.target is _aten.histc.default and not args[0].is_floating_point():  # a graph for a GPU has it so
                return node.target(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        for leaf in found:
            if isinstance(leaf, Channels) and leaf.is_squared and op_name(node) not in ops.KEEP_SQUARES:
                self.places.bar("mixing", leaf.places.numpy(), f"it is squared, and {op_name(node)} reads that{self.here}")
        rule = rules.get(op_name(node))
        result = rule(self, args, kwargs) if rule is not None else NotImplemented
        return self.unknown(args, kwargs) if result is NotImplemented else result

    def _outputs(self, args: Any) -> None:
        for leaf in torch.utils._pytree.tree_leaves(args, is_leaf=is_tensor):
            if isinstance(leaf, Channels):
                self.places.pin(leaf.places.numpy(), "it is an output of the model")
                self.pin_scales(leaf, "it is an output of the model")
            elif isinstance(leaf, Leaf):
                self.lose(leaf, "it is an output of the model")

    # What rules use.

    def unknown(self, args: Any, kwargs: Any) -> Any:
        """An operation that has no rule: nothing that goes in may be changed, and what comes out counts as data."""
        reason = f"{op_name(self.node)}{self.here} reads it in a way that is not understood"

        def as_data(leaf: Any) -> Any:
            if isinstance(leaf, Channels):
                self.places.pin(leaf.places.numpy(), reason)
                self.scales.pin(leaf.scales.numpy(), reason)
            elif isinstance(leaf, Leaf):
                self.lose(leaf, reason)
            else:
                return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            return torch.rand(shape_of(leaf))

        args, kwargs = torch.utils._pytree.tree_map(as_data, (args, kwargs), is_leaf=is_tensor)
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def may_hold_numbers(self, value: Any, source: Any) -> bool:
        """Whether data may be something else than zeros.

        Args:
            value: What stands for it here.
            source: The node's argument that gives it.
        """
        return isinstance(value, Tensor) and (source in self.given or bool(value.any()))

    def slot(self, name: str, axes: tuple[int, ...], *, reads: bool, offset: float = 0.0) -> Slot:
        """The slot of a stored tensor, made when it is met first. Two uses of one slot share their labels."""
        key = (self.program.aliases.get(name, name), axes, reads)
        if key not in self.slots:
            shape = tensor_of(self.program.graph_module, key[0]).shape
            count = int(np.prod([shape[axis] for axis in axes]))
            other = self.slots.get((*key[:2], not reads))  # a tied embedding is read and looked up along one axis
            places = other.places if other is not None else self.places.fresh(count)
            scales = self.scales.fresh(count)
            self.slots[key] = Slot(tensor=key[0], axes=axes, reads=reads, places=places, scales=scales, offset=offset)
            if other is not None:
                self.scales.pin(np.concatenate([scales, other.scales]), f"{name} makes it and sums over it")
        found = self.slots[key]
        if found.offset != offset:
            self.scales.pin(found.scales, f"{name} is used in two ways")
        return found

    def lose(self, stored: Leaf, reason: str) -> None:
        """A parameter is used in a way that is not followed: whatever runs along any of its axes stays."""
        self._lost.setdefault(self.program.aliases.get(stored.name, stored.name), reason)

    def _pin_slots(self, name: str, reason: str) -> None:
        for slot in [slot for slot in self.slots.values() if slot.tensor == name]:
            self.places.pin(slot.places, reason)
            self.scales.pin(slot.scales, reason)

    def pin_scales(self, value: Channels, reason: str) -> None:
        """What is read here carries no factor."""
        self.scales.pin(value.scales.numpy(), reason + self.here)

    @property
    def here(self) -> str:
        """Where the operation stands, as the end of a reason."""
        path = module_path(self.node) if self.node.op == "call_function" else ""
        return f" ({path})" if path else ""

    def born(self, shape: Sequence[int], slot: Slot) -> Channels:
        """A value whose last axis are a slot's channels."""
        places = torch.from_numpy(slot.places).expand(*shape)
        self.vectors.add((slot.tensor, slot.axes))
        return Channels(places, torch.from_numpy(slot.scales).expand(*shape))

    def adopt(self, stored: Leaf, like: Tensor, *, is_factor: bool = False, is_gain: bool = False) -> Channels:
        """A parameter that meets labelled channels element by element, in their shape: it holds the same channels.

        Args:
            stored: The parameter.
            like: Labels of what it meets.
            is_factor: Whether it is multiplied with what it meets; otherwise it is added to that.
            is_gain: Whether it is a factor, and what it meets is made by parameters.
        """
        shape = torch.broadcast_shapes(stored.index.shape, like.shape)
        index, like = stored.index.expand(shape), like.expand(shape)
        axes, names = set(varying(like)), []
        size = tensor_of(self.program.graph_module, stored.name).shape
        where = np.unravel_index(index.numpy(), size) if size else ()
        for axis, place in enumerate(where):
            if axes & set(varying(torch.from_numpy(np.ascontiguousarray(place)))):
                names.append(axis)
        if not names:
            return Channels(torch.zeros_like(like), torch.zeros_like(like))
        slot = self.slot(stored.name, tuple(names), reads=False, offset=stored.offset or 0.0)
        (self.gains if is_gain else self.vectors).add((slot.tensor, slot.axes))
        (self.factors if is_factor else self.terms).add((slot.tensor, slot.axes))
        flat = np.ravel_multi_index([where[axis] for axis in names], [size[axis] for axis in names])
        self.places.join(slot.places[flat], like.numpy())
        if len(names) == 1 and not fits_fewer(stored, size, names[0]):
            self.places.bar("removal", like.numpy(), f"{stored.name} is laid out by the number of its channels{self.here}")
        scales = slot.scales[flat]
        if stored.offset is None:
            self.scales.pin(scales, f"{stored.name} is not applied as it is stored")
            scales = np.zeros_like(scales)
        return Channels(like, torch.from_numpy(scales))

    def of_itself(self, stored: Leaf, shape: torch.Size) -> Tensor:
        """Labels of a parameter that makes channels by itself, since what it meets has none."""
        size = tensor_of(self.program.graph_module, stored.name).shape
        axes = tuple(axis for axis, count in enumerate(size) if count > 1)
        if not axes:
            return torch.zeros(shape, dtype=torch.int64)
        slot = self.slot(stored.name, axes, reads=False, offset=stored.offset or 0.0)
        self.vectors.add((slot.tensor, slot.axes))
        return torch.from_numpy(slot.places[stored.index.expand(shape).numpy()])

    def any_data(self, value: Any, source: Any) -> Any:
        """What an argument may hold: numbers that all differ, where the inputs of the model decide; otherwise what it holds.

        Args:
            value: What stands for it here.
            source: The node's argument that gives it.
        """
        if not isinstance(value, Tensor) or source not in self.given:
            return value
        return torch.rand(value.shape, generator=torch.Generator().manual_seed(self.salt))

    def meet_data(self, labels: Tensor, data: Tensor, source: Any) -> None:
        """Channels meet data element by element: those that meet different values, or may with other inputs, are told apart.

        Args:
            labels: Of the channels.
            data: What they meet.
            source: The node's argument that gives it.
        """
        data = self.any_data(data, source)
        shape = torch.broadcast_shapes(labels.shape, data.shape)
        sizes = [1] * (len(shape) - data.dim()) + list(data.shape)
        labels, data = labels.expand(shape), data.expand(shape)
        if any(sizes[axis] > 1 for axis in varying(labels)):
            reason = f"it meets numbers for each channel that no parameter holds{self.here}"
            self.places.bar("removal", labels.numpy(), reason)
        if set(varying(data)) & set(varying(labels)):
            self.places.tell_apart(*rows_met(labels, data, self.salt))

    def meet_part(self, labels: Tensor, whole: Tensor, number: int) -> None:
        """Some elements go on by themselves: channels that are among them more often are told apart from the others."""
        if labels.numel() >= whole.numel() and op_name(self.node) not in ops.PICKING:
            return
        found, times = np.unique(labels.numpy(), return_counts=True)
        if labels.numel() >= whole.numel():
            every, before = np.unique(whole.numpy(), return_counts=True)
            if len(found) == len(every) and (times * before[0] == before * times[0]).all():
                return
        salt = np.uint64((self.salt * 1_000_003 + number) & 0xFFFFFFFF)
        self.places.tell_apart(found, times.astype(np.uint64) * np.uint64(2_654_435_761) + salt)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Labels of what is computed element by element from two values.

        Where both have the same axes of channels, these are joined. Where the one has more, its channels move only with those
        of the other, as the channels of a head with the head.
        """
        first, second = torch.broadcast_tensors(first, second)
        ours, theirs = set(varying(first)), set(varying(second))
        if not ours or not theirs:
            return second if theirs else torch.where(first > 0, first, second)
        if ours == theirs:
            self.places.join(first.numpy(), second.numpy())
            return torch.where(first > 0, first, second)
        if ours > theirs:
            self.places.link(first.numpy(), second.numpy())
            return first
        if ours < theirs:
            self.places.link(second.numpy(), first.numpy())
            return second
        return self._pairs(first, second)

    def _pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """Channels of an outer product: one for each pair."""
        both = np.stack([first.numpy().reshape(-1), second.numpy().reshape(-1)])
        pairs, index = np.unique(both, axis=1, return_inverse=True)
        labels = self.places.fresh(pairs.shape[1])
        for row in pairs:
            self.places.link(labels, row)
        return torch.from_numpy(labels[index.reshape(-1)].reshape(first.shape))

    def blocks(self, labels: Tensor, reduced: Sequence[int]) -> tuple[Tensor, bool]:
        """What is left of labels when axes are summed up that channels run along: a label for each block, such as a head.

        Returns:
            Labels with size 1 along the reduced axes, 0 where nothing is told apart any more; and whether blocks overlap, so
            that the elements of a sum are different channels of one result, as those of several experts.
        """
        axes = varying(labels)
        kept = [axis for axis in axes if axis not in reduced]
        shape = [1 if axis in reduced or axis not in axes else size for axis, size in enumerate(labels.shape)]
        if not kept:
            return torch.zeros(shape, dtype=torch.int64), False
        gone = [axis for axis in axes if axis in reduced]
        sizes = [labels.shape[axis] for axis in kept]
        rows = distinct(labels, [*kept, *gone]).reshape(int(np.prod(sizes)), -1)
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        if np.unique(unique).size < sum(np.unique(row).size for row in unique):
            return labels, True
        found = self.places.fresh(len(unique))
        self.places.link(unique, np.broadcast_to(found[:, None], unique.shape))
        return torch.from_numpy(found[inverse.reshape(-1)].reshape(shape)), False

    def flattened(self, value: Channels, axis: int) -> Channels:
        """The same channels for all places along an axis: what lies there is joined."""
        first = replace(value, places=value.places.narrow(axis, 0, 1), scales=value.scales.narrow(axis, 0, 1))
        self.places.join(value.places.numpy(), first.places.expand_as(value.places).numpy())
        self.scales.join(value.scales.numpy(), first.scales.expand_as(value.scales).numpy())
        return first


def _standing_in(tensor: Tensor) -> Tensor:
    """Values for an input: floats that all differ, so that none is taken for a constant; whole numbers as they are."""
    if tensor.is_floating_point():
        return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()
