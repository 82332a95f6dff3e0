"""Messages of rtnetlink(7) as bytes: whole, cut short, garbled. Real kernels: tests/fabric/test_netlink.py."""

from __future__ import annotations

import contextlib
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from random import Random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.kernel import netlink_decode as nl
from qpd.kernel.fib import TABLE, route_body
from qpd.kernel.netlink_queue import EventQueue
from qpd.kernel.netlink_socket import attribute, explanation, request
from qpd.kernel.netlink_state import Mirror, Part, Snapshot
from qpd.model import (
    LinkChanged,
    Neighbour,
    NeighbourChanged,
    NeighbourState,
    Network,
    NextHop,
    Route,
    RouteChanged,
    RouteGone,
)

PREFIXES = st.one_of(
    st.ip_addresses(v=4, network="10.0.0.0/8").flatmap(
        lambda a: st.integers(8, 32).map(lambda n: ip_network((a, n), strict=False))
    ),
    st.ip_addresses(v=6, network="2001:db8::/32").flatmap(
        lambda a: st.integers(32, 128).map(lambda n: ip_network((a, n), strict=False))
    ),
)


@st.composite
def routes(draw: st.DrawFn) -> tuple[Network, tuple[NextHop, ...]]:
    prefix = draw(PREFIXES)
    versions: list[Literal[4, 6]] = [6] if prefix.version == 6 else [4, 6]
    version = draw(st.sampled_from(versions))
    network = "10.0.0.0/8" if version == 4 else "fe80::/64"
    leg = st.builds(
        NextHop, st.integers(1, 2**31 - 1), st.ip_addresses(v=version, network=network), st.integers(1, 256)
    )
    legs = draw(st.lists(leg, min_size=2, max_size=8, unique_by=lambda one: (one.ifindex, one.address)))
    return prefix, nl.in_order(legs)


@settings(deadline=None)
@given(routes())
def test_what_is_written_is_what_is_read(route: tuple[Network, tuple[NextHop, ...]]) -> None:
    prefix, legs = route
    record = nl.RouteDecoder(TABLE).decode(route_body(prefix, legs, TABLE))
    assert record is not None
    assert record.route is not None
    assert (record.route.prefix, record.route.next_hops) == (prefix, legs)
    assert nl.RouteDecoder().decode(route_body(prefix, legs, TABLE)) is None, "not main's"


@settings(deadline=None)
@given(st.lists(routes(), max_size=8), st.randoms(use_true_random=False))
def test_a_memory_of_leg_sets_never_mixes_them_up(
    found: list[tuple[Network, tuple[NextHop, ...]]], random: Random
) -> None:
    decoder = nl.RouteDecoder(TABLE)
    twice = found * 2
    random.shuffle(twice)
    for prefix, legs in twice:
        record = decoder.decode(route_body(prefix, legs, TABLE))
        assert record is not None
        assert record.route is not None
        assert (record.route.prefix, record.route.next_hops) == (prefix, legs)


def connected(prefix: str, ifindex: int, **fields: int) -> bytes:
    network = ip_network(prefix)
    family = 2 if network.version == 4 else 10
    kind, flags = fields.get("kind", nl.RTN_UNICAST), fields.get("flags", 0)
    body = nl.ROUTE.pack(family, network.prefixlen, 0, 0, nl.RT_TABLE_MAIN, 2, 0, kind, flags)
    body += attribute(nl.RTA_DST, network.network_address.packed)
    if "metric" in fields:
        body += attribute(nl.RTA_PRIORITY, struct.pack("=I", fields["metric"]))
    if "gateway" in fields:
        body += attribute(nl.RTA_GATEWAY, IPv4Address(fields["gateway"]).packed)
    return body + attribute(nl.RTA_OIF, struct.pack("=I", ifindex))


