"""Runs a trial's workload, and its faults on the same clock."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

from qpd.lab import namespaces
from qpd.lab.endpoint.connections import Numbering, SourcePorts
from qpd.lab.errors import LabError
from qpd.lab.experiment.model import ConstantRate, Steering
from qpd.lab.fabric import Fabric
from qpd.lab.faults import Fault, Schedule, Step
from qpd.lab.inject import Injector, play_async
from qpd.lab.traffic import Flow, Traffic
from qpd.lab.workload import Execution, Workload

_CALLS, _PATIENCE = 20, 1.0
_DISCARD = 9


@dataclass
class Done:
    """A fault as it was done; times are CLOCK_MONOTONIC nanoseconds."""

    fault: Fault
    planned: float
    """Seconds from the moment when all senders sent."""
    begin_ns: int
    end_ns: int | None = None
    """When undoing it began: from then on things may come back by themselves."""


@dataclass
class QpOutcome:
    """What became of a queue pair."""

    source: str
    destination: str
    """Address of the destination host."""
    qp: int
    source_port: int
    sent_packets: int
    received_packets: int | None = None
    received_bytes: int | None = None
    retransmitted_packets: int | None = None
    timeouts: int | None = None
    naks: int | None = None
    silence_ns: int | None = None
    """Constant rate: the longest gap at the receiver. RC: the longest time without progress."""
    silence_at_ns: int | None = None
    error: str | None = None
    back: tuple[str, int] | None = None
    """Where its answers go: address and queue pair; None where nothing is answered."""


@dataclass
class Outcome:
    """What became of a workload."""

    qps: list[QpOutcome] = field(default_factory=list)
    faults: list[Done] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)
    """As Iteration.to_json() of qpd.lab.workload has them."""
    begin_ns: int = 0
    end_ns: int = 0
    nominal_gap_ns: int = 0
    """Between two packets of a queue pair, where nothing is wrong."""


class _Punctual(Traffic):
    """Its senders go before all but bfdd (50): what else a machine does must not look like an outage."""

    async def start(self) -> None:
        await super().start()
        for sender in self._senders:
            os.sched_setscheduler(sender.pid, os.SCHED_FIFO, os.sched_param(40))


async def constant_rate(
    fabric: Fabric, workload: ConstantRate, steering: Steering, schedule: Schedule, seed: int
) -> Outcome:
    """Send for the workload's duration, or until the last fault is undone and a second more."""
    flows = constant_rate_flows(workload, steering, seed)
    await acquaint(fabric, [(flow.source, flow.destination) for flow in workload.flows])
    traffic = _Punctual(fabric, flows) if schedule.entries else Traffic(fabric, flows)
    await traffic.start()
    over = asyncio.Event()
    begun = time.monotonic()
    faults = asyncio.create_task(play_faults(fabric, schedule, begun, over))
    try:
        rest = max(workload.duration, schedule.length + 1.0 if schedule.entries else 0.0)
        # Faults that are over, or that cannot be done, end before the traffic does.
        await asyncio.wait({faults}, timeout=rest)
        if faults.done() and faults.exception() is None:
            await asyncio.sleep(max(0.0, begun + rest - time.monotonic()))
        over.set()
        done = await faults
    except BaseException:
        faults.cancel()
        await asyncio.gather(faults, return_exceptions=True)
        await traffic.__aexit__(BaseException, None, None)
        raise
    result = await traffic.stop()
    outcome = Outcome(
        faults=done,
        begin_ns=result.begin_ns,
        end_ns=result.end_ns,
        nominal_gap_ns=round(1e9 / workload.rate),
    )
    addresses = {host: fabric.address(host) for host in dict.fromkeys(flow.destination for flow in flows)}
    ports = {
        (flow.destination, qp): flow.source_ports[index % len(flow.source_ports)]
        for flow in flows
        for index, qp in enumerate(flow.qps)
    }
    for one in result.qps:
        gaps = [(begin, length) for begin, length in one.arrivals.gaps]
        if one.arrivals.packets:
            # The gap that had not ended: a QP that fell silent for good.
            gaps.append((one.arrivals.last_ns, result.end_ns - one.arrivals.last_ns))
        begin, length = silence(gaps, done)
        outcome.qps.append(
            QpOutcome(
                source=one.source,
                destination=addresses[one.destination],
                qp=one.qp,
                source_port=ports[one.destination, one.qp],
                sent_packets=one.sent,
                received_packets=one.received,
                received_bytes=one.received * workload.size,
                silence_ns=length,
                silence_at_ns=begin,
            )
        )
    return outcome


def silence(gaps: Sequence[tuple[int, int]], done: Sequence[Done]) -> tuple[int | None, int | None]:
    """Begin and length of the longest gap that faults may have caused; of all gaps, where there were no faults.

    A gap counts where it began before a fault's end and ended after its begin: one of another time is the machine's.
    """
    touching = [
        (begin, length)
        for begin, length in gaps
        if not done
        or any((one.end_ns is None or begin < one.end_ns) and begin + length > one.begin_ns for one in done)
    ]
    return max(touching, key=lambda gap: gap[1], default=(None, None))


