"""Packed layers that read one input, such as q, k and v: the first one called computes all of them in one run of the kernel.

A run on few tokens takes about as long as its weight is read, and a small weight is read before all threads are awake.
"""

import weakref
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import replace
from threading import RLock, local
from typing import Any

import torch
from torch import Tensor

from sparsepass.graph.native import KINDS, PATHS, TORCH
from sparsepass.graph.packed.laid_out import LaidOut, native, products
from sparsepass.graph.packed.module import PackedLinear
from sparsepass.graph.support import SparsepassError

_PATIENCE = 4  # inputs in a row whose other results nobody took, after which layers are run one by one


class _Kept:
    """Results of a thread's last input that wait for the layers they belong to.

    Args:
        num_members: Layers.
    """

    __slots__ = ("addresses", "copy", "num_taken", "results", "version", "weights", "x")

    def __init__(self, num_members: int) -> None:
        self.x: weakref.ref[Tensor] | None = None
        self.copy: Tensor | None = None
        self.version = self.weights = self.num_taken = 0
        self.results: list[Tensor | None] = []
        self.addresses = (c_void_p * num_members)()

    def put(self, x: Tensor, weights: int, results: list[Tensor | None]) -> None:
        """Keep results until they are taken, or their input goes; `weights` says of which weights they are."""
        self.results, self.num_taken, self.weights = results, 0, weights
        self.x = weakref.ref(x, lambda _: results.clear())
        # Tensors of inference mode count no changes: what they held tells then.
        self.copy = x.clone() if x.is_inference() else None
        self.version = 0 if self.copy is not None else x._version

    def take(self, x: Tensor, place: int) -> Tensor | None:
        """The result for a layer, if it is that of this very input, unchanged."""
        if self.x is None or self.x() is not x or not self.results:
            return None
        if not torch.equal(self.copy, x) if self.copy is not None else x._version != self.version:
            return None
        y, self.results[place] = self.results[place], None
        self.num_taken += y is not None
        return y


class _OfThread(local):
    """What each thread has of its own."""

    def __init__(self, num_members: int) -> None:
        self.kept = _Kept(num_members)


class Siblings:
    """Some packed layers whose weights lie one after the other in memory, and their common product.

    Each thread has results of its own. They go as soon as they are taken, or the input goes.

    Args:
        members: The layers.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self.members = list(members)
        self._places = {id(member): place for place, member in enumerate(self.members)}
        self._lock, self._local = RLock(), _OfThread(len(self.members))
        self._whole: LaidOut | None = None
        self._is_off, self._num_untaken, self._num_changes = False, 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]

    def result(self, member: PackedLinear, x: Tensor) -> Tensor | None:
        """The result of one of the layers; None if it has to compute alone.

        Shapes: x ``[..., I]``, the result ``[..., O]``.
        """
        if self._is_off:
            return None
        kept, place = self._local.kept, self._places[id(member)]
        if kept.x is not None:
            if kept.weights == self._num_changes and (y := kept.take(x, place)) is not None:
                return y
            self._num_untaken = 0 if kept.num_taken else self._num_untaken + 1
            self._is_off = self._num_untaken > _PATIENCE
            kept.x = None
        weights, whole = self._num_changes, self._whole or self._laid_out()
        if whole is None or not x.is_cpu or not 0 < x.numel() <= whole.most_tokens * member.in_features:
            return None
        results: list[Tensor | None] = [*products(whole, x, kept.addresses)]
        own, results[place] = results[place], None
        kept.put(x, weights, results)
        return own

    def forget(self) -> None:
        """One of the layers was moved or loaded: its weight lies elsewhere, and results that wait are those of the old one."""
        self._whole = None
        self._num_changes += 1

    def _laid_out(self) -> LaidOut | None:
        """All weights as one."""
        with self._lock:
            self._whole = self._whole or self._laid_together()
            self._is_off = self._whole is None
            return self._whole

    def _laid_together(self) -> LaidOut | None:
        ready = [each.lay_out().laid_out() for each in self.members]
        form = replace(ready[0].form, rows=sum(each.form.rows for each in ready))
        if form.path == TORCH or any(replace(each.form, rows=form.rows) != form for each in ready):
            return None
        library, kind = native(form.path), KINDS[form.values]
        multiple = library.row_multiple(PATHS[form.path], kind, form.columns)
        if any(each.form.rows % multiple for each in ready[:-1]):
            return None
        data = torch.empty(sum(each.data.nbytes for each in ready), dtype=torch.uint8)
        if data.nbytes != library.laid_out_bytes(PATHS[form.path], kind, form.rows, form.columns):
            return None
        library.huge_pages(data.data_ptr(), data.nbytes)
        for member, part in zip(self.members, data.split([each.data.nbytes for each in ready]), strict=True):
            part.copy_(member.laid_out().data)
            member._buffers["data"] = part
            member._ready = None  # which has the old place, and would keep it
        biases = [each.bias if each.bias is not None else torch.zeros(each.form.rows) for each in ready]
        return LaidOut(
            form,
            data,
            scales=self._parameter_of_all("scales"),
            branch=self._parameter_of_all("slorb_weight") if form.k else None,
            bias=torch.cat(biases) if any(each.bias is not None for each in ready) else None,
            parts=[each.form.rows for each in ready],
        )

    def _parameter_of_all(self, name: str) -> Tensor | None:
        """A parameter of all layers as one tensor, of which each layer's becomes a part."""
        parameters = [p for each in self.members if (p := each._parameters[name]) is not None]
        if not parameters:
            return None
        whole = torch.cat([p.data for p in parameters])
        for parameter, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
            parameter.data = part
        return whole


def group_siblings(modules: Sequence[PackedLinear]) -> bool:
    """Let layers that read the same input be computed in one run of the kernel.

    Whoever is called first with an input of few tokens computes the results of all; the others take theirs if they are
    called with the very same tensor, unchanged, and else compute alone. Copies, moves and new weights keep the group. Compilers
    and exporters see each layer by itself.

    Args:
        modules: Two layers or more, each in one group at most.

    Returns:
        Whether their weights could be laid together: they have to be of one kind, with the same groups of scales and the same
        branch. If not, nothing changes.

    Raises:
        SparsepassError: If their inputs differ in size.

    Example:
        >>> up, gate = PackedLinear(128, 64), PackedLinear(128, 64)
        >>> x = torch.ones(1, 128)
        >>> grouped = group_siblings([up, gate])
        >>> bool((up(x) == gate(x)).all())
        True
    """
    if len(modules) < 2:
        raise SparsepassError(f"siblings are two layers or more, and here is {len(modules)}")
    if len({each.in_features for each in modules}) > 1:
        raise SparsepassError(f"siblings read one input, and these take {[each.in_features for each in modules]} features")
    siblings = Siblings(modules)
    if siblings._laid_out() is None:
        return False
    for each in modules:
        each.siblings = siblings
    return True
