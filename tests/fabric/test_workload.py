"""Emulated endpoints and training traffic on the real fabric: frames that others accept, sums that are right.

Judges are tcpdump with Scapy and tshark, the kernel's interface counters, and the sums themselves.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qpd.lab import namespaces
from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import Numbering, connect
from qpd.lab.endpoint.traffic import RcTraffic
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link
from qpd.lab.wire import Capture
from qpd.lab.workload import Execution, Workload, run

pytestmark = [pytest.mark.frr, pytest.mark.timeout(300)]

WORKERS = ("dc1-host1", "dc2-host1", "dc1-host2", "dc2-host2")
PATIENT = Transport(timeout=18)
"""1.07 s: longer than a busy machine keeps a process waiting, and nine of them longer than any route needs."""


def uplink_bytes(fabric: Fabric, leaf: str) -> dict[Link, int]:
    """What a leaf has sent by each uplink."""
    counters = fabric.counters(leaf)
    return {link: counters[link.end(leaf).interface].tx_bytes for link in fabric.topology.uplinks(leaf)}


async def test_frames_are_right_for_scapy_and_tshark(two_dc: Fabric, tmp_path: Path) -> None:
    """Every frame of a small exchange, as it arrives at both hosts: ICRC by Scapy, dissection by tshark."""
    from scapy.contrib.roce import BTH
    from scapy.utils import PcapReader

    hosts = ("dc1-host1", "dc2-host1")
    ends = [two_dc.topology.links_of(host)[0].end(host) for host in hosts]
    connections = connect(*hosts, 4, seed=1, source_ports="random")
    # A packet with its headers fits in what a capture keeps of it.
    traffic = RcTraffic(
        two_dc, connections, message=99, messages=20, operation="write-immediate", transport=PATIENT
    )
    async with Capture(two_dc, ends, directory=tmp_path) as capture:
        await traffic.start()
        await asyncio.wait_for(traffic.finished(), 60)
        result = await traffic.stop()
    assert result.errors == []
    assert [qp.messages for qp in result.qps] == [20] * 4
    assert [qp.received_bytes for qp in result.qps] == [20 * 99] * 4
    seen: Counter[int] = Counter()
    numbers: set[int] = set()
    for end in ends:
        file = capture.file(end)
        with PcapReader(str(file)) as reader:
            for packet in reader:
                assert BTH in packet, packet.summary()
                raw = bytes(packet[BTH])
                assert packet[BTH].compute_icrc(raw[-4:])[:4] == raw[-4:], packet.summary()
                seen[packet[BTH].opcode] += 1
                numbers.add(packet[BTH].dqpn)
        complaints = namespaces.run(
            ["tshark", "-n", "-r", str(file), "-Y", "_ws.malformed || _ws.expert.severity >= 0x400000"]
        )
        assert complaints.stdout == "", "tshark has nothing to complain of (notes and chats aside)"
    assert numbers == {end.qp for one in connections for end in (one.source, one.destination)}
    assert seen[0x0B] >= 80, "WRITE ONLY with immediate"
    assert 4 <= seen[0x11] <= seen[0x0B], "acknowledged, some of them together"


async def test_what_the_wire_loses_is_sent_again(two_dc: Fabric) -> None:
    """Five percent of all packets that arrive at a host are lost: all messages come, once each."""
    link = two_dc.topology.links_of("dc2-host1")[0]
    connections = connect("dc1-host1", "dc2-host1", 4, seed=2)
    traffic = RcTraffic(
        two_dc, connections, rate=None, message=20_000, messages=25, transport=replace(PATIENT, mtu=1024)
    )
    with two_dc.fault(link, towards="dc2-host1", probability=0.05):
        await traffic.start()
        await asyncio.wait_for(traffic.finished(), 120)
        result = await traffic.stop()
    assert result.errors == []
    assert [qp.received_bytes for qp in result.qps] == [25 * 20_000] * 4
    assert sum(qp.retransmitted for qp in result.qps) > 0
    assert sum(qp.naks + qp.timeouts for qp in result.qps) > 0
    assert sum(qp.out_of_sequence for qp in result.qps) > 0


async def test_a_thousand_queue_pairs(two_dc: Fabric) -> None:
    """In one process at each end, each with its own numbers and port."""
    connections = Numbering(3).connect("dc1-host1", "dc2-host1", 1000)
    traffic = RcTraffic(two_dc, connections, rate=None, message=1000, messages=2, transport=PATIENT)
    await traffic.start()
    await asyncio.wait_for(traffic.finished(), 120)
    result = await traffic.stop()
    assert result.errors == []
    assert Counter(qp.messages for qp in result.qps) == {2: 1000}
    assert len({qp.source_port for qp in result.qps}) > 900


async def test_a_dead_host_kills_the_queue_pairs_and_the_report_says_so(two_dc: Fabric) -> None:
    """Eight timeouts of 67 ms without a word from the peer."""
    workload = Workload(
        "allreduce",
        WORKERS[:2],
        1 << 20,
        iterations=1000,
        compute=0.02,
        transport=Transport(timeout=14),
    )
    async with Execution(two_dc, workload) as execution:
        await execution.start()
        async for iteration in execution.iterations():
            if iteration.number == 0:
                await asyncio.to_thread(two_dc.lose, two_dc.topology.links_of("dc2-host1")[0])
        report = await execution.report()
    assert not report.ok
    assert report.wrong_values == 0
    assert any("transport retry counter exceeded" in line for line in report.failures)
    assert any(qp.error == "transport retry counter exceeded" for qp in report.qps)


async def test_a_rank_whose_process_dies_is_told(two_dc: Fabric) -> None:
    """And the others end with their results."""
    workload = Workload("allreduce", WORKERS[:2], 1 << 16, iterations=10_000, compute=0.02, transport=PATIENT)
    async with Execution(two_dc, workload) as execution:
        await execution.start()
        async for iteration in execution.iterations():
            if iteration.number == 0:
                (pid,) = namespaces.members([two_dc.namespace("dc2-host1")])
                os.kill(pid, signal.SIGKILL)
        report = await execution.report()
    assert not report.ok
    assert report.failures == ["dc2-host1: the endpoint ended: it said nothing"]
    assert list(report.adapters) == ["dc1-host1"]


async def test_a_cut_in_the_middle_of_an_allreduce(two_dc: Fabric) -> None:
    """The busier uplink of a leaf loses carrier: sums stay right, no queue pair dies, the other uplink carries on."""
    workload = Workload(
        "allreduce",
        WORKERS,
        1 << 20,
        iterations=20,
        compute=0.1,
        message=1 << 16,
        transport=PATIENT,
    )
    leaf = "dc1-leaf1"
    before = uplink_bytes(two_dc, leaf)
    cut_ns = 0
    other: Link | None = None
    carried = 0
    async with Execution(two_dc, workload) as execution:
        await execution.start()
        async for iteration in execution.iterations():
            if iteration.number == 0:
                sent = {link: count - before[link] for link, count in uplink_bytes(two_dc, leaf).items()}
                busy, other = max(sent, key=sent.__getitem__), min(sent, key=sent.__getitem__)
                assert sent[busy] > workload.bytes
                await asyncio.to_thread(two_dc.cut, busy, leaf)
                cut_ns = time.monotonic_ns()
                carried = uplink_bytes(two_dc, leaf)[other]
        report = await execution.report()
    assert report.failures == []
    assert report.ok, [qp.error for qp in report.qps if qp.error]
    assert len(report.iterations) == 20
    assert report.begin_ns < cut_ns < report.end_ns
    assert other is not None
    assert uplink_bytes(two_dc, leaf)[other] - carried > workload.bytes


@pytest.mark.parametrize(
    "workload",
    [
        Workload(
            "allreduce", WORKERS, 1 << 20, "tree", iterations=2, chunks=4, message=1 << 16, transport=PATIENT
        ),
        Workload(
            "allreduce", WORKERS, (1 << 20) + 4, "hierarchical", iterations=2, family=6, transport=PATIENT
        ),
        Workload(
            "parameter-server",
            WORKERS,
            1 << 20,
            servers=("dc1-host3", "dc2-host3"),
            iterations=2,
            message=1 << 16,
            transport=replace(PATIENT, dcqcn=True),
        ),
    ],
    ids=["tree", "hierarchical-v6", "parameter-servers"],
)
def test_every_operation_gives_the_sum(two_dc: Fabric, workload: Workload) -> None:
    """Over IPv6 and with rate control, too."""
    report = run(two_dc, workload, deadline=150)
    assert report.ok, report.failures
    assert all(one["seconds"] > 0 for one in report.iterations[0].to_json()["phases"])
    assert all(not any(counters.values()) for counters in report.adapters.values()), report.adapters
