"""Round-trip times of paths that netem delays: what qpd says, judged by captures at the leaf and by what was set."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path

import pytest

from qpd.lab.wire import RocePacket, decode
from tests.fabric.judge import until_equal

from .leaf import PATIENCE, SOURCE, Leaf, Tap
from .requester import Connection, Requester
from .responder import RC_ACKNOWLEDGE, RC_SEND_ONLY

pytestmark = pytest.mark.timeout(7200)

DELAYS_MS = {0: 0.0, 1: 2.0, 2: 22.0, 3: 75.0}
"""By uplink; the first has no netem, and shows what all else takes."""
QPS = 2
"""On each uplink."""
SAMPLES = 60
"""Of each QP."""


def near(value: float, wanted: float) -> bool:
    """Milliseconds: within 1 % or 0.2 ms."""
    return abs(value - wanted) <= max(0.01 * wanted, 0.2)


def connections(uplink: int) -> list[Connection]:
    """Of the QPs on an uplink. Their PSNs lie far apart, as those of different connections do."""
    rolls = random.Random(uplink)
    qps = range(0x1000 + QPS * uplink, 0x1000 + QPS * (uplink + 1))
    return [Connection(f"10.255.1.{uplink}", qp, rolls.randrange(1 << 23)) for qp in qps]


def unpaired(leaf: Leaf, requester: Requester) -> str | None:
    rows = [row for row in leaf.node.get("/v1/qps") if row["direction"] == "out"]
    pairs = {(row["dest_qp"], row["peer_qp"]) for row in rows}
    wanted = {(one.dest_qp, one.qp) for one in requester.connections.values()}
    return None if pairs == wanted else f"pairs {pairs}, wanted {wanted}"


def round_trips_ms(packets: list[RocePacket]) -> list[float]:
    """From each request to the acknowledgement of its PSN, by tshark's fields."""
    asked: dict[int, float] = {}
    found = []
    for packet in sorted(packets, key=lambda packet: packet.time):
        if packet.opcode == RC_SEND_ONLY:
            asked[packet.psn] = packet.time
        elif packet.opcode == RC_ACKNOWLEDGE:
            found.append(1e3 * (packet.time - asked.pop(packet.psn)))
    return found


def measured(leaf: Leaf, requester: Requester, file: Path) -> dict[int, tuple[float, float]]:
    """By uplink, the median round trip on the wire and the one that qpd states of the path; milliseconds."""
    tap = Tap(leaf.router.name, "any", file)
    try:
        requester.exchange(SAMPLES, PATIENCE)
        paths = leaf.by_interface()
        until_equal(lambda: len(tap.times()), 2 * len(requester.connections) * SAMPLES)
    finally:
        tap.close()
    packets = asyncio.run(decode(file))
    found = {}
    for uplink in DELAYS_MS:
        numbers = {number for one in connections(uplink) for number in (one.qp, one.dest_qp)}
        wire = round_trips_ms([packet for packet in packets if packet.destination_qp in numbers])
        assert len(wire) == QPS * SAMPLES
        found[uplink] = (statistics.median(wire), paths[f"u{uplink}"]["rtt_us"] / 1e3)
    return found


def test_medians_are_the_delays_that_were_set(leaf: Leaf, tmp_path: Path) -> None:
    """Each path's median is the wire's, and both are the delay set and what a path without one takes."""
    delays = {uplink: f"delay {ms}ms" for uplink, ms in DELAYS_MS.items() if ms}
    leaf.netem(leaf.router.far, delays)
    requester = Requester(
        leaf.router.name, SOURCE, [one for uplink in DELAYS_MS for one in connections(uplink)]
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while (problem := unpaired(leaf, requester)) is not None:
            assert time.monotonic() < deadline, problem
            requester.exchange(5)
        seen = measured(leaf, requester, tmp_path / "any.pcap")
    finally:
        requester.close()
        leaf.netem(leaf.router.far, dict.fromkeys(delays, ""))
    told = [
        f"set {DELAYS_MS[uplink]:g} ms: wire {wire:.3f}, qpd {said:.3f}"
        for uplink, (wire, said) in seen.items()
    ]
    print(" | ".join(told))
    for uplink, (wire, said) in seen.items():
        wanted = DELAYS_MS[uplink] + seen[0][0]
        assert near(wire, wanted), told
        assert near(said, wanted), told
        assert near(said, wire), told
