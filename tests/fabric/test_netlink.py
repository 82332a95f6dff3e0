"""NetlinkSource tells what `ip` did to a kernel.

Every test ends with the same question: does the picture that the events have built equal the kernel's own, dumped anew?
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path

import pytest
import uvloop

from qpd.kernel.netlink import NetlinkSource
from qpd.model import (
    Event,
    Facts,
    Link,
    LinkChanged,
    LinkGone,
    Neighbour,
    NeighbourChanged,
    NeighbourGone,
    NeighbourState,
    Network,
    NextHop,
    Resynced,
    Route,
    RouteChanged,
    RouteGone,
)
from tests.fabric.kernel_router import KernelRouter, nexthops4, nexthops6

DST4 = IPv4Network("10.9.0.0/24")
DST6 = IPv6Network("2001:db8:9::/48")


@pytest.fixture
def router() -> Iterator[KernelRouter]:
    opened = KernelRouter("netlink")
    try:
        yield opened.open()
    finally:
        opened.close()


class Picture:
    """What somebody knows who hears the events and nothing else."""

    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.links: dict[int, Link] = {}
        self.routes: dict[tuple[Network, int], Route] = {}
        self.neighbours: dict[tuple[int, object], Neighbour] = {}

    def deliver(self, events: list[Event]) -> None:
        self.batches.append(events)
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Resynced(facts):
                self.links = {link.ifindex: link for link in facts.links}
                self.routes = {(route.prefix, route.metric): route for route in facts.routes}
                self.neighbours = {(n.ifindex, n.address): n for n in facts.neighbours}
            case LinkChanged(link):
                self.links[link.ifindex] = link
            case LinkGone(ifindex):
                del self.links[ifindex]
            case RouteChanged(route):
                self.routes[route.prefix, route.metric] = route
            case RouteGone(prefix, metric):
                del self.routes[prefix, metric]
            case NeighbourChanged(neighbour):
                self.neighbours[neighbour.ifindex, neighbour.address] = neighbour
            case NeighbourGone(ifindex, address):
                del self.neighbours[ifindex, address]

    def events(self) -> list[Event]:
        return [event for batch in self.batches for event in batch]

    def legs(self, prefix: str) -> dict[str, tuple[int, bool]]:
        """Address to (weight, alive) of the route of lowest metric; empty where there is none."""
        found = sorted(
            (r for r in self.routes.values() if r.prefix == ip_network(prefix)), key=lambda r: r.metric
        )
        return {str(leg.address): (leg.weight, leg.alive) for leg in found[0].next_hops} if found else {}

    def with_legs(self, number: int) -> int:
        """How many destinations behind gateways have this many legs."""
        gatewayed = (r for r in self.routes.values() if not r.next_hops[0].connected)
        return sum(len(route.next_hops) == number for route in gatewayed)

    def with_a_dead_leg(self) -> int:
        """How many destinations have a leg that is dead."""
        return sum(any(not leg.alive for leg in route.next_hops) for route in self.routes.values())


class Lab:
    """A source beside a router, and the picture that its events make."""

    def __init__(self, router: KernelRouter) -> None:
        self.router = router
        self.picture = Picture()
        self.source = NetlinkSource(open_socket=router.open_socket)

    async def until(self, what: str, condition: Callable[[], object], patience: float = 20.0) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, (
                f"not within {patience:.0f} s: {what}; {self.picture.events()[-5:]}"
            )
            await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Wait until the picture is the kernel's."""
        deadline = time.monotonic() + 20
        while True:
            truth = await self._truth()
            if (
                set(truth.links) == set(self.picture.links.values())
                and set(truth.routes) == set(self.picture.routes.values())
                and {(n.ifindex, n.address) for n in truth.neighbours} == set(self.picture.neighbours)
            ):
                return
            assert time.monotonic() < deadline, (
                f"routes {set(truth.routes) ^ set(self.picture.routes.values())}, "
                f"links {set(truth.links) ^ set(self.picture.links.values())}, "
                f"neighbours {set(truth.neighbours) ^ set(self.picture.neighbours.values())}"
            )
            await asyncio.sleep(0.02)

    async def _truth(self) -> Facts:
        other = Picture()
        source = NetlinkSource(open_socket=self.router.open_socket)
        await source.start(other.deliver)
        await source.stop()
        first = other.batches[0][0]
        assert isinstance(first, Resynced)
        return first.facts


