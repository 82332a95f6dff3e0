"""Runs a workload on a fabric that is up: one process a rank, in its host's network namespace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from typing import Any

from qpd.lab.endpoint import report as qp_report
from qpd.lab.endpoint.remote import Remote
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.workload.model import Workload
from qpd.lab.workload.report import Iteration, RankTimes, Report, rank_times

_MODULE = "qpd.lab.workload.program"
_READY = 120.0
"""Seconds in which all programs should have started, on a busy machine."""


class Execution:
    """A run, for the time of an `async with` block: `start`, then `iterations` (if wanted), then `report`."""

    def __init__(self, fabric: Fabric, workload: Workload) -> None:
        for host in workload.hosts:
            if host not in fabric.hosts:
                raise LabError(
                    f"workload: {host} is no host of lab {fabric.name}; it has {', '.join(fabric.hosts)}"
                )
        self.fabric = fabric
        self.workload = workload
        self._phases = workload.schedule().phases
        self._connections = workload.connections()
        self._remotes: list[Remote] = []
        self._readers: list[asyncio.Task[dict[str, Any]]] = []
        self._said: asyncio.Queue[tuple[int, dict[str, Any]]] = asyncio.Queue()
        self._report = Report(workload)
        self._open: dict[int, dict[int, RankTimes]] = {}
        self._over = False

    async def __aenter__(self) -> Execution:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        for remote in self._remotes:
            await remote.kill()

    async def start(self) -> None:
        """Start the ranks' programs, connect them, and let them begin.

        Raises:
            LabError: where one does not start.
        """
        hosts = self.workload.hosts
        addresses = {host: self.fabric.address(host, self.workload.family) for host in hosts}
        for rank, host in enumerate(hosts):
            orders = {
                "workload": self.workload.to_mapping(),
                "rank": rank,
                "address": addresses[host],
                "lanes": self._lanes(rank, addresses),
            }
            self._remotes.append(await Remote.start(self.fabric, host, _MODULE, orders))
        try:
            readies = (remote.expect("ready") for remote in self._remotes)
            await asyncio.wait_for(asyncio.gather(*readies), _READY)
        except asyncio.TimeoutError:
            raise LabError(f"the ranks' programs were not ready after {_READY:.0f} s") from None
        self._readers = [asyncio.ensure_future(self._read(rank)) for rank in range(len(hosts))]
        for remote in self._remotes:
            await remote.tell({"kind": "go"})

    def _lanes(self, rank: int, addresses: dict[str, str]) -> list[dict[str, Any]]:
        lanes = []
        for (source, destination), connections in self._connections.items():
            if rank not in {source, destination}:
                continue
            for one in connections:
                own, peer = one.source, one.destination
                if rank == destination:
                    own, peer = peer, own
                lanes.append(
                    {
                        "own": asdict(own),
                        "peer": asdict(peer),
                        "peer_address": addresses[peer.host],
                        "to": destination if rank == source else None,
                    }
                )
        return lanes

    async def _read(self, rank: int) -> dict[str, Any]:
        """Pass on what a rank says, until its result."""
        try:
            while (said := await self._remotes[rank].hear())["kind"] != "result":
                self._said.put_nowait((rank, said))
        except LabError as error:
            why = str(error).removeprefix(f"{self.workload.hosts[rank]}: ")
            self._said.put_nowait((rank, {"kind": "failed", "error": why}))
            raise
        return said

    async def iterations(self) -> AsyncIterator[Iteration]:
        """Each iteration as soon as all ranks have ended it; ends after the last, or when a rank gives up."""
        ranks, done = len(self._remotes), 0
        while not self._over:
            rank, said = await self._said.get()
            host = self.workload.hosts[rank]
            if said["kind"] == "failed":
                self._report.failures.append(f"{host}: {said['error']}")
                self._over = True
            elif said["kind"] == "done":
                done += 1
                self._over = done == ranks
            elif said["kind"] == "iteration":
                number = int(said["number"])
                gathered = self._open.setdefault(number, {})
                gathered[rank] = rank_times(host, said)
                if len(gathered) == ranks:
                    del self._open[number]
                    times = tuple(gathered[index] for index in range(ranks))
                    iteration = Iteration(number, self._phases, times, len(self.workload.workers))
                    self._report.iterations.append(iteration)
                    yield iteration

    async def report(self) -> Report:
        """Wait for the end of all iterations, end the programs, and say what came of it."""
        async for _ in self.iterations():
            pass
        for remote in self._remotes:
            await remote.tell({"kind": "end"})
        results = await asyncio.gather(*self._readers, return_exceptions=True)
        said: dict[int, dict[str, Any]] = {}
        for rank, result in enumerate(results):
            if isinstance(result, BaseException):
                if not isinstance(result, LabError):
                    raise result
            else:
                said[rank] = result
                self._report.adapters[self.workload.hosts[rank]] = result["adapter"]
        for (source, destination), connections in self._connections.items():
            if source in said and destination in said:
                self._report.qps += [
                    qp_report.join(
                        one,
                        said[source]["qps"][str(one.source.qp)]["sent"],
                        said[destination]["qps"][str(one.destination.qp)]["received"],
                    )
                    for one in connections
                ]
        return self._report


def run(
    fabric: Fabric,
    workload: Workload,
    *,
    on_iteration: Callable[[Iteration], None] | None = None,
    deadline: float | None = None,
) -> Report:
    """Run a workload to its end, from code that is not asynchronous.

    Raises:
        LabError: where it does not start, or has not ended after `deadline` seconds.
    """

    async def body() -> Report:
        async with Execution(fabric, workload) as execution:
            await execution.start()
            async for iteration in execution.iterations():
                if on_iteration is not None:
                    on_iteration(iteration)
            return await execution.report()

    try:
        return asyncio.run(asyncio.wait_for(body(), deadline))
    except asyncio.TimeoutError:
        raise LabError(f"the workload has not ended after {deadline:.0f} s") from None