def test_connected_legs_of_both_families_on_one_link_keep_their_family() -> None:
    decoder = nl.RouteDecoder()
    for prefix, unspecified in (("10.1.0.0/31", IPv4Address(0)), ("2001:db8::/127", IPv6Address(0))):
        record = decoder.decode(connected(prefix, 7))
        assert record is not None
        assert record.route is not None
        assert record.route.next_hops == (NextHop(7, unspecified),)


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_its_own_or_nothing(data: bytes) -> None:
    mirror = Mirror()
    try:
        for kind, flags, _, body in nl.messages(data):
            mirror.apply(kind, flags, body)
    except (ValueError, struct.error):
        pass


@settings(deadline=None)
@given(st.data())
def test_a_route_cut_short_anywhere_is_an_error_of_its_own_or_nothing(data: st.DataObject) -> None:
    prefix, legs = data.draw(routes())
    body = route_body(prefix, legs, TABLE)
    end = data.draw(st.integers(0, len(body) - 1))
    with contextlib.suppress(ValueError, struct.error):
        nl.RouteDecoder(TABLE).decode(body[:end])


def test_a_length_that_leaves_the_datagram_is_named() -> None:
    whole = request(nl.RTM_NEWROUTE, 0, 1, bytes(12))
    with pytest.raises(nl.MalformedMessageError, match="netlink message of 28 bytes at 0 of 27"):
        list(nl.messages(whole[:27]))


@pytest.mark.parametrize(
    ("nud", "expected"),
    [
        (0x00, NeighbourState.UNRESOLVED),
        (0x01, NeighbourState.UNRESOLVED),
        (0x02, NeighbourState.USABLE),
        (0x04, NeighbourState.USABLE),
        (0x08, NeighbourState.USABLE),
        (0x10, NeighbourState.USABLE),
        (0x20, NeighbourState.FAILED),
        (0x80, NeighbourState.USABLE),
    ],
)
def test_neighbour_states(nud: int, expected: NeighbourState) -> None:
    body = (
        struct.pack("=BxxxiHBB", 2, 5, nud, 0, 1)
        + attribute(1, bytes([10, 1, 0, 1]))
        + attribute(2, bytes(6))
    )
    assert nl.decode_neighbour(body) == (
        (5, bytes([10, 1, 0, 1])),
        Neighbour(5, IPv4Address("10.1.0.1"), expected, "00:00:00:00:00:00"),
    )


@pytest.mark.parametrize(
    ("family", "flags", "address"),
    [
        (7, 0, bytes(4)),
        (2, 0x08, bytes([10, 0, 0, 1])),
        (2, 0, bytes([224, 0, 0, 1])),
        (10, 0, b"\xff\x02" + bytes(14)),
    ],
    ids=["bridge FDB", "proxy", "IPv4 multicast", "IPv6 multicast"],
)
def test_what_is_no_neighbour(family: int, flags: int, address: bytes) -> None:
    body = (
        struct.pack("=BxxxiHBB", family, 5, 0x80, flags, 1) + attribute(1, address) + attribute(2, b"abcdef")
    )
    assert nl.decode_neighbour(body) is None


def test_a_nexthop_group_has_weights_beyond_a_byte() -> None:
    member = struct.Struct("=IBBH")
    group = member.pack(1, 2, 0, 0) + member.pack(2, 255, 1, 0)
    body = struct.pack("=BBBxI", 0, 0, 0, 0) + attribute(1, struct.pack("=I", 9)) + attribute(2, group)
    assert nl.decode_nexthop(body) == nl.Nexthop(9, members=((1, 3), (2, 512)))


def test_legs_of_old_kernels_come_one_by_one() -> None:
    """Before 4.11 an IPv6 multipath route was dumped as a route per leg."""
    mirror, dumped = Mirror(), Snapshot()
    bodies = [(nl.RTM_NEWROUTE, connected("2001:db8::/64", n, metric=1024)) for n in (3, 2)]
    memory: dict[bytes, nl.RouteRecord] = {}
    mirror.collect(bodies, dumped, memory)
    (event,) = mirror.settle(Part.ALL, dumped, memory, [])
    assert isinstance(event, RouteChanged)
    assert [leg.ifindex for leg in event.route.next_hops] == [2, 3]


