"""Round-trip times of paths: from the kernel's fine buckets to medians, and to what Prometheus keeps. Pure.

The kernel counts each path's samples since the path has its id (``struct path_rtt`` in ``ebpf/maps.h``); its buckets
are 1.6 % wide at most. What people are shown is of the last seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.kernel.layout import RTT_DOUBLINGS, RTT_STEPS, rtt_bounds_ns
from qpd.kernel.maps import RoundTrips
from qpd.metrics import Distribution, Native

Counts = npt.NDArray[np.uint64]

WINDOW = 10.0
"""Seconds: what is called recent is of the last one to two windows."""

_UPPER = rtt_bounds_ns().astype(np.float64)
_LOWER = np.concatenate(([0.0], _UPPER[:-1]))

_COARSE = RTT_STEPS // 2
"""Kernel buckets in one of Prometheus' classic ones: two a doubling."""
_BOUNDS = tuple((_UPPER[_COARSE - 1 :: _COARSE] / 1e9)[:-1].tolist())
"""The longest kernel bucket also holds what is longer still: that is +Inf's."""

_SCHEMA = 4
"""Of native histograms: sixteen buckets a doubling, 4.4 % wide."""
_NATIVE = np.ceil(np.log2((_LOWER + _UPPER) / 2e9) * 2**_SCHEMA).astype(np.int64)
"""The native bucket in which the middle of each kernel bucket lies."""


def quantile_ns(counts: npt.NDArray[Any], share: float) -> float | None:
    """The time that ``share`` (0 to 1) of the samples do not exceed, to 1.6 %; None where there are none."""
    total = int(counts.sum())
    if not total:
        return None
    reached = np.cumsum(counts)
    wanted = share * total
    at = min(int(np.searchsorted(reached, wanted)), len(counts) - 1)
    inside = (wanted - float(reached[at] - counts[at])) / max(float(counts[at]), 1.0)
    return float(_LOWER[at] + (_UPPER[at] - _LOWER[at]) * min(max(inside, 0.0), 1.0))


def distribution(counts: npt.NDArray[Any], sum_ns: int) -> Distribution:
    """All samples of a path, as Prometheus keeps them."""
    coarse = counts.reshape(2 * RTT_DOUBLINGS, _COARSE).sum(axis=1).tolist()
    first = int(_NATIVE[0])
    native = np.bincount(_NATIVE - first, weights=counts)
    return Distribution(
        _BOUNDS,
        tuple(int(count) for count in coarse),
        sum_ns / 1e9,
        Native(_SCHEMA, {first + at: int(native[at]) for at in np.flatnonzero(native).tolist()}),
    )


class Recent:
    """Remembers the counts of one to two windows ago. ``take`` and ``of`` may be called from two threads."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._since = 0.0
        self._older: dict[int, Counts] | None = None
        self._newer: dict[int, Counts] = {}

    def take(self, now: float, trips: RoundTrips) -> None:
        """Note what the kernel has counted until ``now`` (seconds); to be called once a window or more often."""
        if self._older is not None and now - self._since < self._window:
            return
        taken = {int(id_): trips.buckets[id_].copy() for id_ in np.flatnonzero(trips.samples)}
        self._older = taken if self._older is None else self._newer
        self._newer, self._since = taken, now

    def of(self, path: int, trips: RoundTrips) -> Counts:
        """The path's samples since one to two windows ago, by kernel bucket."""
        counts: Counts = trips.buckets[path]
        before = (self._older or {}).get(path)
        # Fewer than there were: the id has gone to another path, and counts from 0.
        if before is None or (counts < before).any():
            return counts
        return counts - before
