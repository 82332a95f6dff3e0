"""What is watched during a trial: the counters of the compared links, and a sample of which queue pair takes which."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qpd.lab.counters import Sampler, Series
from qpd.lab.experiment import tiers
from qpd.lab.experiment.raw import Trial
from qpd.lab.experiment.sightings import SIGHTING, Watch, address
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Endpoint, Link

INTERVAL = 0.1
"""Seconds between two readings of counters, and the width of a sample's bin."""


class Observation:
    """Watches for the time of an `async with` block; afterwards holds what was seen."""

    def __init__(self, fabric: Fabric, groups: Sequence[tiers.Group]) -> None:
        self.groups = list(groups)
        self.begin_ns = 0
        far = tiers.far_ends(fabric.topology, self.groups)
        self._sent = {receiving: sending for sending, receiving in far.items()}
        self.links: dict[Endpoint, Link] = {end: fabric.topology.link(str(end)) for end in far}
        self.sightings: npt.NDArray[np.void] = np.zeros(0, dtype=SIGHTING)
        self._fabric = fabric
        self._watch: Watch | None = None
        self._sampler: Sampler | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Observation:
        self._watch = Watch(self._fabric, list(self._sent))
        self._sampler = Sampler(self._fabric, list(self.links), INTERVAL)
        self.begin_ns = time.monotonic_ns()
        await self._sampler.__aenter__()
        self._task = asyncio.create_task(self._drain())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._watch is not None
        assert self._sampler is not None
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._sampler.__aexit__(*exc)
        self._drain_now()
        self.sightings = self._watch.sightings()
        self._watch.close()

    async def _drain(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            self._drain_now()

    def _drain_now(self) -> None:
        assert self._watch is not None
        self._watch.drain(time.monotonic_ns() - time.time_ns())

    @property
    def series(self) -> Series:
        """The counters of the links' sending ends."""
        assert self._sampler is not None
        return self._sampler.series

    def seconds(self, time_ns: float) -> float:
        """A reading of CLOCK_MONOTONIC as seconds from the begin of the observation."""
        return (time_ns - self.begin_ns) / 1e9

    def sending_end(self, index: int) -> Endpoint:
        """The sending end of the link that a sighting's `link` means."""
        assert self._watch is not None
        return self._sent[self._watch.endpoints[index]]

    def link_by_index(self) -> dict[int, Link]:
        """What a sighting's `link` means."""
        return {index: self.links[end] for index, end in enumerate(self._sent.values())}

    def factors(self) -> dict[str, float]:
        """The measures of how even the loads were."""
        return tiers.factors(self.groups, self.series.totals("tx_bytes"))

    def placement(self, until_ns: int | None = None) -> dict[tuple[str, int], set[Endpoint]]:
        """Where each QP (destination address, number) was seen: sending ends; up to a time."""
        seen = self.sightings
        if until_ns is not None:
            seen = seen[seen["time_ns"] < until_ns]
        found: dict[tuple[str, int], set[Endpoint]] = {}
        for destination, qp, link in np.unique(seen[["destination", "qp", "link"]]).tolist():
            found.setdefault((address(destination), qp), set()).add(self.sending_end(link))
        return found

    def write(self, trial: Trial) -> None:
        """Add rows of loads and paths."""
        for group in self.groups:
            for end in group.ends:
                previous = None
                for time_ns, reading in zip(self.series.times_ns, self.series.readings, strict=True):
                    now = reading[end]
                    if previous is not None:
                        trial.add(
                            "loads",
                            time_s=self.seconds(time_ns),
                            tier=group.tier,
                            group=group.name,
                            link=str(end),
                            tx_bytes=now.tx_bytes - previous.tx_bytes,
                            tx_packets=now.tx_packets - previous.tx_packets,
                        )
                    previous = now
        seen = self.sightings
        bins = ((seen["time_ns"] - self.begin_ns) / (INTERVAL * 1e9)).astype(np.int64)
        keys = np.stack([bins, seen["destination"], seen["qp"], seen["link"]], axis=1)
        rows, counts = np.unique(keys, axis=0, return_counts=True)
        for (time_bin, destination, qp, link), count in zip(rows.tolist(), counts.tolist(), strict=True):
            trial.add(
                "paths",
                time_s=round(time_bin * INTERVAL, 3),
                destination=address(destination),
                qp=qp,
                link=str(self.sending_end(link)),
                samples=count,
            )