def constant_rate_flows(workload: ConstantRate, steering: Steering, seed: int) -> list[Flow]:
    """The flows with their queue pair numbers and source ports, all of which follow from the seed."""
    fixed = workload.source_ports == "fixed" and steering is not Steering.BINS
    numbering = Numbering(seed, SourcePorts.FIXED if fixed else SourcePorts(steering.source_ports))
    flows = []
    for flow in workload.flows:
        ends = numbering.connect(flow.source, flow.destination, workload.qps)
        flows.append(
            Flow(
                flow.source,
                flow.destination,
                [one.destination.qp for one in ends],
                workload.rate,
                workload.size,
                source_port=ends[0].source.source_port if fixed else [one.source.source_port for one in ends],
            )
        )
    return flows


async def collective(
    fabric: Fabric, workload: Workload, steering: Steering, schedule: Schedule, seed: int
) -> Outcome:
    """Run a workload of collective operations to its end; faults that are not over by then are undone.

    Raises:
        LabError: where a rank gives up, which is what a dead queue pair comes to.
    """
    workload = replace(workload, seed=seed, source_ports=SourcePorts(steering.source_ports))
    addresses = {host: fabric.address(host) for host in workload.hosts}
    await acquaint(fabric, list(combinations(workload.hosts, 2)), workload.family)
    async with Execution(fabric, workload) as execution:
        await execution.start()
        over = asyncio.Event()
        begun = time.monotonic()
        faults = asyncio.create_task(play_faults(fabric, schedule, begun, over))
        try:
            report = await execution.report()
        finally:
            over.set()
            # Ended before its faults, or failed: either way what is left of them is undone now.
            if time.monotonic() < begun + schedule.length:
                faults.cancel()
            done = (await asyncio.gather(faults, return_exceptions=True))[0]
    if report.failures:
        raise LabError(f"a rank gave up: {'; '.join(report.failures)}")
    if isinstance(done, BaseException):
        if not isinstance(done, asyncio.CancelledError):
            raise done
        raise LabError("the workload ended before its faults were over: more iterations, or earlier faults")
    outcome = Outcome(faults=done, begin_ns=report.begin_ns, end_ns=report.end_ns)
    outcome.iterations = [iteration.to_json() for iteration in report.iterations]
    for qp in report.qps:
        begin, length = silence([(qp.stall_begin_ns, round(qp.stall_s * 1e9))], done)
        outcome.qps.append(
            QpOutcome(
                source=qp.source,
                destination=addresses[qp.destination],
                qp=qp.destination_qp,
                source_port=qp.source_port,
                sent_packets=qp.packets,
                received_bytes=qp.received_bytes,
                retransmitted_packets=qp.retransmitted,
                timeouts=qp.timeouts,
                naks=qp.naks,
                silence_ns=length,
                silence_at_ns=begin,
                back=(addresses[qp.source], qp.source_qp),
                error=qp.error,
            )
        )
    return outcome


async def acquaint(fabric: Fabric, pairs: Sequence[tuple[str, str]], family: int = 4) -> None:
    """Let hosts find each other's MAC addresses, as the exchange of queue pair numbers over TCP does in earnest.

    The kernel holds back some 200 KB for a neighbour that it does not know yet, and drops what is more: the first burst
    of a trial would lose packets and wait for ACK timeouts, wherever the trial before it was long ago.

    Raises:
        LabError: where a host does not answer.
    """
    for source, destination in dict.fromkeys(pairs):
        answers = partial(_answers, fabric.address(destination, family), family)
        for _ in range(_CALLS):
            if await asyncio.to_thread(namespaces.inside, fabric.namespace(source), answers):
                break
        else:
            raise LabError(f"{source} does not reach {destination}: no answer to {_CALLS} datagrams")


def _answers(address: str, family: int) -> bool:
    """True where a datagram to a port that nobody listens at is refused: it has arrived, and the refusal, too."""
    with socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as call:
        call.settimeout(_PATIENCE)
        try:
            call.connect((address, _DISCARD))
            call.send(b"")
            call.recv(1)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return True


async def play_faults(fabric: Fabric, schedule: Schedule, begun: float, over: asyncio.Event) -> list[Done]:
    """Do what the schedule says; faults without an end last until `over`. All of them are undone on return.

    `begun` is the schedule's second 0 on time.monotonic().
    """
    done: list[Done] = []

    def on_step(step: Step, began_ns: int, _done_ns: int) -> None:
        if step.begins:
            done.append(Done(step.fault, step.at, began_ns))
        else:
            next(one for one in done if one.fault == step.fault and one.end_ns is None).end_ns = began_ns

    injector = Injector(fabric)
    try:
        if schedule.entries:
            await play_async(schedule, injector, on_step=on_step, start=begun)
            if injector.active:
                await over.wait()
    finally:
        await asyncio.to_thread(injector.undo)
    return done
