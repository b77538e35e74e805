"""Labels of channels, and what is found out about them: which are one, which move with which, which are told apart.

A label is a whole number above 0. Two labels that are joined are one class of channels: whatever is done to the one has to be
done to the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Barred = Literal["mixing", "mixing off the mean", "removal", "negative factors"]
"""What channels may not bear that change places: an orthogonal matrix, one that moves their mean, being taken out; and
what those may not that carry factors."""

_MIX = np.uint64(0x9E3779B97F4A7C15)


def mixed(values: Hashes) -> Hashes:
    """Spread the bits of hashes, so that sums of them do not meet by accident (splitmix64)."""
    values = values + _MIX
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Classes:
    """What is known of all labels once a graph has been walked.

    Attributes:
        of_label: Class of each label; label 0 stands for no channel and has class 0.
        color: Of each class; classes of different colors meet different things.
        pinned: Class -> why it stays where it is.
        mixed_color: Classes that have the same color, and another one here, change places and are not mixed.
        has_children: Whether others move with a class, as the channels of a head do with the head.
        barred: What classes may not bear -> class -> why.
    """

    of_label: Ints
    color: Hashes
    mixed_color: Hashes
    pinned: dict[int, str]
    has_children: npt.NDArray[np.bool_]
    barred: Mapping[Barred, Mapping[int, str]]


class Labels:
    """Collects what is found while a graph is walked. Final."""

    def __init__(self) -> None:
        self._next = 1
        self._fixed = np.zeros(1, dtype=np.bool_)
        self._joined: list[Ints] = []
        self._links: list[Ints] = []
        self._colors: list[tuple[Ints, Hashes]] = []
        self._mixed_colors: list[tuple[Ints, Hashes]] = []
        self._pins: list[tuple[Ints, str]] = []
        self._bars: list[tuple[Barred, Ints, str]] = []

    def fresh(self, count: int) -> Ints:
        """So many new labels."""
        found = np.arange(self._next, self._next + count, dtype=np.int64)
        self._next += count
        self._fixed = np.concatenate([self._fixed, np.zeros(count, dtype=np.bool_)])
        return found

    def join(self, first: Ints, second: Ints) -> None:
        """Make labels at equal places one class. Where either is 0, there is nothing to join."""
        pairs = np.stack([first.reshape(-1), second.reshape(-1)])
        pairs = pairs[:, (pairs > 0).all(0) & (pairs[0] != pairs[1])]
        if pairs.size:
            self._joined.append(np.unique(pairs, axis=1))

    def link(self, children: Ints, parents: Ints) -> None:
        """Let labels move only with what their parents do."""
        pairs = np.stack([children.reshape(-1), parents.reshape(-1)])
        pairs = pairs[:, (pairs > 0).all(0) & (pairs[0] != pairs[1])]
        if pairs.size:
            self._links.append(np.unique(pairs, axis=1))

    def tell_apart(self, labels: Ints, hashes: Hashes, *, mixed_only: bool = False) -> None:
        """Note what labels meet: classes that meet different things do not change places, or are only not mixed."""
        kept = labels > 0
        if kept.any():
            (self._mixed_colors if mixed_only else self._colors).append((labels[kept], mixed(hashes[kept])))

    def pin(self, labels: Ints, reason: str) -> None:
        """Let labels stay where they are."""
        found = np.unique(labels)
        if (found := found[found > 0]).size:
            self._pins.append((found, reason))
            self._fixed[found] = True

    def bar(self, what: Barred, labels: Ints, reason: str) -> None:
        """Note what labels may not bear."""
        found = np.unique(labels)
        if (found := found[found > 0]).size:
            self._bars.append((what, found, reason))

    def unpinned(self, labels: Ints) -> Ints:
        """The same labels, 0 in the place of those that have been pinned so far themselves."""
        return np.where(self._fixed[labels], 0, labels)

    def solve(self) -> Classes:
        """Put everything together."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._joined, axis=1) if self._joined else np.zeros((2, 0), dtype=np.int64)
        matrix = coo_array((np.ones(pairs.shape[1], dtype=np.bool_), (pairs[0], pairs[1])), shape=(self._next, self._next))
        count, of_label = connected_components(matrix, directed=False)
        of_label = of_label.astype(np.int64)
        color, mixed_color = np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.uint64)
        for shade, notes in ((color, self._colors), (mixed_color, self._mixed_colors)):
            for labels, hashes in notes:
                np.add.at(shade, of_label[labels], hashes)
        has_children = np.zeros(count, dtype=np.bool_)
        if self._links:
            links = np.unique(of_label[np.concatenate(self._links, axis=1)], axis=1)
            links = links[:, links[0] != links[1]]
            has_children[links[1]] = True
            np.add.at(color, links[0], mixed(links[1].astype(np.uint64) * _MIX))
        pinned: dict[int, str] = {}
        for labels, reason in self._pins:
            for found in np.unique(of_label[labels]).tolist():
                pinned.setdefault(found, reason)
        barred: dict[Barred, dict[int, str]] = {"mixing": {}, "mixing off the mean": {}, "removal": {}, "negative factors": {}}
        for what, labels, reason in self._bars:
            for found in np.unique(of_label[labels]).tolist():
                barred[what].setdefault(found, reason)
        return Classes(of_label, color, mixed_color, pinned, has_children, barred)
