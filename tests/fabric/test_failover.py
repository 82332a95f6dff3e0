"""Paths that die and return on the real fabric: who moves, who stays, what the main table and qpd's own table hold.

Facts only, no times: those are measured by `make bench-failover`. BFD runs at the labs' 100 ms x 3.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qpd.kernel.fib import TABLE
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.lab import frr
from qpd.lab.fabric import Fabric
from qpd.lab.namespaces import inside
from qpd.lab.traffic import Flow, Traffic

from .judge import until
from .test_steering import START, Leaf, leaf_of, sightings

pytestmark = [pytest.mark.frr]

QPS = range(0x300, 0x310)
RATE = 100.0
CONFIG = {"reconcile_interval": 3600, "hold_up": 0.2}
"""What follows a change follows from its event; and nobody waits longer than needed."""
DOWN = {"bfd-down", "bfd-silent"}


class Guarded(Leaf):
    """A leaf with qpd, RoCE from its host to the last one, and what must be so again when all is over."""

    def __init__(self, fabric: Fabric) -> None:
        self.source, self.destination = fabric.hosts[0], fabric.hosts[-1]
        super().__init__(fabric, leaf_of(fabric, self.source))
        fabric.start_qpd(self.name, CONFIG, deadline=START)
        self.main = self.main_routes()

    def main_routes(self) -> list[str]:
        """The routes of zebra, as ip(8) shows them."""
        shown = self.fabric.exec(self.name, "ip", "-j", "route", "show", "proto", "bgp").stdout
        routes = json.loads(shown or "[]")
        for route in routes:
            route.get("nexthops", []).sort(key=lambda hop: (hop["dev"], str(hop)))
        return sorted(json.dumps(route, sort_keys=True) for route in routes)

    def own_routes(self) -> list[dict[str, Any]]:
        """The own table of qpd, both families, as ip(8) shows it."""
        found: list[dict[str, Any]] = []
        for family in ("-4", "-6"):
            shown = self.fabric.exec(
                self.name, "ip", family, "-j", "route", "show", "table", str(TABLE), check=False
            )
            # The kernel has no such table before its first route.
            found += json.loads(shown.stdout or "[]") if shown.returncode == 0 else []
        return found

    def kinds(self, since: int = 0) -> list[str]:
        """The kinds of events, in order."""
        return [event["kind"] for event in self.events(since)]

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        done = self.fabric.sidecar(self.name).qpctl("-o", "json", "events", "--no-follow")
        assert done.returncode == 0, done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
        return [event for event in told if event["seq"] > since]

    def frr_told(self, kind: str, since: int) -> set[str]:
        """The daemons of FRR's that events of this kind name."""
        return {event["detail"]["daemon"] for event in self.events(since) if event["kind"] == kind}

    def last_event(self) -> int:
        return max((event["seq"] for event in self.events()), default=0)

    def homes(self) -> dict[int, str]:
        return {qp: row["home"] for qp, row in self.rows(QPS).items()}

    def moves(self) -> dict[int, int]:
        return {qp: row["moves"] for qp, row in self.rows(QPS).items()}

    # --- waiting

    async def moved(self, wanted: dict[int, int]) -> None:
        """Wait until each QP has moved so often: the kernel counts a move with the first packet that makes it."""
        await eventually(lambda: None if self.moves() == wanted else f"moves {self.moves()}, wanted {wanted}")

    async def dead(self, *names: str) -> None:
        """Wait until these paths are down and no QP uses them."""

        def question() -> str | None:
            states = {name: row["state"] for name, row in self.paths().items()}
            used = set(self.current(QPS).values())
            wrong = [name for name in names if states[name] != "down" or name in used]
            return f"{wrong}: {states}, used: {used}" if wrong else None

        await eventually(question)

    async def whole(self) -> None:
        """Wait until everything is as it was: paths, QPs, zebra's routes; and nothing is left in the own table."""

        def question() -> str | None:
            down = {name: row["reason"] for name, row in self.paths().items() if row["state"] != "up"}
            away = [qp for qp, row in self.rows(QPS).items() if row["state"] != "home"]
            if down or away:
                return f"paths {down}, QPs not at home: {away}"
            if self.own_routes() or self.get("/v1/status")["overrides"]:
                return f"own table: {self.own_routes()}"
            return None if self.main_routes() == self.main else "zebra's routes are not as before"

        await eventually(question)


