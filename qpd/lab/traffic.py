"""RoCE test traffic between hosts of a fabric: one sending process a flow, one receiving process a host."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qpd.lab import roce
from qpd.lab.errors import LabError
from qpd.lab.fabric import Fabric
from qpd.lab.receiver import Arrivals
from qpd.lab.sender import Spec

SOURCE_PORT = 49152
"""The one UDP source port of all QPs, where a flow does not say otherwise: what low entropy looks like."""


@dataclass(frozen=True)
class Flow:
    """QPs of one pair of hosts.

    Destination QP numbers must differ between all flows to one host: the receiver knows packets by them.
    """

    source: str
    destination: str
    qps: Sequence[int]
    rate: float | None = 500.0
    """Packets per second and QP; None: as fast as possible."""
    size: int = 1024
    source_port: int | Sequence[int] | None = SOURCE_PORT
    """One for all QPs, or one for each; None: a port for each, as Linux derives it."""
    opcode: roce.Opcode = roce.Opcode.SEND_ONLY
    family: int = 4
    ack_every: int = 16
    first_psn: int = 0

    @property
    def source_ports(self) -> list[int]:
        """One for all QPs, or one for each."""
        if self.source_port is None:
            # The sender's own QP numbers: they are on no wire, but Linux derives ports from both.
            return [roce.linux_source_port(0x800 + index, qp) for index, qp in enumerate(self.qps)]
        return [self.source_port] if isinstance(self.source_port, int) else list(self.source_port)

    def spec(self, fabric: Fabric, duration: float | None, packets: int | None) -> Spec:
        """The sender's orders."""
        return Spec(
            source=fabric.address(self.source, self.family),
            destination=fabric.address(self.destination, self.family),
            qps=list(self.qps),
            source_ports=self.source_ports,
            rate=self.rate,
            size=self.size,
            opcode=int(self.opcode),
            ack_every=self.ack_every,
            first_psn=self.first_psn,
            duration=duration,
            packets=packets,
        )


@dataclass
class QpResult:
    """What became of one QP's packets."""

    source: str
    destination: str
    qp: int
    sent: int
    arrivals: Arrivals

    @property
    def received(self) -> int:
        """Different packets that arrived."""
        return self.arrivals.packets - self.arrivals.duplicates

    @property
    def lost(self) -> int:
        """Packets that were sent and never arrived."""
        return self.sent - self.received

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return {
            "source": self.source,
            "destination": self.destination,
            "qp": self.qp,
            "sent": self.sent,
            "received": self.received,
            "lost": self.lost,
            **asdict(self.arrivals),
        }


@dataclass
class Result:
    """What became of all QPs; `overflows` counts packets that arrived but found no room in a receiver's buffer."""

    qps: list[QpResult] = field(default_factory=list)
    overflows: int = 0
    begin_ns: int = 0
    end_ns: int = 0

    def qp(self, number: int) -> QpResult:
        """The QP of this number; KeyError where there is none."""
        for result in self.qps:
            if result.qp == number:
                return result
        raise KeyError(f"QP {number:#x}")

    @property
    def sent(self) -> int:
        """Packets sent, all QPs."""
        return sum(qp.sent for qp in self.qps)

    @property
    def received(self) -> int:
        """Different packets received, all QPs."""
        return sum(qp.received for qp in self.qps)

    @property
    def lost(self) -> int:
        """Packets lost, all QPs."""
        return self.sent - self.received

    @property
    def outage_ns(self) -> int:
        """The longest gap that any QP saw."""
        return max((qp.arrivals.gap_ns for qp in self.qps), default=0)

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "sent": self.sent,
            "received": self.received,
            "overflows": self.overflows,
            "begin_ns": self.begin_ns,
            "end_ns": self.end_ns,
            "qps": [qp.to_json() for qp in self.qps],
        }


