"""Pairs of QPs, learned by two leaves that do not talk to each other, and both directions of each on one plane.

The traffic is acknowledged (qpd.lab.endpoint). Who is connected with whom is known from the traffic's own orders; where
packets went is judged by what arrives at the spines.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import Connection, End
from qpd.lab.endpoint.traffic import RcTraffic
from qpd.lab.fabric import Fabric
from qpd.lab.topology import Link
from qpd.lab.wire import Capture

from .judge import until

pytestmark = [pytest.mark.frr, pytest.mark.timeout(400)]

START = 120.0
"""Seconds for several daemons to compile on two busy cores."""
PATIENCE = 90.0
QPS = int(os.environ.get("QPDT_PAIRS", "48"))
"""Of the pairs of one host pair; 1024 take a quiet machine."""
QUIET = {"reconcile_interval": 3600, "idle_after": 3600}


def connections(source: str, destination: str, count: int, *, same: bool) -> list[Connection]:
    """Connections with one source port and one first PSN, or with random ones; QP numbers without any system."""
    rolls = random.Random(count)
    near = rolls.sample(range(0x1000, 0x9000), count)
    far = rolls.sample(range(0xA000, 0xF000), count)

    def end(host: str, qp: int) -> End:
        if same:
            return End(host, qp, 0, 49152)
        return End(host, qp, rolls.randrange(1 << 24), rolls.randrange(49152, 65536))

    return [
        Connection(end(source, one), end(destination, other)) for one, other in zip(near, far, strict=True)
    ]


class Leaf:
    """A leaf's qpd, and which of its host's QPs speaks with which, as it says."""

    def __init__(self, fabric: Fabric, host: str, extra: dict[str, Any]) -> None:
        self.fabric = fabric
        self.host = host
        self.name = fabric.topology.links_of(host)[0].other(host).node
        fabric.start_qpd(self.name, {**QUIET, **extra}, deadline=START)

    def get(self, question: str) -> Any:
        answer = self.fabric.sidecar(self.name).get(question, timeout=20)
        assert answer is not None, f"{self.name}: no answer to {question}"
        return answer

    def rows(self) -> dict[int, dict[str, Any]]:
        """What leaves, by destination QP."""
        own = self.fabric.address(self.host)
        return {row["dest_qp"]: row for row in self.get("/v1/qps") if row["src"] == own}

    def pairs(self) -> set[tuple[int, int]]:
        """(own host's QP, the far one's)."""
        return {(row["peer_qp"], qp) for qp, row in self.rows().items() if row["peer_qp"]}

    def paths(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.get("/v1/paths")}

    def paths_by_interface(self) -> dict[str, dict[str, Any]]:
        return {row["interface"]: row for row in self.get("/v1/paths")}

    def planes(self) -> dict[str, str]:
        return {name: row["plane"] for name, row in self.paths().items()}

    def events(self, kind: str) -> list[dict[str, Any]]:
        done = self.fabric.sidecar(self.name).qpctl("-o", "json", "events", "--no-follow")
        assert done.returncode == 0, done.stderr
        return [event for event in map(json.loads, done.stdout.splitlines()) if event["kind"] == kind]


@pytest.fixture
def ends(two_dc: Fabric) -> tuple[Fabric, str, str]:
    """Two hosts in two data centres."""
    return two_dc, two_dc.hosts[0], two_dc.hosts[-1]


def leaves(fabric: Fabric, source: str, destination: str, **extra: Any) -> tuple[Leaf, Leaf]:
    return Leaf(fabric, source, extra), Leaf(fabric, destination, extra)


async def eventually(question: Any, deadline: float = PATIENCE) -> None:
    await asyncio.to_thread(partial(until, question, deadline))


def truth(made: Sequence[Connection]) -> set[tuple[int, int]]:
    """As the source's leaf should say it."""
    return {(one.source.qp, one.destination.qp) for one in made}


def turned(pairs: set[tuple[int, int]]) -> set[tuple[int, int]]:
    return {(far, near) for near, far in pairs}


async def learned(leaf: Leaf, wanted: set[tuple[int, int]]) -> None:
    """Until the leaf knows all pairs; a wrong one on the way fails."""

    def missing() -> str | None:
        known = leaf.pairs()
        assert known <= wanted, f"{leaf.name}: wrong pairs {known - wanted}"
        return None if known == wanted else f"{leaf.name}: {len(wanted - known)} pairs are not known"

    await eventually(missing)


@pytest.mark.parametrize("same", [True, False], ids=["same PSN and port", "random PSNs and ports"])
def test_both_leaves_learn_all_pairs(ends: tuple[Fabric, str, str], same: bool) -> None:
    """QPs that start together, clocked by their acknowledgements; nobody tells the leaves anything."""
    fabric, source, destination = ends
    here, there = leaves(fabric, source, destination, symmetric=False)
    made = connections(source, destination, QPS, same=same)

    async def body() -> None:
        async with RcTraffic(fabric, made, rate=None, message=256, transport=Transport(window=4, timeout=16)):
            begun = time.monotonic()
            for leaf, wanted in ((here, truth(made)), (there, turned(truth(made)))):
                await learned(leaf, wanted)
                packets = sorted(row["packets"] for row in leaf.rows().values())
                print(
                    f"{leaf.name}: {QPS} pairs known {time.monotonic() - begun:.1f} s after traffic began; packets "
                    f"of a QP: median {packets[len(packets) // 2]}, most {packets[-1]}"
                )

    asyncio.run(body())
    assert here.pairs() == truth(made)
    assert there.pairs() == turned(truth(made))