async def eventually(question: Callable[[], str | None], deadline: float = 60.0) -> None:
    await asyncio.to_thread(partial(until, question, deadline))


def scenario(leaf: Guarded, story: Callable[[dict[int, str]], Any]) -> Traffic:
    """Run a story under traffic whose QPs are all placed; the story gets their homes. At its end all is whole."""
    traffic = Traffic(leaf.fabric, [Flow(leaf.source, leaf.destination, QPS, rate=RATE, size=128)])

    async def body() -> None:
        async with traffic:
            await eventually(lambda: None if len(leaf.rows(QPS)) == len(QPS) else "QPs are missing")
            homes = leaf.homes()
            await story(homes)
            await leaf.whole()
            assert leaf.homes() == homes

    asyncio.run(body())
    return traffic


def stayed(leaf: Guarded, homes: dict[int, str], lost: Sequence[str]) -> None:
    """No QP of a path that lived has ever moved."""
    moves = leaf.moves()
    assert {qp: moves[qp] for qp in QPS if homes[qp] not in lost and moves[qp]} == {}


@pytest.fixture
def leaf(two_dc: Fabric) -> Guarded:
    """The first leaf of the two data centres."""
    return Guarded(two_dc)


@pytest.fixture
def wide_leaf(four_spine: Fabric) -> Guarded:
    """The first leaf under four spines."""
    return Guarded(four_spine)


def test_the_daemon_goes_before_other_work(leaf: Guarded) -> None:
    """What acts upon a lost carrier is real-time, and nothing else that the daemon does."""
    daemon = leaf.fabric.records.find(f"{leaf.name}.qpd")
    assert daemon is not None
    threads = {
        int(entry.name): os.sched_getscheduler(int(entry.name)) for entry in daemon_threads(daemon.pid)
    }
    assert threads.pop(daemon.pid) == os.SCHED_RR | os.SCHED_RESET_ON_FORK
    assert set(threads.values()) <= {os.SCHED_OTHER}


def daemon_threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


@pytest.mark.parametrize("direction", ["both ways", "leaf to spine", "spine to leaf"])
def test_silent_loss(leaf: Guarded, direction: str) -> None:
    """Carrier stays, packets vanish: the dead path's QPs move, the others do not, and all come home."""

    async def story(homes: dict[int, str]) -> None:
        victim = homes[QPS[0]]
        link = leaf.link(victim)
        towards = {"both ways": None, "leaf to spine": link.other(leaf.name).node, "spine to leaf": leaf.name}
        with leaf.fabric.fault(link, towards=towards[direction]):
            await leaf.dead(victim)
            assert leaf.paths()[victim]["reason"] in DOWN
            await leaf.moved({qp: int(homes[qp] == victim) for qp in QPS})
        await leaf.whole()
        await leaf.moved({qp: 2 * (homes[qp] == victim) for qp in QPS})
        (down,) = [event for event in leaf.events() if event["kind"] == "path-down"]
        assert down["kernel_ns"] is not None, "the kernel's own time stamp: the tap was first"

    scenario(leaf, story)


