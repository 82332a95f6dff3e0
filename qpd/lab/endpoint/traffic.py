"""RC traffic between hosts of a fabric: acknowledged, sent again when lost, one process a host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qpd.lab.endpoint import report
from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import Connection, End, check
from qpd.lab.endpoint.remote import Remote
from qpd.lab.endpoint.report import QpReport
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric

OPERATIONS = ("write", "send", "write-immediate")
_DRAIN = 20.0
"""Seconds after the stop in which what was posted should be acknowledged."""


@dataclass
class RcResult:
    """What became of the traffic; times are CLOCK_MONOTONIC nanoseconds."""

    qps: list[QpReport] = field(default_factory=list)
    """In the order of the connections; with traffic both ways the way back follows the way there."""
    adapters: dict[str, dict[str, int]] = field(default_factory=dict)
    """By host: what concerned no queue pair (bad ICRC, unknown queue pair, malformed, unsendable)."""
    drained: bool = True
    """Everything that was posted has been acknowledged."""
    begin_ns: int = 0
    end_ns: int = 0

    @property
    def errors(self) -> list[str]:
        """Queue pairs that died, and why."""
        return [f"{qp.source} QP {qp.source_qp:#x}: {qp.error}" for qp in self.qps if qp.error is not None]


class RcTraffic:
    """Runs connections' traffic for the time of an `async with` block, or from `start` to `stop`, or to `finished`.

    Args:
        fabric: that is up.
        connections: the queue pairs.
        rate: messages per second and queue pair; None: as fast as the windows let.
        message: bytes of a message.
        messages: of each queue pair; None: until the stop.
        operation: write (RDMA WRITE), send, or write-immediate.
        both_ways: the destinations send, too.
        transport: settings of the queue pairs.
        family: 4 or 6.
    """

    def __init__(
        self,
        fabric: Fabric,
        connections: Sequence[Connection],
        *,
        rate: float | None = 500.0,
        message: int = 1024,
        messages: int | None = None,
        operation: str = "write",
        both_ways: bool = False,
        transport: Transport | None = None,
        family: int = 4,
    ) -> None:
        check(connections)
        if operation not in OPERATIONS:
            raise LabError(f"operation {operation!r}: give one of {', '.join(OPERATIONS)}")
        self.fabric = fabric
        self.connections = tuple(connections)
        self.both_ways = both_ways
        self.result = RcResult()
        self._orders = {
            "rate": rate,
            "message": message,
            "messages": messages,
            "operation": operation,
            "transport": asdict(transport or Transport()),
        }
        self._family = family
        self._remotes: dict[str, Remote] = {}

    @property
    def hosts(self) -> list[str]:
        """The hosts that take part."""
        return list(dict.fromkeys(end.host for c in self.connections for end in (c.source, c.destination)))

    async def start(self) -> None:
        """Start the programs, then the traffic."""
        addresses = {host: self.fabric.address(host, self._family) for host in self.hosts}
        try:
            for host in self.hosts:
                orders = {"address": addresses[host], "lanes": self._lanes(host, addresses), **self._orders}
                self._remotes[host] = await Remote.start(
                    self.fabric, host, "qpd.lab.endpoint.program", orders
                )
            for remote in self._remotes.values():
                await remote.expect("ready")
            for remote in self._remotes.values():
                await remote.tell({"kind": "go"})
        except BaseException:
            await self._kill()
            raise

    def _lanes(self, host: str, addresses: dict[str, str]) -> list[dict[str, Any]]:
        lanes = []
        for connection in self.connections:
            for own, peer, sends in (
                (connection.source, connection.destination, True),
                (connection.destination, connection.source, self.both_ways),
            ):
                if own.host == host:
                    lanes.append(
                        {
                            "own": asdict(own),
                            "peer": asdict(peer),
                            "peer_address": addresses[peer.host],
                            "sends": sends,
                        }
                    )
        return lanes

    async def finished(self) -> None:
        """Wait until all messages are acknowledged, where their number is limited."""
        if self._orders["messages"] is None:
            raise LabError("RC traffic without a number of messages ends by stop() only")
        senders = {c.source.host for c in self.connections}
        if self.both_ways:
            senders = set(self.hosts)
        await asyncio.gather(*(self._remotes[host].expect("finished") for host in senders))

    async def stop(self, drain: float = _DRAIN) -> RcResult:
        """Post nothing more, wait until all is acknowledged (at most `drain` seconds), and return the result."""
        remotes = self._remotes
        try:
            for remote in remotes.values():
                await remote.tell({"kind": "stop"})
            waits = [remote.expect("drained") for remote in remotes.values()]
            drained = True
            try:
                await asyncio.wait_for(asyncio.gather(*waits), drain)
            except asyncio.TimeoutError:
                drained = False
            for remote in remotes.values():
                await remote.tell({"kind": "end"})
            said = {host: await remote.expect("result") for host, remote in remotes.items()}
        finally:
            await self._kill()
        self.result = self._joined(said, drained)
        return self.result

    async def __aenter__(self) -> RcTraffic:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None and self._remotes:
            await self.stop()
        else:
            await self._kill()

    async def _kill(self) -> None:
        for remote in self._remotes.values():
            await remote.kill()
        self._remotes = {}

    def _joined(self, said: dict[str, dict[str, Any]], drained: bool) -> RcResult:
        def one(source: End, destination: End) -> QpReport:
            sent = said[source.host]["qps"][str(source.qp)]["sent"]
            received = said[destination.host]["qps"][str(destination.qp)]["received"]
            return report.join(Connection(source, destination), sent, received)

        result = RcResult(drained=drained, adapters={host: one["adapter"] for host, one in said.items()})
        for connection in self.connections:
            result.qps.append(one(connection.source, connection.destination))
            if self.both_ways:
                result.qps.append(one(connection.destination, connection.source))
        begins = [one["begin_ns"] for one in said.values() if one["begin_ns"]]
        result.begin_ns = min(begins, default=0)
        result.end_ns = max((one["end_ns"] for one in said.values()), default=0)
        return result
