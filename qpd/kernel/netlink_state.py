"""What netlink has said so far, and the events that a further message makes of it; pure, no sockets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Flag, auto

from qpd.kernel import netlink_decode as nl
from qpd.kernel.netlink_decode import NeighbourKey, Nexthop, RouteKey, RouteRecord
from qpd.model import (
    Event,
    Facts,
    Link,
    LinkChanged,
    LinkGone,
    Neighbour,
    NeighbourChanged,
    NeighbourGone,
    NextHop,
    RouteChanged,
    RouteGone,
)


class Part(Flag):
    """What can be dumped by itself."""

    LINKS = auto()
    NEIGHBOURS = auto()
    NEXTHOPS = auto()
    ROUTES4 = auto()
    ROUTES6 = auto()
    ROUTES = NEXTHOPS | ROUTES4 | ROUTES6
    ALL = LINKS | NEIGHBOURS | ROUTES


NOTHING = Part(0)


@dataclass(slots=True)
class Snapshot:
    """The kernel's tables by key."""

    links: dict[int, Link] = field(default_factory=dict)
    neighbours: dict[NeighbourKey, Neighbour] = field(default_factory=dict)
    nexthops: dict[int, Nexthop] = field(default_factory=dict)
    routes: dict[RouteKey, RouteRecord] = field(default_factory=dict)
    doubled: set[RouteKey] = field(default_factory=set)
    """Keys under which the kernel holds more than one IPv4 route (``ip route append``); only the first is used."""

    def facts(self) -> Facts:
        """The same as ``qpd.model`` speaks it."""
        return Facts(
            links=tuple(self.links.values()),
            routes=tuple(record.route for record in self.routes.values() if record.route is not None),
            neighbours=tuple(self.neighbours.values()),
        )