@pytest.fixture
async def lab(router: KernelRouter) -> AsyncIterator[Lab]:
    opened = Lab(router)
    await opened.source.start(opened.picture.deliver)
    try:
        yield opened
        await opened.settled()
    finally:
        await opened.source.stop()


async def test_the_first_batch_is_the_whole_picture(lab: Lab) -> None:
    (first,) = lab.picture.batches[0]
    assert isinstance(first, Resynced)
    links = {link.name: link for link in first.facts.links}
    assert {"lo", "u0", "u1", "u2", "u3"} == set(links)
    assert links["u1"].up
    assert links["u1"].kind == "veth"
    assert links["u1"].ifindex == lab.router.index["u1"]
    assert len(links["u1"].mac) == 17
    connected = {r.prefix: r for r in first.facts.routes}[IPv4Network("10.1.1.0/31")]
    assert connected.next_hops == (NextHop(lab.router.index["u1"], IPv4Address("0.0.0.0")),)
    assert connected.next_hops[0].connected


async def test_no_route_is_told_that_is_no_destination(lab: Lab) -> None:
    """Local, link-local, multicast, other tables, by TOS: none of these is main's unicast route."""
    lab.router.ip("route", "add", str(DST4), "table", "100", *nexthops4(0))
    lab.router.ip("route", "add", str(DST4), "tos", "8", "via", "10.1.0.1")
    lab.router.ip("route", "add", "blackhole", "10.66.0.0/16")
    lab.router.ip("route", "add", "10.67.0.0/16", "via", "10.1.0.1")
    await lab.until("the marker", lambda: lab.picture.legs("10.67.0.0/16"))
    for prefix, _ in lab.picture.routes:
        assert not prefix.is_link_local
        assert not prefix.is_multicast
    assert lab.picture.legs(str(DST4)) == {}
    assert lab.picture.legs("10.66.0.0/16") == {}
    assert lab.picture.legs("10.1.0.0/32") == {}


