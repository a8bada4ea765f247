"""Names for channels: every channel of every tensor carries an id, and ids that must live or die together are tied.

A union-find over integers (Galler and Fischer 1964). What is one set after the whole graph was walked is one unit of
pruning. The idea of finding coupled structures in a graph of operations follows DepGraph (Fang et al. 2023,
arXiv:2301.12900); naming each channel instead of each layer makes concatenation, flattening and slicing one case.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: Reasons of mobile_bench.records.SKIP_REASONS, the one that says most first: without what a user asked for, the
#: channels might stay all the same.
FIRST_OR_LAST = "first or last layer"
UNSUPPORTED = "not supported by the technique"
SHAPE = "shape does not allow it"
EXCLUDED = "excluded by the recipe"
_ORDER = (FIRST_OR_LAST, UNSUPPORTED, SHAPE, EXCLUDED)


@dataclass(frozen=True, eq=False)
class Label:
    """Which channels a tensor carries: ids (size of the axis,) along one axis, the batch being axis 0.

    Along every other axis the tensor holds the same channels, so removing some leaves it rectangular.
    """

    axis: int
    ids: np.ndarray


@dataclass(frozen=True)
class Reason:
    """Why channels stay: one of the four above and a sentence."""

    kind: str
    detail: str

    @property
    def rank(self) -> int:
        return _ORDER.index(self.kind)


class Ids:
    """All channels of a model in the making."""

    def __init__(self):
        self._parent: list[int] = []
        self._fixed: list[tuple[np.ndarray, Reason]] = []

    def new(self, count: int) -> np.ndarray:
        """So many channels that nothing is tied to."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def tie(self, one: np.ndarray, other: np.ndarray) -> None:
        """Channel by channel, what happens to the one happens to the other."""
        if one is other:
            return
        if one.shape != other.shape:
            raise ValueError(f"channels of two shapes cannot be tied: {one.shape} and {other.shape}")
        for a, b in zip(one.ravel().tolist(), other.ravel().tolist()):
            a, b = self._find(a), self._find(b)
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def fix(self, ids: np.ndarray, reason: Reason) -> None:
        """These channels stay, and all that are tied to them, now or later."""
        self._fixed.append((ids.ravel().copy(), reason))

    def is_fixed(self, ids: np.ndarray) -> bool:
        """Whether all of these channels are known to stay so far."""
        fixed = {self._find(x) for array, _ in self._fixed for x in array.tolist()}
        return all(self._find(x) in fixed for x in ids.ravel().tolist())

    def units(self) -> np.ndarray:
        """The unit of each id: int (ids,), counted from 0."""
        roots = np.array([self._find(x) for x in range(len(self._parent))], dtype=np.int64)
        return np.unique(roots, return_inverse=True)[1].reshape(-1) if len(roots) else roots

    def fixed(self, units: np.ndarray) -> dict[int, Reason]:
        """unit -> why it stays."""
        found: dict[int, Reason] = {}
        for ids, reason in sorted(self._fixed, key=lambda entry: entry[1].rank):
            for unit in units[ids].tolist():
                found.setdefault(unit, reason)
        return found

    def _find(self, x: int) -> int:
        parent = self._parent
        root = x
        while parent[root] != root:
            root = parent[root]
        while parent[x] != root:
            parent[x], x = root, parent[x]
        return root


class Keep:
    """Which channels stay once a choice is made. removed: units, as `Dependencies.units` numbers them."""

    def __init__(self, units: np.ndarray, removed: Iterable[int] = ()):
        self._units = units
        self._stays = np.ones(int(units.max()) + 1 if len(units) else 0, bool)
        removed = np.asarray(list(removed), dtype=np.int64)
        self._stays[removed] = False

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """True for each channel that stays, in the shape of ids."""
        return self._stays[self._units[ids]]

    def count(self, ids: np.ndarray) -> int:
        return int(np.count_nonzero(self.mask(ids)))

    def all(self, ids: np.ndarray) -> bool:
        return bool(self.mask(ids).all())
