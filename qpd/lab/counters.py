"""Link load over time, from the kernel's interface counters."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.lab.fabric import Fabric
from qpd.lab.rtnetlink import Counters, Socket
from qpd.lab.topology import Endpoint


@dataclass
class Series:
    """Readings of counters: `readings[i][endpoint]` was taken at `times_ns[i]` (CLOCK_MONOTONIC)."""

    endpoints: tuple[Endpoint, ...]
    times_ns: list[int] = field(default_factory=list)
    readings: list[dict[Endpoint, Counters]] = field(default_factory=list)

    def total(self, endpoint: Endpoint, counter: str = "tx_packets") -> int:
        """What a counter has gained from the first reading to the last."""
        return int(
            getattr(self.readings[-1][endpoint], counter) - getattr(self.readings[0][endpoint], counter)
        )

    def totals(self, counter: str = "tx_packets") -> dict[Endpoint, int]:
        """`total` of every endpoint."""
        return {endpoint: self.total(endpoint, counter) for endpoint in self.endpoints}

    def rates(self, endpoint: Endpoint, counter: str = "tx_bytes") -> npt.NDArray[np.float64]:
        """A counter's gain per second in each interval: one value less than there are readings."""
        values = np.array(
            [getattr(reading[endpoint], counter) for reading in self.readings], dtype=np.float64
        )
        times = np.array(self.times_ns, dtype=np.float64) / 1e9
        return np.diff(values) / np.diff(times)

    def to_json(self) -> dict[str, Any]:
        """For files: times, and for every endpoint the readings of transmitted and received bytes and packets."""
        names = ("tx_bytes", "tx_packets", "rx_bytes", "rx_packets")
        return {
            "times_ns": self.times_ns,
            "links": {
                str(endpoint): {
                    name: [getattr(reading[endpoint], name) for reading in self.readings] for name in names
                }
                for endpoint in self.endpoints
            },
        }


class Sampler:
    """Reads the counters of endpoints every `interval` seconds for the time of an `async with` block."""

    def __init__(self, fabric: Fabric, endpoints: Sequence[Endpoint], interval: float = 0.1) -> None:
        self.series = Series(tuple(endpoints))
        self._fabric = fabric
        self._interval = interval
        self._sockets: dict[str, Socket] = {}
        self._task: asyncio.Task[None] | None = None

    def read(self) -> None:
        """Take one reading now."""
        now = time.monotonic_ns()
        counters = {node: netlink.counters() for node, netlink in self._sockets.items()}
        self.series.times_ns.append(now)
        self.series.readings.append({end: counters[end.node][end.interface] for end in self.series.endpoints})

    async def __aenter__(self) -> Sampler:
        for node in dict.fromkeys(end.node for end in self.series.endpoints):
            self._sockets[node] = Socket(self._fabric.namespace(node))
        self.read()
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.read()
        for netlink in self._sockets.values():
            netlink.close()

    async def _sample(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._interval, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            self.read()
