"""Runs a trial's workload, and its faults on the same clock."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from qpd.lab.experiment import seeds
from qpd.lab.experiment.model import ConstantRate, Steering
from qpd.lab.fabric import Fabric
from qpd.lab.faults import Fault, Schedule, Step
from qpd.lab.inject import Injector, play_async
from qpd.lab.traffic import SOURCE_PORT, Flow, Traffic


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


@dataclass
class Outcome:
    """What became of a workload."""

    qps: list[QpOutcome] = field(default_factory=list)
    faults: list[Done] = field(default_factory=list)
    begin_ns: int = 0
    end_ns: int = 0
    nominal_gap_ns: int = 0
    """Between two packets of a queue pair, where nothing is wrong."""


async def constant_rate(
    fabric: Fabric, workload: ConstantRate, steering: Steering, schedule: Schedule, seed: int
) -> Outcome:
    """Send for the workload's duration, or until the last fault is undone and a second more."""
    flows = constant_rate_flows(workload, steering, seed)
    traffic = Traffic(fabric, flows)
    await traffic.start()
    try:
        begun = time.monotonic()
        done = await play_faults(fabric, schedule, begun)
        rest = max(workload.duration, schedule.length + 1.0 if schedule.entries else 0.0)
        await asyncio.sleep(max(0.0, begun + rest - time.monotonic()))
    except BaseException:
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
    ports = {(flow.destination, qp): port for flow in flows for qp, port in _ports(fabric, flow)}
    for one in result.qps:
        gap_ns, gap_at = one.arrivals.gap_ns, one.arrivals.gap_begin_ns
        # A QP that fell silent for good: the gap that never ended.
        if one.arrivals.packets and result.end_ns - one.arrivals.last_ns > gap_ns:
            gap_ns, gap_at = result.end_ns - one.arrivals.last_ns, one.arrivals.last_ns
        outcome.qps.append(
            QpOutcome(
                source=one.source,
                destination=addresses[one.destination],
                qp=one.qp,
                source_port=ports[one.destination, one.qp],
                sent_packets=one.sent,
                received_packets=one.received,
                received_bytes=one.received * workload.size,
                silence_ns=gap_ns,
                silence_at_ns=gap_at,
            )
        )
    return outcome


def constant_rate_flows(workload: ConstantRate, steering: Steering, seed: int) -> list[Flow]:
    """The flows with their queue pair numbers and source ports, all of which follow from the seed."""
    numbers = seeds.qp_numbers(seed, workload.qps * len(workload.flows))
    flows = []
    for index, flow in enumerate(workload.flows):
        own = numbers[index * workload.qps : (index + 1) * workload.qps]
        if steering is Steering.BINS:
            # One sending process a port; QPs are dealt to them in turn.
            ports = seeds.bin_ports(seed)
            hands: list[tuple[int | None, list[int]]] = [
                (port, own[number :: len(ports)]) for number, port in enumerate(ports)
            ]
        else:
            hands = [(SOURCE_PORT if workload.source_ports == "fixed" else None, own)]
        flows += [
            Flow(flow.source, flow.destination, qps, workload.rate, workload.size, source_port=port)
            for port, qps in hands
            if qps
        ]
    return flows


def _ports(fabric: Fabric, flow: Flow) -> list[tuple[int, int]]:
    ports = flow.spec(fabric, None, None).source_ports
    return list(zip(flow.qps, ports * len(flow.qps) if len(ports) == 1 else ports, strict=True))


async def play_faults(fabric: Fabric, schedule: Schedule, begun: float) -> list[Done]:
    """Do what the schedule says, all of it undone at the end; `begun` is its second 0 on time.monotonic()."""
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
    finally:
        await asyncio.to_thread(injector.undo)
    return done