class Traffic:
    """Flows that run for the time of an `async with` block, or until their duration or count is reached.

    >>> async with Traffic(fabric, [Flow("dc1-host1", "dc2-host1", range(0x100, 0x120))]) as traffic:
    ...     fabric.cut(link)
    ...     await asyncio.sleep(2)
    >>> traffic.result.lost
    """

    def __init__(
        self,
        fabric: Fabric,
        flows: Sequence[Flow],
        *,
        duration: float | None = None,
        packets: int | None = None,
    ) -> None:
        self.fabric = fabric
        self.flows = list(flows)
        self.duration = duration
        self.packets = packets
        self.result = Result()
        self._receivers: dict[str, asyncio.subprocess.Process] = {}
        self._senders: list[asyncio.subprocess.Process] = []
        self._check()

    def _check(self) -> None:
        seen: set[tuple[str, int]] = set()
        for flow in self.flows:
            for qp in flow.qps:
                if not 0 < qp < roce.PSN_MODULUS:
                    raise LabError(f"QP {qp}: give 1 to {roce.PSN_MODULUS - 1} (24 bits)")
                if (flow.destination, qp) in seen:
                    raise LabError(
                        f"QP {qp:#x} of {flow.destination} is in two flows; give each its own numbers"
                    )
                seen.add((flow.destination, qp))

    async def start(self) -> None:
        """Start receivers, then senders; return when all of them send."""
        try:
            for host in dict.fromkeys(flow.destination for flow in self.flows):
                self._receivers[host] = await self._spawn(host, "qpd.lab.receiver")
            for flow in self.flows:
                spec = json.dumps(asdict(flow.spec(self.fabric, self.duration, self.packets)))
                self._senders.append(await self._spawn(flow.source, "qpd.lab.sender", spec))
        except BaseException:
            await self._kill()
            raise

    async def stop(self) -> Result:
        """End the senders, let the receivers take what is on its way, and return the result."""
        return await self._finish(end_senders=True)

    async def wait(self) -> Result:
        """Wait until duration or count are reached; then as `stop`."""
        if self.duration is None and self.packets is None:
            raise LabError("traffic without duration and without a number of packets ends by stop() only")
        return await self._finish(end_senders=False)

    async def __aenter__(self) -> Traffic:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None and self._senders:
            await self.stop()
        else:
            await self._kill()

    async def _finish(self, *, end_senders: bool) -> Result:
        try:
            if end_senders:
                _signal(self._senders)
            sent = [await _output(sender) for sender in self._senders]
            _signal(self._receivers.values())
            received = {host: await _output(receiver) for host, receiver in self._receivers.items()}
        except BaseException:
            await self._kill()
            raise
        self._senders, self._receivers = [], {}
        self.result = _result(self.flows, sent, received)
        return self.result

    async def _spawn(self, host: str, module: str, *arguments: str) -> asyncio.subprocess.Process:
        command = self.fabric.enter(host, sys.executable, "-m", module, *arguments)
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            _, errors = await process.communicate()
            raise LabError(f"{module} on {host}: {_last_line(errors)}")
        return process

    async def _kill(self) -> None:
        for process in (*self._senders, *self._receivers.values()):
            if process.returncode is None:
                process.kill()
            await process.communicate()
        self._senders, self._receivers = [], {}


def run(
    fabric: Fabric, flows: Sequence[Flow], *, duration: float | None = None, packets: int | None = None
) -> Result:
    """Run finite traffic to its end, from code that is not asynchronous."""

    async def body() -> Result:
        traffic = Traffic(fabric, flows, duration=duration, packets=packets)
        await traffic.start()
        return await traffic.wait()

    return asyncio.run(body())


def _signal(processes: Iterable[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)


async def _output(process: asyncio.subprocess.Process) -> dict[str, Any]:
    output, errors = await process.communicate()
    if process.returncode != 0:
        raise LabError(f"traffic ended with status {process.returncode}: {_last_line(errors)}")
    return dict(json.loads(output))


def _last_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _result(
    flows: Sequence[Flow], sent: Sequence[dict[str, Any]], received: dict[str, dict[str, Any]]
) -> Result:
    result = Result(
        overflows=sum(int(host["overflows"]) for host in received.values()),
        begin_ns=min((int(one["begin_ns"]) for one in sent), default=0),
        end_ns=max((int(one["end_ns"]) for one in sent), default=0),
    )
    for flow, one in zip(flows, sent, strict=True):
        arrived = received[flow.destination]["qps"]
        for qp in flow.qps:
            arrivals = Arrivals(**arrived.get(str(qp), {}))
            result.qps.append(
                QpResult(flow.source, flow.destination, qp, int(one["sent"][str(qp)]), arrivals)
            )
    return result