def test_other_traffic_follows_before_bgp_has_converged(leaf: Guarded) -> None:
    """With zebra held, main keeps the dead next hop: qpd's own routes lead by the survivor until zebra converges.

    Not bgpd: its peers would close their sessions after the hold time (9 s), and all routes would go.
    """
    fabric = leaf.fabric
    zebra = fabric.records.find(f"{leaf.name}.zebra")
    assert zebra is not None
    address = fabric.address(leaf.destination)
    others = {fabric.vtep(name) for name in fabric.leaves if name != leaf.name}

    async def story(homes: dict[int, str]) -> None:
        victim = homes[QPS[0]]
        link = leaf.link(victim)
        interface = link.end(leaf.name).interface
        zebra.send(signal.SIGSTOP)
        try:
            fabric.lose(link)
            await eventually(lambda: None if others <= own() else f"own routes: {leaf.own_routes()}")
            for route in leaf.own_routes():
                hops = route.get("nexthops", [route])
                assert interface not in {hop["dev"] for hop in hops}
                assert str(route["protocol"]) == "79"
            assert leaf.main_routes() == leaf.main, "zebra's routes are not qpd's to change"
            await asyncio.to_thread(reaches, fabric, leaf.source, leaf.destination, address)
        finally:
            zebra.send(signal.SIGCONT)
        await eventually(lambda: f"still there: {leaf.own_routes()}" if leaf.own_routes() else None)
        assert leaf.main_routes() != leaf.main
        assert leaf.paths()[victim]["state"] == "down"
        stayed(leaf, homes, [victim])
        fabric.heal(link)

    def own() -> set[str]:
        return {route["dst"] for route in leaf.own_routes()}

    scenario(leaf, story)
    assert {"override-set", "override-cleared"} <= set(leaf.kinds())


def reaches(fabric: Fabric, source: str, destination: str, address: str) -> None:
    """ICMP and TCP between hosts work."""
    series = ("ping", "-q", "-c", "20", "-i", "0.02", "-W", "1", address)

    def question() -> str | None:
        """A series that loses nothing: the way back, through other routers, may heal later than the way there."""
        said = fabric.exec(source, *series, check=False).stdout
        return None if " 0% packet loss" in said else said

    until(question)
    server = inside(fabric.namespace(destination), lambda: socket.create_server((address, 0)))
    with server:
        client = inside(fabric.namespace(source), lambda: socket.create_connection(server.getsockname(), 10))
        accepted, _ = server.accept()
        with client, accepted:
            accepted.settimeout(10)
            client.sendall(bytes(100_000))
            client.shutdown(socket.SHUT_WR)
            received = 0
            while data := accepted.recv(1 << 16):
                received += len(data)
            assert received == 100_000


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_the_tap_alone(leaf: Guarded, number: signal.Signals) -> None:
    """No daemon lifts a finger: the kernel moves the dead path's QPs and brings them home. Judged by the spines."""
    fabric = leaf.fabric

    async def wire() -> dict[int, set[str]]:
        seen = (await sightings(fabric, leaf, 0.4)).links_by_qp(QPS)
        return {qp: {str(end) for end in places} for qp, places in seen.items()}

    async def story(homes: dict[int, str]) -> None:
        victim = homes[QPS[0]]
        link = leaf.link(victim)
        far = {name: str(leaf.link(name).other(leaf.name)) for name in leaf.paths()}
        before = {qp: {far[home]} for qp, home in homes.items()}
        assert await wire() == before
        survivors = {far[name] for name in far if name != victim}
        with Maps(Pins.of(fabric.sidecar(leaf.name).pins).directory) as maps:
            fabric.kill_qpd(leaf.name, number)
            with fabric.fault(link):
                await eventually(lambda: None if maps.tap_dead() else "the tap has not noticed")
                during = await wire()
                assert {qp: during[qp] for qp in QPS if homes[qp] != victim} == {
                    qp: before[qp] for qp in QPS if homes[qp] != victim
                }
                assert all(during[qp] <= survivors for qp in QPS if homes[qp] == victim)
            await eventually(lambda: "held down" if maps.tap_dead() else None)
            assert await wire() == before
        if number == signal.SIGSTOP:
            fabric.kill_qpd(leaf.name, signal.SIGCONT)
        else:
            await asyncio.to_thread(partial(fabric.start_qpd, leaf.name, CONFIG, deadline=START))
        await leaf.whole()
        stayed(leaf, homes, [victim])

    scenario(leaf, story)


