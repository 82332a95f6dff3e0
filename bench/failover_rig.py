"""The fabric on which failover is measured: constant traffic, qpd in one of its moods, one trial at a time."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from bench.arrivals import Arrivals, Gap
from bench.faults import Faults, Injected, Kind
from bench.figures import BenchError
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.lab import rtnetlink
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link
from qpd.lab.traffic import Flow

QPS = tuple(range(0x100, 0x108))
RATE = 1000.0
"""Packets per second and QP."""
NOMINAL_NS = int(1e9 / RATE)
BFD = (10, 3)
CONFIG = {"hold_up": 0, "reconcile_interval": 3600}
"""Trials follow each other: the hold after a return, which flapping doubles, would only lengthen the pauses between."""
_PUNCTUAL = ("chrt", "-f", "40")
"""The sender is an instrument: what else this machine does must not look like an outage (bfdd has 50)."""
_QUIET_NS = 20_000_000
_RESUMED_NS = 150_000_000
_PATIENCE = 60.0
_BEFORE_NS = 50_000_000
"""The window of a trial begins so long before the fault."""


class Mood(Enum):
    """What qpd does on the source leaf, in the words of the report."""

    ABSENT = "without qpd"
    RUNS = "with qpd"
    STOPPED = "qpd stopped (SIGSTOP)"
    KILLED = "qpd killed (SIGKILL)"


@dataclass
class Trial:
    """One fault: what the receiver saw, and when the kernel moved. Milliseconds; None: not known."""

    outage_ms: float
    """Longest gap of any QP less the nominal gap."""
    lost: int
    """Packets lost, all QPs."""
    hurt: int
    """QPs that lost packets."""
    unhurt_gap_ms: float | None
    """Longest gap less the nominal one of the QPs that lost nothing: what the machine itself adds."""
    inject_ms: float
    """How long it took to make the fault."""
    detected_ms: float | None = None
    """From the fault to the kernel's own word that the path is dead."""
    moved_ms: float | None = None
    """From that word to the first packet of the last QP to come back."""
    cause: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