class Mirror:
    """The kernel's tables as known; ``apply`` takes one message and returns what changed.

    ``stale`` collects the parts that messages alone cannot settle and that must be dumped again: the kernel tells
    nobody when a link takes IPv4 next hops with it (or brings them back), when an address goes, when a nexthop group
    loses a member, and tells of IPv6 legs one by one.
    """

    def __init__(self) -> None:
        self.known = Snapshot()
        self.stale = NOTHING
        self._decoder = nl.RouteDecoder()
        self._bodies: dict[bytes, RouteRecord] = {}

    # --- one message ---------------------------------------------------------------------------------------------

    def apply(self, kind: int, flags: int, body: bytes) -> list[Event]:
        """Take one notification in and return the events it makes, none where nothing changed."""
        match kind:
            case nl.RTM_NEWROUTE:
                return self._route_new(flags, body)
            case nl.RTM_DELROUTE:
                return self._route_gone(body)
            case nl.RTM_NEWLINK | nl.RTM_DELLINK:
                return self._link(kind, body)
            case nl.RTM_NEWNEIGH | nl.RTM_DELNEIGH:
                return self._neighbour(kind, body)
            case nl.RTM_NEWNEXTHOP | nl.RTM_DELNEXTHOP:
                return self._nexthop(kind, body)
            case nl.RTM_DELADDR:
                # Routes with this preferred source leave without a word (fib_sync_down_addr).
                self.stale |= Part.ROUTES
                return []
            case _:
                return []

    def _link(self, kind: int, body: bytes) -> list[Event]:
        link = nl.decode_link(body)
        if link is None:
            return []
        before = self.known.links.get(link.ifindex)
        if kind == nl.RTM_DELLINK:
            self.stale |= Part.ROUTES
            return [LinkGone(link.ifindex)] if self.known.links.pop(link.ifindex, None) else []
        # Also where nothing seems new: the carrier's flag is seen by every reader before the routes have followed it
        # (linkwatch), and the message that comes after them looks the same as one before.
        self.stale |= Part.ROUTES
        if before == link:
            return []
        self.known.links[link.ifindex] = link
        return [LinkChanged(link)]

    def _neighbour(self, kind: int, body: bytes) -> list[Event]:
        decoded = nl.decode_neighbour(body)
        if decoded is None:
            return []
        key, neighbour = decoded
        if kind == nl.RTM_DELNEIGH:
            known = self.known.neighbours.pop(key, None)
            return [NeighbourGone(neighbour.ifindex, neighbour.address)] if known else []
        if self.known.neighbours.get(key) == neighbour:
            return []
        self.known.neighbours[key] = neighbour
        return [NeighbourChanged(neighbour)]

    def _route_new(self, flags: int, body: bytes) -> list[Event]:
        record = self._decoder.decode(body)
        if record is None:
            return []
        before = self.known.routes.get(record.key)
        record = self._resolved(record)
        if before is not None and not flags & nl.NLM_F_REPLACE and before != record:
            if len(record.key[0]) == 16:
                self.stale |= Part.ROUTES6
                if flags & nl.NLM_F_APPEND:
                    record = _united(before, record)
            else:
                # `ip route append` or `prepend`: two routes under one key. An appended one is not used.
                self.stale |= Part.ROUTES4
                self.known.doubled.add(record.key)
                if flags & nl.NLM_F_APPEND:
                    return []
        return self._put(record)

    def _route_gone(self, body: bytes) -> list[Event]:
        record = self._decoder.decode(body)
        if record is None:
            return []
        before = self.known.routes.get(record.key)
        if before is None:
            return []
        part = Part.ROUTES6 if len(record.key[0]) == 16 else Part.ROUTES4
        record = self._resolved(record)
        if before.route is None or record.route is None:
            self.stale |= part
            return self._drop(record.key)
        left = _without(before.route.next_hops, record.route.next_hops)
        if part is Part.ROUTES6:
            if left:
                self.stale |= part
                return self._put(replace(before, route=replace(before.route, next_hops=left)))
            return self._drop(record.key)
        if record.key in self.known.doubled or left or before.route.protocol != record.route.protocol:
            self.stale |= part
            if left or before.route.protocol != record.route.protocol:
                return []
        return self._drop(record.key)

    def _nexthop(self, kind: int, body: bytes) -> list[Event]:
        nexthop = nl.decode_nexthop(body)
        if kind == nl.RTM_DELNEXTHOP:
            self.known.nexthops.pop(nexthop.id, None)
        else:
            self.known.nexthops[nexthop.id] = nexthop
        affected = {nexthop.id}
        affected.update(
            group.id
            for group in self.known.nexthops.values()
            if any(member == nexthop.id for member, _ in group.members)
        )
        events: list[Event] = []
        for record in [r for r in self.known.routes.values() if r.nexthop in affected]:
            self.stale |= Part.ROUTES
            events += self._put(self._resolved(replace(record, unresolved=True)))
        return events

    def _resolved(self, record: RouteRecord) -> RouteRecord:
        if not record.unresolved or record.route is None:
            return record
        legs = nl.resolve(record.nexthop, self.known.nexthops)
        return replace(record, route=replace(record.route, next_hops=legs))

    def _put(self, record: RouteRecord) -> list[Event]:
        if record.route is None or not record.route.next_hops:
            # Blackhole, unreachable or a nexthop object without legs: no route to steer by, but the key is taken.
            events = self._drop(record.key)
            self.known.routes[record.key] = replace(record, route=None)
            return events
        before = self.known.routes.get(record.key)
        self.known.routes[record.key] = record
        return [] if before is not None and before.route == record.route else [RouteChanged(record.route)]

    def _drop(self, key: RouteKey) -> list[Event]:
        before = self.known.routes.pop(key, None)
        if before is None or before.route is None:
            return []
        return [RouteGone(before.route.prefix, before.route.metric)]

    # --- a dump --------------------------------------------------------------------------------------------------

    def collect(
        self, bodies: Iterable[tuple[int, bytes]], into: Snapshot, memory: dict[bytes, RouteRecord]
    ) -> None:
        """Take messages (type, body) of a dump. ``memory`` receives the decoded routes for ``settle``."""
        for kind, body in bodies:
            if kind == nl.RTM_NEWROUTE:
                record = self._bodies.get(body) or self._decoder.decode(body)
                if record is not None:
                    memory[body] = record
                    _insert(into, record)
            elif kind == nl.RTM_NEWLINK:
                link = nl.decode_link(body)
                if link is not None:
                    into.links[link.ifindex] = link
            elif kind == nl.RTM_NEWNEIGH:
                neighbour = nl.decode_neighbour(body)
                if neighbour is not None:
                    into.neighbours[neighbour[0]] = neighbour[1]
            elif kind == nl.RTM_NEWNEXTHOP:
                nexthop = nl.decode_nexthop(body)
                into.nexthops[nexthop.id] = nexthop

    def settle(
        self,
        parts: Part,
        dumped: Snapshot,
        memory: dict[bytes, RouteRecord],
        meanwhile: list[tuple[int, int, bytes]],
    ) -> list[Event]:
        """Put a finished dump of ``parts`` in place of what was known and return the differences.

        ``meanwhile``: the notifications (type, flags, body) that came while the dump was read. They have been applied
        to the old picture already; applied to the new one again, they settle what the dump may have read too early.
        """
        old = self.known
        if Part.NEXTHOPS not in parts:
            dumped.nexthops = old.nexthops
        self.known = Snapshot(
            links=dumped.links if Part.LINKS in parts else dict(old.links),
            neighbours=dumped.neighbours if Part.NEIGHBOURS in parts else dict(old.neighbours),
            nexthops=dumped.nexthops,
            routes=self._merged_routes(parts, old, dumped),
            doubled=dumped.doubled | {key for key in old.doubled if _part_of(key) not in parts},
        )
        self._bodies = memory if Part.ROUTES4 | Part.ROUTES6 in parts else self._bodies | memory
        for kind, flags, body in meanwhile:
            self.apply(kind, flags, body)
        return list(_differences(old, self.known))

    def _merged_routes(self, parts: Part, old: Snapshot, dumped: Snapshot) -> dict[RouteKey, RouteRecord]:
        routes = {key: record for key, record in old.routes.items() if _part_of(key) not in parts}
        for key, record in dumped.routes.items():
            if record.unresolved and record.route is not None:
                legs = nl.resolve(record.nexthop, dumped.nexthops)
                route = replace(record.route, next_hops=legs) if legs else None
                routes[key] = replace(record, route=route)
            else:
                routes[key] = record
        return routes


