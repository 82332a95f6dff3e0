"""Bytes of rtnetlink(7) into the words of ``qpd.model``; pure, no sockets.

By struct and not by a message library: 4 096 multipath routes take a few tens of milliseconds this way, and next-hop
sets that many routes share are decoded once and held once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, AF_INET6

from qpd.model import Address, Link, Neighbour, NeighbourState, Network, NextHop, Route

# linux/netlink.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x2, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800

# linux/rtnetlink.h
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106
RT_TABLE_COMPAT, RT_TABLE_MAIN = 252, 254
RTN_UNICAST, RTN_THROW = 1, 9
RTM_F_CLONED = 0x200
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE = 1, 4, 5, 6, 9, 15
RTA_VIA, RTA_ENCAP, RTA_NH_ID = 18, 22, 30
RTNH_F_DEAD, RTNH_F_ONLINK, RTNH_F_LINKDOWN = 1, 4, 16

_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 1, 3, 18, 1
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_NONE, _NUD_INCOMPLETE, _NUD_FAILED, _NUD_NOARP = 0x00, 0x01, 0x20, 0x40
_NTF_PROXY = 0x08
_NHA_ID, _NHA_GROUP, _NHA_BLACKHOLE, _NHA_OIF, _NHA_GATEWAY, _NHA_ENCAP, _NHA_FDB = 1, 2, 4, 5, 6, 8, 11
_NLA_TYPE_MASK = 0x3FFF

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
ROUTE = struct.Struct("=BBBBBBBBI")
MULTIPATH_LEG = struct.Struct("=HBBi")
_U32 = struct.Struct("=I")
_LINK = struct.Struct("=BxHiII")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_NEXTHOP = struct.Struct("=BBBxI")
_GROUP_MEMBER = struct.Struct("=IBBH")

RouteKey = tuple[bytes, int, int]
"""Destination bytes (4 or 16: the family), prefix length, metric: what makes a route of one table the same route."""

NeighbourKey = tuple[int, bytes]
"""Interface index and address bytes."""

_UNSPECIFIED: dict[int, Address] = {AF_INET: IPv4Address(0), AF_INET6: IPv6Address(0)}


class MalformedMessageError(ValueError):
    """A netlink message whose lengths contradict each other."""


@dataclass(frozen=True, slots=True)
class RouteRecord:
    """A route as one message tells it.

    ``route`` is None where the prefix has no unicast route (blackhole, unreachable, ...). ``nexthop`` is the id of its
    nexthop object, 0 where it has none; ``unresolved`` says that the message named only that id.
    """

    key: RouteKey
    route: Route | None
    nexthop: int = 0
    unresolved: bool = False


@dataclass(frozen=True, slots=True)
class Nexthop:
    """A nexthop object: either one next hop (``leg``), or a group of ids with weights; neither: blackhole or FDB."""

    id: int
    leg: NextHop | None = None
    members: tuple[tuple[int, int], ...] = ()


def messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (type, flags, sequence, body) of each message of one datagram.

    Raises:
        MalformedMessageError: a length that leaves the datagram.
    """
    offset, end = 0, len(datagram)
    while end - offset >= HEADER.size:
        length, kind, flags, sequence, _ = HEADER.unpack_from(datagram, offset)
        if length < HEADER.size or offset + length > end:
            raise MalformedMessageError(f"netlink message of {length} bytes at {offset} of {end}")
        yield kind, flags, sequence, datagram[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Attributes from ``offset`` on: type (without the nesting bits) to payload; the last of a type counts."""
    found: dict[int, bytes] = {}
    end = len(data)
    while end - offset >= 4:
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            raise MalformedMessageError(f"netlink attribute {kind} of {length} bytes at {offset} of {end}")
        found[kind & _NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def to_address(packed: bytes) -> Address:
    """4 or 16 bytes to an address."""
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def to_network(packed: bytes, length: int) -> Network:
    """4 or 16 bytes and a length to a prefix."""
    return IPv4Network((packed, length)) if len(packed) == 4 else IPv6Network((packed, length))


def _u32(data: bytes | None, default: int = 0) -> int:
    return default if data is None else int(_U32.unpack(data)[0])


def decode_link(body: bytes) -> Link | None:
    """RTM_NEWLINK or RTM_DELLINK; None for messages about bridge ports, which are not about the link itself."""
    family, _, ifindex, flags, _ = _LINK.unpack_from(body)
    if family != 0:
        return None
    found = attributes(body, _LINK.size)
    info = attributes(found[_IFLA_LINKINFO], 0) if _IFLA_LINKINFO in found else {}
    return Link(
        ifindex=ifindex,
        name=found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        up=flags & (_IFF_UP | _IFF_LOWER_UP) == (_IFF_UP | _IFF_LOWER_UP),
        kind=info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
    )


def _neighbour_state(nud: int) -> NeighbourState:
    if nud & _NUD_FAILED:
        return NeighbourState.FAILED
    if nud == _NUD_NONE or nud & _NUD_INCOMPLETE:
        return NeighbourState.UNRESOLVED
    return NeighbourState.USABLE


def decode_neighbour(body: bytes) -> tuple[NeighbourKey, Neighbour] | None:
    """RTM_NEWNEIGH or RTM_DELNEIGH; None for bridge FDB, proxy, multicast and loopback entries."""
    family, ifindex, nud, flags, _ = _NEIGHBOUR.unpack_from(body)
    if family not in (AF_INET, AF_INET6) or flags & _NTF_PROXY:
        return None
    found = attributes(body, _NEIGHBOUR.size)
    packed = found.get(_NDA_DST)
    if packed is None:
        return None
    address = to_address(packed)
    if address.is_multicast:
        return None
    link_address = found.get(_NDA_LLADDR, b"")
    if nud & _NUD_NOARP and not any(link_address):
        return None  # loopback and tunnels: made without a word, and no neighbour at all
    mac = link_address.hex(":")
    return (ifindex, packed), Neighbour(ifindex, address, _neighbour_state(nud), mac)


def decode_nexthop(body: bytes) -> Nexthop:
    """RTM_NEWNEXTHOP or RTM_DELNEXTHOP."""
    family, _, _, flags = _NEXTHOP.unpack_from(body)
    found = attributes(body, _NEXTHOP.size)
    number = _u32(found.get(_NHA_ID))
    group = found.get(_NHA_GROUP)
    if group is not None:
        members = tuple(
            (member, 1 + low + (high << 8)) for member, low, high, _ in _GROUP_MEMBER.iter_unpack(group)
        )
        return Nexthop(number, members=members)
    if _NHA_BLACKHOLE in found or _NHA_FDB in found or _NHA_OIF not in found:
        return Nexthop(number)
    gateway = None if _NHA_ENCAP in found else found.get(_NHA_GATEWAY)
    address = to_address(gateway) if gateway is not None else _UNSPECIFIED.get(family, IPv4Address(0))
    return Nexthop(number, leg=NextHop(_u32(found[_NHA_OIF]), address, 1, _alive(flags)))


def _alive(flags: int) -> bool:
    return not flags & (RTNH_F_DEAD | RTNH_F_LINKDOWN)


def in_order(legs: tuple[NextHop, ...] | list[NextHop]) -> tuple[NextHop, ...]:
    """Legs in one order, since the kernel's own order of IPv6 siblings depends on their history."""
    return tuple(
        sorted(legs, key=lambda leg: (leg.ifindex, leg.address.version, int(leg.address), leg.weight))
    )


def resolve(number: int, nexthops: dict[int, Nexthop]) -> tuple[NextHop, ...]:
    """The legs behind a nexthop id; empty where it is unknown or a blackhole."""
    nexthop = nexthops.get(number)
    if nexthop is None:
        return ()
    if nexthop.leg is not None:
        return (nexthop.leg,)
    legs = []
    for member, weight in nexthop.members:
        # Groups of groups do not exist (nexthop(8)), so one level is all there is.
        single = nexthops.get(member)
        if single is not None and single.leg is not None:
            legs.append(NextHop(single.leg.ifindex, single.leg.address, weight, single.leg.alive))
    return in_order(legs)


class RouteDecoder:
    """Decodes route messages of one table and remembers next-hop sets, which thousands of routes share."""

    _MEMORY = 4096

    def __init__(self, table: int = RT_TABLE_MAIN) -> None:
        self._table = table
        self._legs: dict[tuple[int, bytes], tuple[NextHop, ...]] = {}
        self._prefixes: dict[tuple[bytes, int], Network] = {}

    def decode(self, body: bytes) -> RouteRecord | None:
        """RTM_NEWROUTE or RTM_DELROUTE; None where the route is not one of this table's destinations.

        Not destinations: other tables, cached exceptions, routes by TOS or by source, link-local and multicast
        prefixes (every interface has its own fe80::/64, so they would be taken for one route).
        """
        family, length, source_length, tos, table, protocol, _, kind, flags = ROUTE.unpack_from(body)
        if family not in (AF_INET, AF_INET6) or flags & RTM_F_CLONED or tos or source_length:
            return None
        found = attributes(body, ROUTE.size)
        if _u32(found.get(RTA_TABLE), table) != self._table:
            return None
        packed = found.get(RTA_DST) or bytes(4 if family == AF_INET else 16)
        if length and (packed[0] & 0xF0 == 0xE0 if family == AF_INET else _not_global(packed)):
            return None
        metric = _u32(found.get(RTA_PRIORITY))
        key = (packed, length, metric)
        if kind != RTN_UNICAST:
            return RouteRecord(key, None)
        prefix = self._prefix(packed, length)
        nexthop = _u32(found.get(RTA_NH_ID))
        if RTA_MULTIPATH in found:
            legs = self._multipath(family, found[RTA_MULTIPATH])
        elif RTA_OIF in found:
            legs = self._single(family, found, flags)
        else:
            return RouteRecord(key, Route(prefix, (), protocol, metric), nexthop, unresolved=True)
        return RouteRecord(key, Route(prefix, legs, protocol, metric), nexthop)

    def _prefix(self, packed: bytes, length: int) -> Network:
        known = self._prefixes.get((packed, length))
        if known is None:
            known = to_network(packed, length)
            _bounded(self._prefixes, 4 * self._MEMORY)[packed, length] = known
        return known

    def _single(self, family: int, found: dict[int, bytes], flags: int) -> tuple[NextHop, ...]:
        memo = (
            family << 32 | flags,
            b"".join((found[RTA_OIF], found.get(RTA_GATEWAY, b""), found.get(RTA_VIA, b""))),
        )
        if RTA_ENCAP in found:
            return (NextHop(_u32(found[RTA_OIF]), _UNSPECIFIED[family], 1, _alive(flags)),)
        legs = self._legs.get(memo)
        if legs is None:
            leg = NextHop(_u32(found[RTA_OIF]), _gateway(family, found), 1, _alive(flags))
            legs = _bounded(self._legs, self._MEMORY)[memo] = (leg,)
        return legs

    def _multipath(self, family: int, data: bytes) -> tuple[NextHop, ...]:
        memo = (-family, data)
        known = self._legs.get(memo)
        if known is not None:
            return known
        legs, offset = [], 0
        while len(data) - offset >= MULTIPATH_LEG.size:
            length, flags, hops, ifindex = MULTIPATH_LEG.unpack_from(data, offset)
            if length < MULTIPATH_LEG.size or offset + length > len(data):
                raise MalformedMessageError(f"multipath leg of {length} bytes at {offset} of {len(data)}")
            found = attributes(data[offset : offset + length], MULTIPATH_LEG.size)
            legs.append(NextHop(ifindex, _gateway(family, found), hops + 1, _alive(flags)))
            offset += (length + 3) & ~3
        ordered = _bounded(self._legs, self._MEMORY)[memo] = in_order(legs)
        return ordered


def _not_global(packed: bytes) -> bool:
    return packed[0] == 0xFF or (packed[0] == 0xFE and packed[1] & 0xC0 == 0x80)


def _gateway(family: int, found: dict[int, bytes]) -> Address:
    # A leg with an encapsulation of its own (MPLS, SRv6) is no path: a redirect to its gateway would lose that.
    if RTA_ENCAP in found:
        return _UNSPECIFIED[family]
    if RTA_GATEWAY in found:
        return to_address(found[RTA_GATEWAY])
    if RTA_VIA in found:
        return to_address(found[RTA_VIA][2:])
    return _UNSPECIFIED[family]


def _bounded(memory: dict, size: int) -> dict:  # type: ignore[type-arg]
    if len(memory) >= size:
        memory.clear()
    return memory
