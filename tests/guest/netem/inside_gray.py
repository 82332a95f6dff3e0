"""A path that loses one packet in twenty by netem, while BFD is up: reported, drained, tried again, never the last one.

How long the daemon takes is measured by the kernel's times of packets and printed; QPDT_GRAY_RUNS repeats it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.fabric.daemon_node import BGP
from tests.fabric.judge import until

from .leaf import PATIENCE, SOURCE, Leaf, Tap
from .requester import Connection, Manner, Requester

pytestmark = pytest.mark.timeout(7200)

BAD, GOOD = 0, 1
"""Uplinks; the first one loses."""
DESTINATION = "10.255.2.1"
QPS = 8
HOLD = float(os.environ.get("QPDT_GRAY_HOLD", "3"))
"""Seconds out of service, the first time."""
RUNS = int(os.environ.get("QPDT_GRAY_RUNS", "1"))
RATE = float(os.environ.get("QPDT_GRAY_RATE", "4000"))
"""Packets a second of all QPs together."""
CALM = 6.0
"""Seconds without loss before the loss: longer than what the daemon looks back on."""


def time_of(event: dict[str, Any]) -> float:
    """When it was told, in seconds since the epoch."""
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()


def until_bad(leaf: Leaf, **wanted: Any) -> None:
    """Until qpd says this of the bad path."""

    def question() -> str | None:
        row = leaf.by_interface()[f"u{BAD}"]
        return None if wanted.items() <= row.items() else f"wanted {wanted}, found {row}"

    until(question, PATIENCE)


def connections() -> list[Connection]:
    rolls = random.Random(QPS)
    return [Connection(DESTINATION, 0x2000 + number, rolls.randrange(1 << 23)) for number in range(QPS)]


@pytest.fixture
def traffic(leaf: Leaf) -> Iterator[None]:
    """QPs on both paths, and plain wires before and after."""
    leaf.route(DESTINATION, BAD, GOOD)
    leaf.netem(leaf.router.name, {BAD: ""})
    # A second of patience: what a busy machine keeps waiting is not to be taken for lost.
    manner = Manner(window=16, ask_every=4, timeout=1.0, rate=RATE)
    requester = Requester(leaf.router.name, SOURCE, connections(), manner)
    try:
        with requester.running():
            yield
    finally:
        requester.close()
        leaf.netem(leaf.router.name, {BAD: ""})
        leaf.router.ip("route", "del", f"{DESTINATION}/32", "proto", BGP)


def lose_after_calm(leaf: Leaf) -> tuple[float, float]:
    """Let traffic run on a path that is trusted for longer than the daemon looks back, then lose.

    Packets a second on the path before that, and when it began to lose: seconds since the epoch.
    """
    leaf.settle()
    begun = time.monotonic()
    before = leaf.by_interface()

    def passed() -> dict[str, int]:
        rows = leaf.by_interface()
        return {name: rows[name]["packets"] - before[name]["packets"] for name in (f"u{BAD}", f"u{GOOD}")}

    def question() -> str | None:
        nonlocal begun, before
        rows = leaf.by_interface()
        if rows[f"u{BAD}"]["gray"] or rows[f"u{BAD}"]["state"] != "up":
            begun, before = time.monotonic(), rows
        if time.monotonic() - begun < CALM:
            return "not long enough"
        idle = [name for name, packets in passed().items() if not packets]
        return f"nothing passes {idle}" if idle else None

    until(question, PATIENCE)
    rate = passed()[f"u{BAD}"] / (time.monotonic() - begun)
    now = time.time()
    leaf.netem(leaf.router.name, {BAD: "loss 5%"})
    return rate, now


def heal(leaf: Leaf) -> None:
    """Until qpd trusts the path again."""
    leaf.netem(leaf.router.name, {BAD: ""})
    until_bad(leaf, state="up", gray=False)


def events(leaf: Leaf, kind: str) -> list[dict[str, Any]]:
    """What was told of the bad path."""
    return [event for event in leaf.events(kind) if event["detail"]["interface"] == f"u{BAD}"]


@pytest.mark.usefixtures("traffic")
def test_reported_by_default(leaf: Leaf) -> None:
    """And no more than that; it is over when the loss is."""
    for _ in range(RUNS):
        rate, begun = lose_after_calm(leaf)
        until_bad(leaf, gray=True)
        event = events(leaf, "path-gray")[-1]
        took = time_of(event) - begun
        print(f"{rate:.0f} packets/s on the path: found {took:.3f} s after tc's change: {event['detail']}")
        assert (event["detail"]["direction"], event["detail"]["action"]) == ("out", "report")
        assert leaf.not_up() is None, "BFD sees nothing of it, and the path serves"
        heal(leaf)
    assert len(events(leaf, "path-gray")) == len(events(leaf, "path-gray-over")) == RUNS


@pytest.fixture
def draining(leaf: Leaf) -> None:
    """From here on, the leaf's daemon drains what it finds."""
    leaf.restart(gray={"action": "drain", "hold": HOLD})


def until_left(leaf: Leaf, tap: Tap) -> None:
    """Lose, until the path has been drained and has been silent for its time; tell how long each took."""
    rate, begun = lose_after_calm(leaf)
    back = len(events(leaf, "path-gray-over"))
    until(
        lambda: None if len(events(leaf, "path-gray-over")) > back else "not drained and tried again",
        PATIENCE,
    )
    event = next(event for event in events(leaf, "path-gray") if time_of(event) > begun)
    assert event["detail"]["action"] == "drain"
    # It serves again from then on: the last packet before that was the last one of all QPs that had to leave it.
    over = time_of(events(leaf, "path-gray-over")[back])
    last = max(at for at in tap.times() if at < over)
    took = f"found {time_of(event) - begun:.3f} s, last packet on it {last - begun:.3f} s after tc's change"
    print(f"{rate:.0f} packets/s on the path: {took}, silent for {over - last:.3f} s: {event['detail']}")
    assert over - last > event["detail"]["hold_s"] / 2


@pytest.mark.usefixtures("draining", "traffic")
def test_drained_where_configured(leaf: Leaf, tmp_path: Path) -> None:
    """All QPs leave it; it is tried again, for longer each time; it serves where nothing else does, or when well."""
    tap = Tap(leaf.router.far, f"u{BAD}", tmp_path / "u.pcap", "-Q", "in")
    try:
        for number in range(RUNS):
            if number:
                heal(leaf)
            until_left(leaf, tap)
        # It loses still: found again, and out of service for twice as long.
        until_bad(leaf, state="drained", reason="gray")
        holds = [event["detail"]["hold_s"] for event in events(leaf, "path-gray")]
        assert holds[-1] == min(2 * holds[-2], 32 * HOLD)
        assert leaf.not_alive() is None
        # The other one is taken away: a bad path is better than none.
        other = leaf.by_interface()[f"u{GOOD}"]["name"]
        leaf.drain(other)
        until_bad(leaf, state="up", gray=True)
        since = time.time()
        until(lambda: None if tap.times()[-1] > since else "nothing comes by the last path", PATIENCE)
        leaf.drain(other, "undrain")
        heal(leaf)
        until(leaf.not_up, PATIENCE)
    finally:
        tap.close()