def _part_of(key: RouteKey) -> Part:
    return Part.ROUTES6 if len(key[0]) == 16 else Part.ROUTES4


def _insert(into: Snapshot, record: RouteRecord) -> None:
    first = into.routes.get(record.key)
    if first is None:
        into.routes[record.key] = record
    elif len(record.key[0]) == 16:
        # Kernels before 4.11 dump each leg of an IPv6 multipath route as a route.
        into.routes[record.key] = _united(first, record)
    else:
        into.doubled.add(record.key)


def _united(first: RouteRecord, second: RouteRecord) -> RouteRecord:
    if first.route is None or second.route is None:
        return second if first.route is None else first
    legs = {(leg.ifindex, leg.address): leg for leg in (*first.route.next_hops, *second.route.next_hops)}
    return replace(first, route=replace(first.route, next_hops=nl.in_order(list(legs.values()))))


def _without(legs: tuple[NextHop, ...], gone: tuple[NextHop, ...]) -> tuple[NextHop, ...]:
    """The legs that are not among ``gone``, whatever their flags and weights."""
    if legs == gone:
        return ()
    keys = {(leg.ifindex, leg.address) for leg in gone}
    return tuple(leg for leg in legs if (leg.ifindex, leg.address) not in keys)


def _differences(old: Snapshot, new: Snapshot) -> Iterator[Event]:
    # New links first and lost ones last: what stands on a link never speaks of one that is not there.
    for ifindex, link in new.links.items():
        if old.links.get(ifindex) != link:
            yield LinkChanged(link)
    yield from _route_differences(old.routes, new.routes)
    yield from _neighbour_differences(old.neighbours, new.neighbours)
    for ifindex in old.links:
        if ifindex not in new.links:
            yield LinkGone(ifindex)


def _route_differences(old: dict[RouteKey, RouteRecord], new: dict[RouteKey, RouteRecord]) -> Iterator[Event]:
    for key, record in old.items():
        now = new.get(key)
        if record.route is not None and (now is None or now.route is None):
            yield RouteGone(record.route.prefix, record.route.metric)
    for key, record in new.items():
        before = old.get(key)
        if record.route is None or record is before:
            continue
        if before is None or before.route != record.route:
            yield RouteChanged(record.route)


def _neighbour_differences(
    old: dict[NeighbourKey, Neighbour], new: dict[NeighbourKey, Neighbour]
) -> Iterator[Event]:
    for key, neighbour in new.items():
        if old.get(key) != neighbour:
            yield NeighbourChanged(neighbour)
    for key, neighbour in old.items():
        if key not in new:
            yield NeighbourGone(neighbour.ifindex, neighbour.address)