@pytest.mark.parametrize("how", ["carrier", "silent"])
def test_flapping(leaf: Guarded, how: str) -> None:
    """A link that goes down and up twenty times in ten seconds disturbs its own QPs only; then all are home."""

    async def story(homes: dict[int, str]) -> None:
        victim = homes[QPS[0]]
        link = leaf.link(victim)
        if how == "silent":
            # So that each silence is longer than the detection time.
            leaf.fabric.set_bfd(link, 10, 3)
        lose, heal = {
            "carrier": (partial(leaf.fabric.cut, link, leaf.name), partial(leaf.fabric.heal, link)),
            "silent": (partial(leaf.fabric.lose, link), partial(leaf.fabric.heal, link)),
        }[how]
        for _ in range(20):
            lose()
            await asyncio.sleep(0.25)
            heal()
            await asyncio.sleep(0.25)
        await leaf.whole()
        stayed(leaf, homes, [victim])
        told = [event for event in leaf.events() if event["kind"] == "path-down"]
        assert {event["detail"]["path"] for event in told} == {victim}

    scenario(leaf, story)


def test_two_paths_lost_in_every_order(wide_leaf: Guarded) -> None:
    """The order of failures leaves no trace: the same stand-ins, whoever died first, and whoever returns first."""
    leaf = wide_leaf

    async def story(homes: dict[int, str]) -> None:
        first, second = sorted(set(homes.values()))[:2]
        links = {name: leaf.link(name) for name in (first, second)}
        stand_ins = []
        for going, coming in (((first, second), (first, second)), ((second, first), (first, second))):
            for name in going:
                leaf.fabric.cut(links[name], leaf.name)
                await leaf.dead(name)
            stand_ins.append(leaf.current(QPS))
            for name in coming:
                leaf.fabric.heal(links[name])
                await eventually(partial(is_up, leaf, name))
        assert stand_ins[0] == stand_ins[1]
        stayed(leaf, homes, [first, second])

    scenario(leaf, story)


def is_up(leaf: Guarded, name: str) -> str | None:
    state = leaf.paths()[name]["state"]
    return None if state == "up" else f"{name} is {state}"


def test_all_paths_lost_and_back(leaf: Guarded) -> None:
    """With no living path the kernel's own choice is left; then everyone is home."""

    async def story(_homes: dict[int, str]) -> None:
        before = leaf.get("/v1/status")["verdicts"]["steer"]
        for link in leaf.uplinks:
            leaf.fabric.lose(link)
        await eventually(
            lambda: None if all(row["state"] == "down" for row in leaf.paths().values()) else "one lives"
        )
        after = leaf.get("/v1/status")["verdicts"]["steer"]
        assert after["map_full"] == before["map_full"]
        for link in leaf.uplinks:
            leaf.fabric.heal(link)

    scenario(leaf, story)


def test_return_while_another_fails(wide_leaf: Guarded) -> None:
    """One link is healed in the moment in which the next is lost."""
    leaf = wide_leaf

    async def story(homes: dict[int, str]) -> None:
        first, second = sorted(set(homes.values()))[:2]
        one, other = leaf.link(first), leaf.link(second)
        leaf.fabric.lose(one)
        await leaf.dead(first)
        stand_ins = leaf.current(QPS)
        leaf.fabric.heal(one)
        leaf.fabric.lose(other)
        await leaf.dead(second)
        await eventually(partial(is_up, leaf, first))
        leaf.fabric.heal(other)
        await leaf.whole()
        stayed(leaf, homes, [first, second])

        def wrong() -> str | None:
            # Away and home; who stood in on the path that failed next moved once more, had its home not come first.
            moves = leaf.moves()
            twice = all(moves[qp] == 2 for qp in QPS if homes[qp] == first and stand_ins[qp] != second)
            return (
                None if twice and all(moves[qp] in {2, 3} for qp in QPS if homes[qp] == first) else str(moves)
            )

        await eventually(wrong)

    scenario(leaf, story)