def test_what_came_during_a_dump_is_newer_than_what_the_dump_read_first() -> None:
    mirror, dumped = Mirror(), Snapshot()
    old, new = connected("10.9.0.0/24", 1, gateway=1), connected("10.9.0.0/24", 2, gateway=2)
    memory: dict[bytes, nl.RouteRecord] = {}
    mirror.collect([(nl.RTM_NEWROUTE, old)], dumped, memory)
    heard = (nl.RTM_NEWROUTE, nl.NLM_F_REPLACE, new)
    assert len(mirror.apply(*heard)) == 1
    # It has been told already, so the finished dump makes no event of it.
    assert mirror.settle(Part.ALL, dumped, memory, [heard]) == []
    (route,) = mirror.known.facts().routes
    assert route.next_hops[0].ifindex == 2


def test_a_dump_of_routes_leaves_links_and_neighbours_as_they_are() -> None:
    mirror = Mirror()
    mirror.apply(nl.RTM_NEWROUTE, 0, connected("10.9.0.0/24", 1, gateway=1))
    mirror.apply(nl.RTM_NEWROUTE, 0, connected("2001:db8::/64", 1))
    link = struct.pack("=BxHiII", 0, 1, 1, 0x10001, 0) + attribute(3, b"u0\0")
    mirror.apply(nl.RTM_NEWLINK, 0, link)
    assert mirror.settle(Part.ROUTES4, Snapshot(), {}, []) == [RouteGone(IPv4Network("10.9.0.0/24"))]
    facts = mirror.known.facts()
    assert [link.name for link in facts.links] == ["u0"]
    assert [route.prefix for route in facts.routes] == [ip_network("2001:db8::/64")]


def test_a_link_message_that_says_nothing_new_still_asks_for_the_routes() -> None:
    """The carrier's flag is visible before the routes have followed it; only the later, like message is after them."""
    mirror = Mirror()
    link = struct.pack("=BxHiII", 0, 1, 1, 0x10001, 0) + attribute(3, b"u0\0")
    assert [type(event) for event in mirror.apply(nl.RTM_NEWLINK, 0, link)] == [LinkChanged]
    mirror.stale = Part(0)
    assert mirror.apply(nl.RTM_NEWLINK, 0, link) == []
    assert mirror.stale == Part.ROUTES


def test_of_what_waits_the_last_word_about_a_route_counts() -> None:
    prefix, other = IPv4Network("10.0.0.0/8"), IPv4Network("11.0.0.0/8")
    first, second = (Route(prefix, (NextHop(n, ip_address("10.1.0.1")),), 186) for n in (1, 2))
    neighbour = NeighbourChanged(Neighbour(1, ip_address("10.1.0.1"), NeighbourState.USABLE))
    metric = RouteGone(prefix, 20)  # a route of its own
    queue = EventQueue()
    queue.put([RouteChanged(first), RouteGone(other), neighbour, RouteGone(prefix), metric])
    queue.put([RouteChanged(second)])
    assert len(queue) == 4
    assert queue.take(3) == [RouteGone(other), neighbour, metric]
    assert queue.take(3) == [RouteChanged(second)]
    assert queue.take(3) == []


def test_the_kernels_own_words_of_an_error() -> None:
    words = attribute(1, b"Nexthop device is not up\0")
    body = struct.pack("=i", -100) + nl.HEADER.pack(60, nl.RTM_NEWROUTE, 0, 1, 0)
    assert explanation(0x300, body + words) == "Nexthop device is not up"
    assert explanation(0x200, body + bytes(44) + words) == "Nexthop device is not up", (
        "request repeated in full"
    )
    assert explanation(0, body) == ""