def left_across(fabric: Fabric, links: Sequence[Link]) -> str | None:
    """A route that still uses one of these links, or a leaf that a spine has no route to."""
    vteps = {fabric.vtep(leaf) for leaf in fabric.leaves}
    for spine in fabric.spines:
        routes = fabric.next_hops(spine)
        if lost := vteps - routes.keys():
            return f"{spine} has no route to {lost}"
        for end in (end for link in links for end in link.ends if end.node == spine):
            if any(end.interface == interface for vtep in vteps for interface, _ in routes[vtep]):
                return f"{end} is used"
    return None


def test_both_directions_are_put_on_one_plane(ends: tuple[Fabric, str, str]) -> None:
    """Two planes that meet nowhere: the links across are cut.

    At most one direction moves, once, and it is the one that answers, though its end is the lesser one.
    """
    fabric, destination, source = ends
    across = [fabric.link("dc1-spine1", "dc2-spine2"), fabric.link("dc1-spine2", "dc2-spine1")]
    for link in across:
        fabric.cut(link)
    until(lambda: left_across(fabric, across), PATIENCE)
    here, there = leaves(fabric, source, destination, symmetric_idle=0.01)
    made = connections(source, destination, 16, same=False)
    planes = {
        str(link.other(leaf.name)): leaf.paths_by_interface()[link.end(leaf.name).interface]["plane"]
        for leaf in (here, there)
        for link in fabric.topology.uplinks(leaf.name)
    }

    def split() -> str | None:
        rows, back = here.rows(), there.rows()
        apart = [
            pair
            for pair in truth(made)
            if here.planes()[rows[pair[1]]["path"]] != there.planes()[back[pair[0]]["path"]]
        ]
        return f"{len(apart)} on two planes" if apart else None

    async def body() -> dict[int, set[str]]:
        # Slowly: a QP's packets leave silences in which it may be moved.
        async with RcTraffic(
            fabric, made, rate=15.0, message=256, transport=Transport(timeout=16)
        ) as traffic:
            await learned(here, truth(made))
            await learned(there, turned(truth(made)))
            await eventually(split)
            seen: dict[int, set[str]] = {}
            for leaf in (here, there):
                capture = Capture.of_uplinks(fabric, leaf.name, live=True)
                async with capture:
                    await asyncio.sleep(1.0)
                for qp, places in (await capture.decode()).links_by_qp().items():
                    seen[qp] = {planes[str(end)] for end in places}
        assert traffic.result.errors == []
        assert sum(qp.retransmitted for qp in traffic.result.qps) == 0
        return seen

    seen = asyncio.run(body())
    for near, far in truth(made):
        assert len(seen[near]) == 1
        assert seen[near] == seen[far]
    moves = [{qp: row["moves"] for qp, row in leaf.rows().items()} for leaf in (here, there)]
    assert max(*moves[0].values(), *moves[1].values()) == 1
    assert set(moves[0].values()) == {0}


def test_a_gray_path_is_reported_and_drained_but_never_the_last(four_spine: Fabric) -> None:
    """One packet in twenty is lost on the way to one spine. BFD, made patient, sees nothing of it."""
    fabric = four_spine
    source, destination = fabric.hosts[0], fabric.hosts[-1]
    name = fabric.topology.links_of(source)[0].other(source).node
    uplinks = fabric.topology.uplinks(name)
    for link in uplinks:
        fabric.set_bfd(link, 200, 50)
    leaf = Leaf(fabric, source, {"gray": {"action": "drain", "hold": 3}})
    made = connections(source, destination, 16, same=False)
    bad = uplinks[0]

    def path() -> dict[str, Any]:
        return leaf.paths_by_interface()[bad.end(name).interface]

    def state(wanted: str) -> str | None:
        return None if path()["state"] == wanted else f"{path()}"

    async def body() -> None:
        async with RcTraffic(fabric, made, rate=40.0, message=256, transport=Transport(timeout=14)):
            await eventually(lambda: None if len(leaf.pairs()) == len(made) else "pairs are not known")
            fabric.lose(bad, bad.other(name).node, 0.05)
            await eventually(partial(state, "drained"))
            assert path()["reason"] == "gray"
            used = leaf.rows()
            assert path()["name"] not in {row["path"] for row in used.values()}
            assert all(path["bfd"]["state"] == "up" for path in leaf.paths().values() if path["bfd"])
            # It is tried again, found as bad as before, and for longer.
            await eventually(lambda: None if len(leaf.events("path-gray")) > 1 else "no relapse")
            holds = [event["detail"]["hold_s"] for event in leaf.events("path-gray")]
            assert holds[:2] == [3, 6]
            # All others are taken away: a bad path is better than none.
            for link in uplinks[1:]:
                fabric.cut(link)
            await eventually(partial(state, "up"))
            for link in uplinks[1:]:
                fabric.heal(link)
            fabric.stop_losing(bad, bad.other(name).node)
            await eventually(lambda: None if not path()["gray"] and path()["state"] == "up" else f"{path()}")

    asyncio.run(body())
    assert [
        event["detail"]["reason"]
        for event in leaf.events("path-down")
        if event["detail"]["interface"] == bad.end(name).interface
    ] == []