@pytest.fixture
def announced(leaf: Guarded) -> Iterator[tuple[str, str, Callable[[bool], None]]]:
    """A spine, a prefix, and how to let it be announced there."""
    prefix, spine = "203.0.113.0/24", leaf.uplinks[-1].other(leaf.name).node
    asn = leaf.fabric.conf(spine).asn

    def announce(wanted: bool) -> None:
        word = () if wanted else ("no",)
        leaf.fabric.exec(
            spine, "ip", "route", "replace" if wanted else "del", "blackhole", prefix, check=wanted
        )
        network = " ".join((*word, "network", prefix))
        leaf.fabric.vtysh(
            spine, "configure terminal", f"router bgp {asn}", "address-family ipv4 unicast", network
        )

    yield spine, prefix, announce
    leaf.fabric.exec(spine, "ip", "route", "del", "blackhole", prefix, check=False)


def test_routes_that_change_during_a_failure(
    leaf: Guarded, announced: tuple[str, str, Callable[[bool], None]]
) -> None:
    """A destination appears and goes while a path is dead; no one else is disturbed."""
    spine, prefix, announce = announced

    def group() -> set[str]:
        groups = [group for group in leaf.get("/v1/groups") if prefix in group["destinations"]]
        return {member["path"] for group in groups for member in group["members"]}

    async def story(homes: dict[int, str]) -> None:
        (other,) = [name for name in leaf.paths() if leaf.link(name).other(leaf.name).node != spine]
        (survivor,) = [name for name in leaf.paths() if name != other]
        with leaf.fabric.fault(leaf.link(other)):
            await leaf.dead(other)
            announce(True)
            await eventually(lambda: None if group() == {survivor} else f"group of {prefix}: {group()}")
            announce(False)
            await eventually(lambda: f"group of {prefix}: {group()}" if group() else None)
        await leaf.whole()
        stayed(leaf, homes, [other])

    scenario(leaf, story)


@pytest.mark.parametrize("daemon", ["bfdd", "bgpd"])
def test_frr_daemon_killed_and_back(leaf: Guarded, daemon: str) -> None:
    """The loss has a name, the classifier stays, and with the daemon's return everything is at home."""
    fabric = leaf.fabric
    instance = fabric.frr[leaf.name]

    async def story(homes: dict[int, str]) -> None:
        since = leaf.last_event()
        process = fabric.records.find(f"{leaf.name}.{daemon}")
        assert process is not None
        process.send(signal.SIGKILL)
        try:
            await eventually(lambda: None if told("frr-lost", since) else f"{leaf.kinds(since)}")
        finally:
            await asyncio.to_thread(instance.restart, daemon, time.monotonic() + 60.0)
        await back_at_home(leaf, {daemon}, since, homes)

    def told(kind: str, since: int) -> bool:
        return daemon in leaf.frr_told(kind, since)

    scenario(leaf, story)


def test_frr_restarted(leaf: Guarded) -> None:
    """Zebra dies, and all is started anew, as watchfrr does it. As long as routes stand, nothing moves."""
    fabric = leaf.fabric
    instance = fabric.frr[leaf.name]

    async def story(homes: dict[int, str]) -> None:
        since = leaf.last_event()
        zebra = fabric.records.find(f"{leaf.name}.zebra")
        assert zebra is not None
        zebra.send(signal.SIGKILL)
        try:
            await eventually(lambda: None if "zebra" in leaf.frr_told("frr-lost", since) else "no word of it")
            assert leaf.main_routes() == leaf.main
            assert set(leaf.moves().values()) == {0}
        finally:
            for daemon in reversed(instance.daemons()):
                await asyncio.to_thread(fabric.records.end, f"{leaf.name}.{daemon}")
            await asyncio.to_thread(frr.bring_up, [instance], time.monotonic() + 60.0)
        await back_at_home(leaf, set(instance.daemons()), since, homes)

    scenario(leaf, story)


async def back_at_home(leaf: Guarded, daemons: set[str], since: int, homes: dict[int, str]) -> None:
    """FRR's daemons are back and said so, every QP is where it was, and nothing of qpd's gave way meanwhile."""
    await asyncio.to_thread(leaf.fabric.wait_converged, 60.0)
    await eventually(lambda: None if daemons <= leaf.frr_told("frr-back", since) else f"{leaf.kinds(since)}")
    await leaf.whole()
    assert leaf.homes() == homes
    assert not {"limit-reached", "uplink-detached", "path-gone"} & set(leaf.kinds(since))
