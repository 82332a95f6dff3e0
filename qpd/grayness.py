"""Reads what paths lose and how long their round trips take, for :mod:`qpd.core.gray` to compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qpd.core.gray import GrayBook, GrayConfig, Sample
from qpd.kernel.layout import rtt_bounds_ns
from qpd.kernel.maps import Maps
from qpd.model import Event, Group, Hook, Path, PathState


class GrayWatch:
    """One node's paths. A look costs a few system calls: tens of microseconds, where delays are not compared."""

    def __init__(self, maps: Maps, config: GrayConfig) -> None:
        self._maps = maps
        self._delays = config.delay is not None
        self._book = GrayBook(config, rtt_bounds_ns() / 1e9)

    def look(self, paths: Sequence[Path], groups: Sequence[Group], now: float) -> list[Event]:
        """What has changed at ``now`` (CLOCK_MONOTONIC, seconds)."""
        if len(paths) < 2:
            return []
        counters = self._maps.counters()
        trips = self._maps.round_trips() if self._delays else None
        leaving, arriving = counters.faults[Hook.STEER], counters.faults[Hook.OBSERVE]
        missing = arriving["missing"].astype(np.int64) - arriving["out_of_order"].astype(np.int64)
        samples = {
            path.id: Sample(
                packets_out=int(counters.packets[Hook.STEER, path.id]),
                resent_out=int(leaving["retransmitted"][path.id]),
                lost_out=int(leaving["lost_behind"][path.id]),
                packets_in=int(counters.packets[Hook.OBSERVE, path.id]),
                lost_in=max(int(missing[path.id]), 0),
                rtt=None if trips is None else trips.buckets[path.id].copy(),
            )
            for path in paths
        }
        serving = [path.id for path in paths if path.state is PathState.UP]
        return self._book.observe(samples, serving, [group.members for group in groups], now)