class Rig:
    """A fabric under traffic. ``near``: the node whose links fail; ``links``: those that may."""

    def __init__(self, fabric: Fabric, source: str, destination: str, near: str, links: list[Link]) -> None:
        self.fabric = fabric
        self.source, self.destination, self.near, self.links = source, destination, near, links
        self.mood = Mood.ABSENT
        self._stack = ExitStack()
        self.faults = Faults(fabric, near, links)
        self._stack.callback(self.faults.close)
        self._counters = self._stack.enter_context(rtnetlink.Socket(fabric.namespace(near)))
        self.arrivals = Arrivals(fabric.namespace(destination))
        self._stack.callback(self.arrivals.close)
        self._sender: subprocess.Popen[bytes] | None = None
        self._stack.callback(self._end_sender)
        self._turn = 0
        self._gaps: list[Gap] = []

    def close(self) -> None:
        """End the traffic and qpd, heal what is broken."""
        self._stack.close()
        self.fabric.restore()

    # --- state --------------------------------------------------------------------------------------------------------

    def send(self) -> None:
        """(Re)start the traffic."""
        self._end_sender()
        flow = Flow(self.source, self.destination, QPS, rate=RATE, size=256)
        spec = json.dumps(asdict(flow.spec(self.fabric, None, None)))
        self._sender = self.fabric.popen(
            self.source,
            *_PUNCTUAL,
            sys.executable,
            "-m",
            "qpd.lab.sender",
            spec,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        until(lambda: None if len(self._flowing()) == len(QPS) else "traffic does not arrive")

    def become(self, mood: Mood) -> None:
        """Bring qpd into another mood, then wait until all is as it should be."""
        if mood is self.mood:
            return
        sidecar = self.fabric.sidecar(self.near)
        if self.mood is Mood.STOPPED:
            self.fabric.kill_qpd(self.near, signal.SIGCONT)
        if mood is Mood.ABSENT:
            self.fabric.stop_qpd(self.near, detach=True)
        elif not sidecar.running:
            self.fabric.start_qpd(self.near, CONFIG, deadline=90)
        self.mood = Mood.RUNS if mood is not Mood.ABSENT else mood
        self.send()
        self.wait_whole()
        if mood is Mood.STOPPED:
            self.fabric.kill_qpd(self.near, signal.SIGSTOP)
        elif mood is Mood.KILLED:
            self.fabric.kill_qpd(self.near, signal.SIGKILL)
            until(lambda: "qpd lives" if sidecar.running else None)
        self.mood = mood

    def wait_whole(self) -> None:
        """Wait until routes, BFD and paths are as before any fault, and traffic flows."""
        until(self._missing)

    def _missing(self) -> str | None:
        whole = self._routes_missing() or self._bfd_missing()
        if whole:
            return whole
        if self.mood is Mood.RUNS:
            paths = self.api("/v1/paths")
            down = [row["name"] for row in paths if row["state"] != "up"]
            away = [row["dest_qp"] for row in self.api("/v1/qps") if row["state"] in {"away", "unsteered"}]
            overrides = self.api("/v1/status")["overrides"]
            if down or away or overrides:
                return f"paths down: {down}, QPs away: {away}, override routes: {overrides}"
        elif self.mood is not Mood.ABSENT:
            with Maps(Pins.of(self.fabric.sidecar(self.near).pins).directory) as maps:
                if maps.tap_dead():
                    return f"the tap holds {maps.tap_dead():#x} down"
        return None if len(self._flowing()) == len(QPS) else "traffic does not arrive"

    def _routes_missing(self) -> str | None:
        for node in {end.node for link in self.links for end in link.ends}:
            hops = self.fabric.next_hops(node)
            for leaf in self.fabric.leaves:
                if node == leaf:
                    continue
                want = self._wanted(node, leaf)
                if len(hops.get(self.fabric.vtep(leaf), ())) < want:
                    return f"{node}: route to {leaf}: fewer than {want} next hops"
        return None

    def _wanted(self, node: str, leaf: str) -> int:
        """Next hops that a node has to a leaf's VTEP where all is well."""
        links = self.fabric.topology.uplinks(node)
        direct = [link for link in links if link.other(node).node == leaf]
        if direct:
            return len(direct)
        if node in self.fabric.leaves:
            return len(links)
        spines = set(self.fabric.spines)
        return sum(link.other(node).node in spines for link in links)

    def _bfd_missing(self) -> str | None:
        for node, peer in self._peers("show bfd peers json"):
            if peer.get("status") != "up" or peer.get("remote-transmit-interval") != BFD[0]:
                return f"{node}: BFD with {peer['peer']} is {peer.get('status')}"
        return None

    def _peers(self, command: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Node and row of the sessions under test, at both ends; there may be others on the same links."""
        for node in {end.node for link in self.links for end in link.ends}:
            ends = [end for link in self.links for end in link.ends if end.node == node]
            wanted = {self.fabric.conf(node).neighbor_on(end.interface) for end in ends}
            rows = {row.get("peer"): row for row in self.fabric.show(node, command)}
            for peer in sorted(map(str, wanted)):
                yield node, rows.get(peer, {"peer": peer})

    def _flowing(self) -> list[int]:
        """QPs of which a packet has just come."""
        now = time.monotonic_ns()
        return [qp for qp, seen in self.arrivals.last_seen().items() if now - seen < 2 * _QUIET_NS]

    def _end_sender(self) -> None:
        if self._sender is not None:
            self._sender.terminate()
            self._sender.wait()
            self._sender = None

    # --- a trial ------------------------------------------------------------------------------------------------------

    def trial(self, kind: Kind, *, observe: Callable[[Link], Any] | None = None) -> Trial:
        """One fault on a link that carries traffic, healed again."""
        link = self.busy_link()
        seq = self._last_event()
        watching = observe(link) if observe else None
        injected = self.faults.make(kind, link)
        try:
            trial = self._observe(injected, kind)
            if seq is not None:
                self._timeline(trial, injected, seq)
            if watching is not None:
                trial.extra |= watching()
        finally:
            self.faults.heal()
        self.wait_whole()
        time.sleep(0.2)
        self.arrivals.forget(time.monotonic_ns() - 2_000_000_000)
        return trial

    def busy_link(self) -> Link:
        """A link by which RoCE leaves the near node: each in turn where several do."""
        busy: list[Link] = []

        def question() -> str | None:
            before = self._counters.counters()
            time.sleep(0.1)
            after = self._counters.counters()
            ends = {link: link.end(self.near).interface for link in self.links}
            sent = {link: after[name].tx_packets - before[name].tx_packets for link, name in ends.items()}
            busy[:] = [link for link, count in sent.items() if count > 0.2 * sum(sent.values())]
            # A machine that stood still has sent nothing.
            return None if busy else "nothing leaves"

        until(question)
        self._turn += 1
        return busy[self._turn % len(busy)]

    def _observe(self, injected: Injected, kind: Kind) -> Trial:
        self._await_traffic(injected)
        begin = injected.begin_ns - _BEFORE_NS
        gaps = self.arrivals.gaps(begin, time.monotonic_ns() - _QUIET_NS)
        if len(gaps) < len(QPS):
            raise BenchError(f"{kind.value}: {len(gaps)} of {len(QPS)} QPs were seen before the fault")
        hurt = [gap for gap in gaps.values() if gap.lost]
        unhurt = [gap for gap in gaps.values() if not gap.lost]
        self._gaps = hurt
        return Trial(
            outage_ms=_ms(max(gap.length_ns for gap in gaps.values()) - NOMINAL_NS),
            lost=sum(gap.lost for gap in hurt),
            hurt=len(hurt),
            unhurt_gap_ms=_ms(max(gap.length_ns for gap in unhurt) - NOMINAL_NS) if unhurt else None,
            inject_ms=_ms(injected.end_ns - injected.begin_ns),
        )

    def _await_traffic(self, injected: Injected) -> None:
        """Until the fault is over for all QPs: each has come again, and for a while."""

        def question() -> str | None:
            waited = time.monotonic_ns() - injected.end_ns
            if waited < _RESUMED_NS:
                return "too early to say"
            return None if len(self._flowing()) == len(QPS) else "traffic does not come back"

        until(question, pause=0.02)
        time.sleep(0.05)

    def _timeline(self, trial: Trial, injected: Injected, seq: int) -> None:
        downs = [event for event in self.events(seq) if event["kind"] == "path-down"]
        if not downs:
            trial.cause = "none"
            return
        trial.cause = str(downs[0]["detail"].get("reason", ""))
        at = downs[0].get("kernel_ns") or _monotonic_ns(downs[0]["time"])
        trial.detected_ms = _ms(at - injected.begin_ns)
        # A QP's longest silence may be another, where its outage was short.
        ends = [gap.end_ns for gap in self._gaps if gap.begin_ns <= at + NOMINAL_NS and gap.end_ns >= at]
        trial.moved_ms = _ms(max(ends) - at) if ends else None

    # --- qpd ----------------------------------------------------------------------------------------------------------

    def api(self, question: str) -> Any:  # noqa: ANN401 - JSON
        """The JSON of an answer of the near node's qpd."""
        answer = self.fabric.sidecar(self.near).get(question)
        if answer is None:
            raise BenchError(f"{self.near}: qpd does not answer {question}")
        return answer

    def events(self, since: int = 0) -> list[Mapping[str, Any]]:
        """What qpd has told after this number."""
        return events(self.fabric.sidecar(self.near).socket, since)

    def _last_event(self) -> int | None:
        if self.mood is not Mood.RUNS:
            return None
        return max((event["seq"] for event in self.events()), default=0)

    def bfd_downs(self) -> int:
        """How often bfdd itself, at either end, has declared a session under test down."""
        return sum(int(row.get("session-down", 0)) for _, row in self._peers("show bfd peers counters json"))


def events(path: Path, since: int) -> list[Mapping[str, Any]]:
    """The events of the API at this socket."""
    connection = http.client.HTTPConnection("qpd", timeout=10)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        connection.sock.connect(str(path))
        connection.request("GET", f"/v1/events?since={since}")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@contextmanager
def rig(fabric: Fabric, source: str, destination: str, near: str, links: list[Link]) -> Iterator[Rig]:
    """A rig for a ``with`` block, its links at 10 ms x 3 and traffic running."""
    made = Rig(fabric, source, destination, near, links)
    try:
        for link in links:
            fabric.set_bfd(link, *BFD)
        made.send()
        made.wait_whole()
        yield made
    finally:
        made.close()


def until(question: Callable[[], str | None], patience: float = _PATIENCE, pause: float = 0.1) -> None:
    """Ask until the answer is None. Raises BenchError with the last answer."""
    limit = time.monotonic() + patience
    while (answer := question()) is not None:
        if time.monotonic() > limit:
            raise BenchError(f"waited {patience:.0f} s in vain: {answer}")
        time.sleep(pause)


def _monotonic_ns(moment: str) -> int:
    """A time of the API (RFC 3339, UTC) on CLOCK_MONOTONIC."""
    unix = datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
    return int(unix * 1e9) - time.time_ns() + time.monotonic_ns()


def _ms(ns: int) -> float:
    return round(ns / 1e6, 3)
