"""The override table in a real kernel, judged by `ip`: what stands in it, what `ip route get` makes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

import pytest
import uvloop

from qpd.kernel.fib import PRIORITY, PROTOCOL, TABLE, OverrideTable
from qpd.model import EraseOverrides, Network, NextHop, WriteOverrides
from tests.fabric.kernel_router import KernelRouter, nexthops4

DST4 = IPv4Network("10.9.0.0/24")
DST6 = IPv6Network("2001:db8:9::/48")


@pytest.fixture
def router() -> Iterator[KernelRouter]:
    opened = KernelRouter("fib")
    try:
        yield opened.open()
    finally:
        opened.close()


@pytest.fixture
async def fib(router: KernelRouter) -> AsyncIterator[OverrideTable]:
    table = OverrideTable(open_socket=router.open_socket)
    await table.start()
    yield table
    table.close()


def leg(router: KernelRouter, n: int, address: str = "", weight: int = 1) -> NextHop:
    return NextHop(router.index[f"u{n}"], ip_address(address or f"10.1.{n}.1"), weight)


def leg6(router: KernelRouter, n: int, weight: int = 1) -> NextHop:
    return leg(router, n, f"2001:db8:{n}::1", weight)


def shown(router: KernelRouter, family: str, table: int = TABLE) -> dict[str, Any]:
    """The table as iproute2 shows it: destination to its JSON."""
    text = router.ip("-j", "-N", family, "route", "show", "table", str(table))
    return {entry["dst"]: entry for entry in json.loads(text)}


def vias(entry: dict[str, Any]) -> set[tuple[str, int]]:
    """Gateway and weight of each leg."""
    legs = entry.get("nexthops", [entry])
    return {(leg.get("gateway") or leg["via"]["host"], leg.get("weight", 1)) for leg in legs}


def our_rules(router: KernelRouter, family: str) -> list[tuple[int, str]]:
    rules = json.loads(router.ip("-j", "-N", family, "rule", "show"))
    return [(r["priority"], r["table"]) for r in rules if str(r.get("protocol")) == str(PROTOCOL)]


async def test_a_rule_for_each_family_and_no_more(router: KernelRouter, fib: OverrideTable) -> None:
    for _ in range(2):
        assert our_rules(router, "-4") == our_rules(router, "-6") == [(PRIORITY, str(TABLE))]
        await fib.ensure_rules()
    router.ip("rule", "del", "priority", str(PRIORITY))
    await fib.ensure_rules()
    assert our_rules(router, "-4") == [(PRIORITY, str(TABLE))]
    await fib.ensure_no_rules()
    await fib.ensure_no_rules()
    assert our_rules(router, "-4") == our_rules(router, "-6") == []


async def test_routes_are_written_replaced_and_erased(router: KernelRouter, fib: OverrideTable) -> None:
    """Multipath with weights, single, IPv4 by an IPv6 next hop, and each in the place of the other."""
    steps: list[tuple[tuple[NextHop, ...], tuple[NextHop, ...]]] = [
        ((leg(router, 0), leg(router, 1, weight=3)), (leg6(router, 0), leg6(router, 1, weight=5))),
        ((leg(router, 2, "fe80::1"),), (leg(router, 2, "fe80::1"),)),
        ((leg(router, 0, "fe80::2"), leg(router, 1)), (leg6(router, 0), leg6(router, 1), leg6(router, 2))),
        ((leg(router, 3),), (leg(router, 3, "fe80::3"), leg6(router, 2))),
    ]
    for legs4, legs6 in steps:
        result = await fib.apply(WriteOverrides({DST4: legs4, DST6: legs6}))
        assert (result.changed, result.failures) == (2, ())
        for family, prefix, legs in (("-4", DST4, legs4), ("-6", DST6, legs6)):
            entry = shown(router, family)[str(prefix)]
            assert entry["protocol"] == str(PROTOCOL)
            assert vias(entry) == {(str(one.address), one.weight) for one in legs}
            assert fib.routes[prefix] == legs
    result = await fib.apply(EraseOverrides((DST4, DST6)))
    assert (result.changed, result.failures) == (2, ())
    assert shown(router, "-4") == shown(router, "-6") == fib.routes == {}
    assert fib.counters.written == 8
    assert fib.counters.erased == 2


async def test_what_is_not_there_is_erased_already(router: KernelRouter, fib: OverrideTable) -> None:
    result = await fib.apply(EraseOverrides((DST4, DST6)))
    assert (result.changed, result.failures) == (2, ())


async def test_an_override_wins_over_main_and_a_throw_gives_way(
    router: KernelRouter, fib: OverrideTable
) -> None:
    """The wide prefix leaves by u1; the more specific one inside it, thrown, still goes main's way."""
    router.ip("route", "add", "10.9.0.0/16", *nexthops4(0))
    router.ip("route", "add", "10.9.7.0/24", *nexthops4(2))
    wide, narrow = IPv4Network("10.9.0.0/16"), IPv4Network("10.9.7.0/24")

    def way(address: str) -> str:
        return str(json.loads(router.ip("-j", "route", "get", address))[0]["dev"])

    assert (way("10.9.1.1"), way("10.9.7.1")) == ("u0", "u2")
    await fib.apply(WriteOverrides({wide: (leg(router, 1),)}))
    assert (way("10.9.1.1"), way("10.9.7.1")) == ("u1", "u1")
    await fib.apply(WriteOverrides({narrow: ()}))
    assert (way("10.9.1.1"), way("10.9.7.1")) == ("u1", "u2")
    assert fib.routes == {wide: (leg(router, 1),), narrow: ()}
    await fib.apply(EraseOverrides((wide, narrow)))
    assert (way("10.9.1.1"), way("10.9.7.1")) == ("u0", "u2")
    assert shown(router, "-4") == {}