async def test_ecmp_with_weights_is_told_and_replaced(lab: Lab) -> None:
    lab.router.ip("route", "add", str(DST4), "proto", "bgp", *nexthops4(0), "weight", "3", *nexthops4(1))
    await lab.until(
        "two legs", lambda: lab.picture.legs(str(DST4)) == {"10.1.0.1": (3, True), "10.1.1.1": (1, True)}
    )
    (route,) = (r for r in lab.picture.routes.values() if r.prefix == DST4)
    assert route.protocol == 186
    lab.router.ip("route", "replace", str(DST4), "proto", "bgp", *nexthops4(0, 2, 3))
    await lab.until("three", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.0.1", "10.1.2.1", "10.1.3.1"})
    lab.router.ip("route", "replace", str(DST4), "proto", "bgp", "via", "10.1.2.1")
    await lab.until("one", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.2.1"})
    lab.router.ip("route", "del", str(DST4))
    await lab.until("none", lambda: lab.picture.legs(str(DST4)) == {})


async def test_ipv4_over_ipv6_link_local_next_hops(lab: Lab) -> None:
    """As FRR writes them for BGP unnumbered (RFC 8950): RTA_VIA in a multipath route and in a single one."""
    legs = [word for n in (0, 1) for word in ("nexthop", "via", "inet6", f"fe80::{n}", "dev", f"u{n}")]
    lab.router.ip("route", "add", str(DST4), *legs)
    await lab.until("two", lambda: set(lab.picture.legs(str(DST4))) == {"fe80::", "fe80::1"})
    lab.router.ip("route", "replace", str(DST4), "via", "inet6", "fe80::7", "dev", "u1")
    await lab.until("one", lambda: set(lab.picture.legs(str(DST4))) == {"fe80::7"})


async def test_a_blackhole_in_the_place_of_a_route_is_its_end(lab: Lab) -> None:
    lab.router.ip("route", "add", str(DST4), "via", "10.1.0.1")
    await lab.until("there", lambda: lab.picture.legs(str(DST4)))
    lab.router.ip("route", "replace", "blackhole", str(DST4))
    await lab.until("gone", lambda: not lab.picture.legs(str(DST4)))
    lab.router.ip("route", "replace", str(DST4), "via", "10.1.1.1")
    await lab.until("back", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.1.1"})


async def test_metrics_are_routes_of_their_own(lab: Lab) -> None:
    for metric, n in (("20", 0), ("200", 1)):
        lab.router.ip("route", "add", str(DST4), "metric", metric, "via", f"10.1.{n}.1")
    await lab.until("both", lambda: {(DST4, 20), (DST4, 200)} <= set(lab.picture.routes))
    lab.router.ip("route", "del", str(DST4), "metric", "20")
    await lab.until("one", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.1.1"})


async def test_of_two_ipv4_routes_under_one_key_the_first_counts(lab: Lab) -> None:
    """`ip route append` and `prepend`; when the first goes, the second serves without a word from the kernel."""
    lab.router.ip("route", "add", str(DST4), "via", "10.1.0.1")
    lab.router.ip("route", "append", str(DST4), "via", "10.1.1.1")
    lab.router.ip("route", "prepend", str(DST4), "via", "10.1.2.1")
    await lab.until("prepended", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.2.1"})
    await lab.settled()
    lab.router.ip("route", "del", str(DST4), "via", "10.1.2.1")
    await lab.until("the second", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.0.1"})
    lab.router.ip("route", "del", str(DST4), "via", "10.1.1.1")
    await lab.settled()
    assert set(lab.picture.legs(str(DST4))) == {"10.1.0.1"}


async def test_a_link_goes_down_and_its_legs_die(lab: Lab) -> None:
    """The kernel sends nothing about the route (fib_sync_down_dev); the link's own event comes in a batch before."""
    lab.router.ip("route", "add", str(DST4), *nexthops4(0, 1))
    lab.router.ip("route", "add", "10.8.0.0/24", *nexthops4(1))
    await lab.until("there", lambda: lab.picture.legs(str(DST4)) and lab.picture.legs("10.8.0.0/24"))
    lab.picture.batches.clear()
    lab.router.ip("link", "set", "u1", "down")
    await lab.until("u1 dead", lambda: lab.picture.legs(str(DST4)).get("10.1.1.1") == (1, False))
    await lab.until("its only route gone", lambda: not lab.picture.legs("10.8.0.0/24"))
    first = lab.picture.batches[0]
    assert [type(event) for event in first] == [LinkChanged]
    assert not lab.picture.links[lab.router.index["u1"]].up
    lab.router.ip("link", "set", "u1", "up")
    await lab.until("u1 alive", lambda: lab.picture.legs(str(DST4)).get("10.1.1.1") == (1, True))


async def test_carrier_loss_makes_a_leg_dead_and_its_return_alive(lab: Lab) -> None:
    lab.router.ip("route", "add", str(DST4), *nexthops4(0, 1))
    lab.router.ip("-6", "route", "add", str(DST6), *nexthops6(0, 1))
    await lab.until("there", lambda: lab.picture.legs(str(DST4)) and lab.picture.legs(str(DST6)))
    lab.router.ip_far("link", "set", "u0", "down")
    await lab.until("v4 dead", lambda: lab.picture.legs(str(DST4)).get("10.1.0.1") == (1, False))
    await lab.until("v6 dead", lambda: not lab.picture.legs(str(DST6)).get("2001:db8::1", (1, False))[1])
    lab.router.ip_far("link", "set", "u0", "up")
    await lab.until("v4 alive", lambda: lab.picture.legs(str(DST4)).get("10.1.0.1") == (1, True))


async def test_a_link_that_is_deleted_takes_its_legs_along(lab: Lab) -> None:
    lab.router.ip("route", "add", str(DST4), *nexthops4(0, 1))
    lab.router.ip("-6", "route", "add", str(DST6), *nexthops6(0, 1))
    await lab.until("there", lambda: lab.picture.legs(str(DST4)) and lab.picture.legs(str(DST6)))
    index = lab.router.index["u1"]
    lab.router.ip("link", "del", "u1")
    await lab.until("the link", lambda: index not in lab.picture.links)
    await lab.until("v6", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8::1"})
    await lab.settled()
    assert all(leg.ifindex != index for r in lab.picture.routes.values() for leg in r.next_hops if leg.alive)


async def test_an_address_takes_routes_along_that_name_it_as_source(lab: Lab) -> None:
    lab.router.ip("addr", "add", "10.5.5.5/32", "dev", "lo")
    lab.router.ip("route", "add", str(DST4), "via", "10.1.0.1", "src", "10.5.5.5")
    await lab.until("there", lambda: lab.picture.legs(str(DST4)))
    lab.router.ip("addr", "del", "10.5.5.5/32", "dev", "lo")
    await lab.until("gone", lambda: not lab.picture.legs(str(DST4)))


async def test_ipv6_legs_come_and_go_one_by_one(lab: Lab) -> None:
    lab.router.ip("-6", "route", "add", str(DST6), *nexthops6(0, 1))
    await lab.until("two", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8::1", "2001:db8:1::1"})
    lab.router.ip("-6", "route", "append", str(DST6), *nexthops6(2))
    await lab.until("three", lambda: len(lab.picture.legs(str(DST6))) == 3)
    lab.router.ip("-6", "route", "del", str(DST6), "via", "2001:db8:1::1", "dev", "u1")
    await lab.until(
        "two others", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8::1", "2001:db8:2::1"}
    )
    lab.router.ip("-6", "route", "replace", str(DST6), *nexthops6(1, 3))
    await lab.until(
        "replaced", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8:1::1", "2001:db8:3::1"}
    )
    lab.router.ip("-6", "route", "replace", str(DST6), "via", "2001:db8:2::1")
    await lab.until("single", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8:2::1"})
    lab.router.ip("-6", "route", "del", str(DST6))
    await lab.until("none", lambda: not lab.picture.legs(str(DST6)))


async def test_a_multipath_ipv6_route_goes_as_a_whole(lab: Lab) -> None:
    lab.router.ip("-6", "route", "add", str(DST6), *nexthops6(0, 1, 2))
    await lab.until("three", lambda: len(lab.picture.legs(str(DST6))) == 3)
    lab.router.ip("-6", "route", "del", str(DST6))
    await lab.until("none", lambda: not lab.picture.legs(str(DST6)))


@pytest.mark.parametrize("compat", ["1", "0"], ids=["expanded", "id-only"])
async def test_nexthop_objects(lab: Lab, compat: str) -> None:
    """As zebra installs them. In the second mode route messages hold nothing but the id."""
    lab.router.sysctl("net.ipv4.nexthop_compat_mode", compat)
    for n in (0, 1, 2):
        lab.router.ip("nexthop", "add", "id", str(10 + n), "via", f"10.1.{n}.1", "dev", f"u{n}")
        lab.router.ip("nexthop", "add", "id", str(60 + n), "via", f"2001:db8:{n}::1", "dev", f"u{n}")
    lab.router.ip("nexthop", "add", "id", "100", "group", "10,3/11")
    lab.router.ip("nexthop", "add", "id", "600", "group", "60/61")
    lab.router.ip("route", "add", str(DST4), "nhid", "100")
    lab.router.ip("route", "add", "10.8.0.0/24", "nhid", "12")
    lab.router.ip("-6", "route", "add", str(DST6), "nhid", "600")
    expected = {"10.1.0.1": (3, True), "10.1.1.1": (1, True)}
    await lab.until("the group", lambda: lab.picture.legs(str(DST4)) == expected)
    await lab.until("the single", lambda: set(lab.picture.legs("10.8.0.0/24")) == {"10.1.2.1"})
    await lab.until("v6", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8::1", "2001:db8:1::1"})
    await lab.settled()
    lab.router.ip("nexthop", "replace", "id", "100", "group", "11/12")
    await lab.until("replaced", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.1.1", "10.1.2.1"})
    lab.router.ip("nexthop", "del", "id", "11")
    await lab.until("a member less", lambda: set(lab.picture.legs(str(DST4))) == {"10.1.2.1"})
    lab.router.ip("nexthop", "del", "id", "60")
    await lab.until("a member less in v6", lambda: set(lab.picture.legs(str(DST6))) == {"2001:db8:1::1"})
    lab.router.ip("link", "set", "u2", "down")
    await lab.until("no member", lambda: not lab.picture.legs(str(DST4)))


def _is(state: Callable[[], object], expected: object) -> bool:
    return state() is expected


async def test_neighbours(lab: Lab) -> None:
    index = lab.router.index["u0"]
    key = (index, IPv4Address("10.1.0.1"))

    def state() -> NeighbourState | None:
        return lab.picture.neighbours[key].state if key in lab.picture.neighbours else None

    for words, expected in (
        (["lladdr", "02:00:00:00:00:01", "nud", "reachable"], NeighbourState.USABLE),
        (["nud", "failed"], NeighbourState.FAILED),
        (["lladdr", "02:00:00:00:00:01", "nud", "permanent"], NeighbourState.USABLE),
        (["nud", "incomplete"], NeighbourState.UNRESOLVED),
        (["lladdr", "02:00:00:00:00:01", "nud", "reachable"], NeighbourState.USABLE),
    ):
        lab.router.ip("neigh", "replace", "10.1.0.1", "dev", "u0", *words)
        await lab.until(f"{words}", partial(_is, state, expected))
    assert lab.picture.neighbours[key].mac == "02:00:00:00:00:01"
    lab.router.ip(
        "neigh", "replace", "fe80::5", "dev", "u0", "lladdr", "02:00:00:00:00:05", "nud", "permanent"
    )
    await lab.until("IPv6", lambda: (index, IPv6Address("fe80::5")) in lab.picture.neighbours)
    lab.picture.batches.clear()
    # Usable in another way, of which a path takes no notice.
    lab.router.ip("neigh", "change", "10.1.0.1", "dev", "u0", "lladdr", "02:00:00:00:00:01", "nud", "stale")
    lab.router.ip("neigh", "del", "fe80::5", "dev", "u0")
    await lab.until("gone", lambda: NeighbourGone(index, IPv6Address("fe80::5")) in lab.picture.events())
    assert not any(isinstance(e, NeighbourChanged) and "10.1.0.1" in str(e) for e in lab.picture.events())


async def test_a_neighbour_that_does_not_answer_has_failed(lab: Lab) -> None:
    """The kernel's own doing: nobody on u1 has this address."""
    lab.router.ip("addr", "add", "192.0.2.1/24", "dev", "u1")
    lab.router.sysctl("net.ipv4.neigh.u1.retrans_time_ms", "20")
    with lab.router.udp_socket() as sender:
        sender.sendto(b"anyone?", ("192.0.2.9", 9))
        await lab.until(
            "failed",
            lambda: any(
                n.address == IPv4Address("192.0.2.9") and n.state is NeighbourState.FAILED
                for n in lab.picture.neighbours.values()
            ),
        )


async def test_a_new_link_and_its_new_name(lab: Lab) -> None:
    lab.router.ip("link", "add", "br9", "type", "bridge")
    await lab.until("there", lambda: any(link.name == "br9" for link in lab.picture.links.values()))
    (link,) = (link for link in lab.picture.links.values() if link.name == "br9")
    assert link.kind == "bridge"
    lab.router.ip("link", "set", "br9", "name", "br10")
    await lab.until("renamed", lambda: lab.picture.links[link.ifindex].name == "br10")
    # Messages about a bridge's ports are no messages about the link: u3 stays known as it leaves.
    lab.router.ip("link", "set", "u3", "master", "br10")
    lab.router.ip("link", "set", "u3", "nomaster")
    lab.router.ip("link", "del", "br10")
    await lab.until("gone", lambda: link.ifindex not in lab.picture.links)
    assert lab.router.index["u3"] in lab.picture.links


def four_thousand(verb: str, *uplinks: int) -> list[str]:
    legs = " ".join(nexthops4(*uplinks))
    return [f"route {verb} 10.{100 + n // 256}.{n % 256}.0/24 proto bgp {legs}" for n in range(4096)]


async def test_four_thousand_destinations(lab: Lab) -> None:
    """Added, moved off an uplink, and cut: each burst arrives whole, in batches, each prefix once a batch."""
    lab.router.ip(batch=four_thousand("add", 0, 1, 2, 3))
    await lab.until("all", lambda: lab.picture.with_legs(4) == 4096)
    lab.router.ip(batch=four_thousand("replace", 0, 1, 2))
    await lab.until("all moved", lambda: lab.picture.with_legs(3) == 4096)
    for batch in lab.picture.batches:
        prefixes = [e.route.prefix for e in batch if isinstance(e, RouteChanged)]
        assert len(prefixes) == len(set(prefixes))
        assert len(batch) <= 256
    assert lab.source.counters.overruns == 0
    lab.picture.batches.clear()
    lab.router.ip("link", "set", "u2", "down")
    await lab.until("all cut", lambda: lab.picture.with_a_dead_leg() == 4096)
    assert [type(event) for event in lab.picture.batches[0]] == [LinkChanged]


async def test_what_an_overrun_lost_is_found_again(router: KernelRouter) -> None:
    """A buffer for a dozen notifications and 4 096 of them while the loop is busy: the kernel throws most away."""
    lab = Lab(router)
    lab.source = NetlinkSource(open_socket=router.open_socket, receive_buffer=4096)
    await lab.source.start(lab.picture.deliver)
    try:
        router.ip(batch=four_thousand("add", 0, 1))  # blocks the loop on purpose
        await lab.until("all", lambda: lab.picture.with_legs(2) == 4096)
        assert lab.source.counters.overruns > 0
        assert lab.source.counters.drifts > 0
        await lab.settled()
    finally:
        await lab.source.stop()


async def test_what_changes_while_the_first_dump_is_read_is_not_lost(router: KernelRouter) -> None:
    router.ip(batch=four_thousand("add", 0, 1))
    lab = Lab(router)
    actor = await asyncio.create_subprocess_exec(
        "ip", "-n", router.name, "-batch", "-", stdin=asyncio.subprocess.PIPE
    )
    lines = "\n".join(four_thousand("replace", 2)).encode()
    try:
        await asyncio.gather(lab.source.start(lab.picture.deliver), actor.communicate(lines))
        assert isinstance(lab.picture.batches[0][0], Resynced)
        await lab.until("all", lambda: lab.picture.with_legs(1) == 4096)
        await lab.settled()
    finally:
        await lab.source.stop()


async def test_a_comparison_that_finds_nothing_is_silent(router: KernelRouter) -> None:
    lab = Lab(router)
    lab.source = NetlinkSource(open_socket=router.open_socket, reconcile=0.05)
    await lab.source.start(lab.picture.deliver)
    try:
        await lab.until("the links have calmed down", lambda: lab.source.counters.dumps >= 4)
        lab.picture.batches.clear()
        before = lab.source.counters.dumps
        await lab.until("three comparisons", lambda: lab.source.counters.dumps >= before + 3)
        assert lab.picture.batches == []
        assert lab.source.counters.drifts == 0
    finally:
        await lab.source.stop()


async def test_a_comparison_mends_what_no_notification_told(router: KernelRouter) -> None:
    """A source that hears nothing stands for a kernel that forgot to tell."""
    lab = Lab(router)
    lab.source = NetlinkSource(
        open_socket=lambda groups=(), receive_buffer=1 << 20: router.open_socket((), receive_buffer),
        reconcile=0.05,
    )
    await lab.source.start(lab.picture.deliver)
    try:
        router.ip("route", "add", str(DST4), *nexthops4(0))
        await lab.until("found", lambda: lab.picture.legs(str(DST4)))
        assert lab.source.counters.notifications == 0
        assert lab.source.counters.drifts == 1
    finally:
        await lab.source.stop()


async def test_asked_for_a_resync_it_returns_when_that_is_delivered(lab: Lab) -> None:
    lab.picture.batches.clear()
    await lab.source.resync()
    assert any(isinstance(event, Resynced) for event in lab.picture.events())


async def test_the_link_towards_an_address(lab: Lab) -> None:
    assert lab.source.interface_of(IPv4Address("10.1.2.1")) == "u2"
    assert lab.source.interface_of(IPv6Address("2001:db8:3::1")) == "u3"
    assert lab.source.interface_of(IPv4Address("192.0.2.1")) is None
    lab.router.ip("addr", "add", "192.0.2.2/24", "dev", "u0")
    await lab.until("known", lambda: lab.source.interface_of(IPv4Address("192.0.2.1")) == "u0")


def descriptors() -> set[Path]:
    """Those of this process that are sockets."""
    return {entry for entry in Path("/proc/self/fd").iterdir() if entry.is_socket()}


async def test_stopped_it_leaves_no_descriptor_and_says_nothing_more(router: KernelRouter) -> None:
    lab = Lab(router)
    before = descriptors()
    await lab.source.start(lab.picture.deliver)
    await lab.source.stop()
    await lab.source.stop()
    assert descriptors() <= before
    lab.picture.batches.clear()
    router.ip("route", "add", str(DST4), *nexthops4(0))
    await asyncio.sleep(0)
    assert lab.picture.batches == []


def test_the_same_on_the_loop_of_the_daemon(router: KernelRouter) -> None:
    """Uvloop has its own ideas of readers and of sock_recv."""

    async def story() -> None:
        lab = Lab(router)
        await lab.source.start(lab.picture.deliver)
        router.ip(batch=four_thousand("add", 0, 1))
        await lab.until("all", lambda: lab.picture.with_legs(2) == 4096)
        router.ip("link", "set", "u0", "down")
        await lab.until("all cut", lambda: lab.picture.with_a_dead_leg() == 4096)
        await lab.settled()
        await lab.source.stop()

    uvloop.run(story())