async def test_main_is_never_touched(router: KernelRouter, fib: OverrideTable) -> None:
    router.ip("route", "add", str(DST4), "proto", "bgp", *nexthops4(0, 1))
    router.ip("route", "add", str(DST4), "table", str(TABLE), "proto", "static", "metric", "7", *nexthops4(3))
    before = shown(router, "-4", 254)
    await fib.apply(WriteOverrides({DST4: (leg(router, 1),)}))
    await fib.apply(EraseOverrides((DST4,)))
    await fib.apply(EraseOverrides((DST4,)))
    assert shown(router, "-4", 254) == before
    assert shown(router, "-4")[str(DST4)]["protocol"] == "4", "a stranger's route in our table stays, too"


async def test_a_refused_route_is_named_and_the_others_are_written(
    router: KernelRouter, fib: OverrideTable
) -> None:
    router.ip("link", "set", "u3", "down")
    good = IPv4Network("10.10.0.0/24")
    await fib.apply(WriteOverrides({DST4: (leg(router, 0),)}))
    result = await fib.apply(
        WriteOverrides({DST4: (leg(router, 1), leg(router, 3)), good: (leg(router, 1),)})
    )
    assert result.changed == 1
    (failure,) = result.failures
    assert failure.prefix == DST4
    assert failure.reason.startswith("Network is down")
    assert "\n" not in failure.reason
    # Known is what the kernel has: the old route, and the good one.
    assert fib.routes == {DST4: (leg(router, 0),), good: (leg(router, 1),)}
    assert set(shown(router, "-4")) == {str(DST4), str(good)}
    assert fib.counters.failed == 1


async def test_a_route_that_the_kernel_took_away_is_erased_already(
    router: KernelRouter, fib: OverrideTable
) -> None:
    await fib.apply(WriteOverrides({DST4: (leg(router, 0),)}))
    router.ip("link", "set", "u0", "down")
    assert shown(router, "-4") == {}
    assert (await fib.apply(EraseOverrides((DST4,)))).failures == ()


async def test_leftovers_of_an_earlier_life_are_erased_and_rules_moved(router: KernelRouter) -> None:
    earlier = OverrideTable(table=100, priority=31000, open_socket=router.open_socket)
    await earlier.start()
    await earlier.apply(
        WriteOverrides({DST4: (leg(router, 0),), DST6: (leg6(router, 0),), IPv4Network("10.8.0.0/16"): ()})
    )
    earlier.close()
    router.ip("route", "add", "10.7.0.0/16", "table", "100", "proto", "static", *nexthops4(1))
    later = OverrideTable(table=100, priority=31500, open_socket=router.open_socket)
    assert await later.start() == 3
    assert later.routes == {}
    assert later.counters.leftovers == 3
    assert set(shown(router, "-4", 100)) == {"10.7.0.0/16"}
    assert our_rules(router, "-4") == our_rules(router, "-6") == [(31500, "100")]
    later.close()


async def test_detach_leaves_no_trace(router: KernelRouter) -> None:
    def everything() -> list[str]:
        return [
            router.ip("-N", family, *what)
            for family in ("-4", "-6")
            for what in (("rule", "show"), ("route", "show", "table", "all"))
        ]

    before = everything()
    table = OverrideTable(open_socket=router.open_socket)
    await table.start()
    await table.apply(WriteOverrides({DST4: (leg(router, 0),), DST6: (leg6(router, 0),)}))
    table.close()
    other = OverrideTable(open_socket=router.open_socket)
    assert await other.detach() == 2
    assert await other.detach() == 0
    other.close()
    assert everything() == before


@pytest.mark.parametrize("family", [4, 6])
def test_four_thousand_destinations_in_one_batch(router: KernelRouter, family: int) -> None:
    """On the daemon's loop, which must go on meanwhile: it gets many turns before the batch is done."""
    prefixes: list[Network]
    if family == 4:
        prefixes = [IPv4Network((int(IPv4Address("10.100.0.0")) + (n << 8), 24)) for n in range(4096)]
        legs = tuple(leg(router, n) for n in range(3))
    else:
        prefixes = [IPv6Network((int(IPv6Address("2001:db8:aaaa::")) + (n << 64), 64)) for n in range(4096)]
        legs = tuple(leg6(router, n) for n in range(3))

    async def story() -> None:
        fib = OverrideTable(open_socket=router.open_socket)
        await fib.start()
        turns = 0
        writing = asyncio.ensure_future(fib.apply(WriteOverrides(dict.fromkeys(prefixes, legs))))
        until = time.monotonic() + 60
        while not writing.done() and time.monotonic() < until:
            await asyncio.sleep(0)
            turns += 1
        result = await writing
        assert (result.changed, result.failures) == (4096, ())
        assert turns > 10
        entries = shown(router, f"-{family}")
        assert len(entries) == 4096
        assert all(len(entry["nexthops"]) == 3 for entry in entries.values())
        # Thousands of refusals, and still each is counted and nothing is half known.
        nowhere = NextHop(999_999, legs[0].address)
        result = await fib.apply(WriteOverrides(dict.fromkeys(prefixes, (nowhere,))))
        assert len(result.failures) == 4096
        assert {failure.prefix for failure in result.failures} == set(prefixes)
        assert len(fib.routes) == 4096
        result = await fib.apply(EraseOverrides(tuple(prefixes)))
        assert (result.changed, result.failures) == (4096, ())
        assert shown(router, f"-{family}") == fib.routes == {}
        fib.close()

    uvloop.run(story())
