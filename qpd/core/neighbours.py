"""Which addresses are one neighbour: next hops and peers on one interface whose frames go to the same MAC.

BGP unnumbered on FRR shows one wire twice: IPv4 routes by ``169.254.0.1`` (a permanent entry with the peer's MAC, in
place of an IPv6 next hop as RFC 8950 has it), IPv6 routes by the peer's link-local address. So do dual-stack fabrics
with numbered IPv4 sessions. All of them are one path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address

from qpd.core.paths import PathRecord, Registry
from qpd.model import Address, Neighbour, NeighbourState, NextHopKey

FRR_UNNUMBERED = IPv4Address("169.254.0.1")
"""What zebra writes for an IPv6 next hop of an IPv4 route (zebra/interface.c: ipv4_ll)."""

ADDRESSES_MAX = 4
"""Addresses of one path: all paths' together fit the kernel's map of next hops."""


class Neighbours:
    """The neighbour table, and the addresses that BGP and BFD know their peers by.

    A path's addresses are kept for its life, with the MAC that each had last: entries that come and go change nothing.
    Only an address that nothing refers to any more makes room for another.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._entries: dict[tuple[int, Address], Neighbour] = {}
        self._known: dict[str, tuple[Address, ...]] = {}

    # --- the neighbour table ----------------------------------------------------------------------------------------

    def put(self, entry: Neighbour) -> None:
        """An entry is new or changed."""
        self._entries[entry.ifindex, entry.address] = entry

    def drop(self, ifindex: int, address: Address) -> None:
        """An entry is gone."""
        self._entries.pop((ifindex, address), None)

    def drop_interface(self, ifindex: int) -> None:
        """An interface is gone, and its entries with it."""
        for key in [key for key in self._entries if key[0] == ifindex]:
            del self._entries[key]

    def replace(self, entries: Iterable[Neighbour]) -> None:
        """All entries anew."""
        self._entries = {(entry.ifindex, entry.address): entry for entry in entries}

    def mac(self, ifindex: int, address: Address) -> str:
        """The MAC in the table; '' where there is none."""
        entry = self._entries.get((ifindex, address))
        return "" if entry is None else entry.mac

    def failed(self, ifindex: int, address: Address) -> bool:
        """The kernel asked for this address and got no answer."""
        entry = self._entries.get((ifindex, address))
        return entry is not None and entry.state is NeighbourState.FAILED

    # --- what BGP and BFD know --------------------------------------------------------------------------------------

    def know(self, keys: Iterable[NextHopKey]) -> bool:
        """Addresses of routing peers and BFD sessions, all of them, the best to name a path by first; True: changed."""
        found: dict[str, dict[Address, None]] = {}
        for key in keys:
            found.setdefault(key.interface, {})[key.address] = None
        known = {interface: tuple(addresses) for interface, addresses in found.items()}
        changed = known != self._known
        self._known = known
        return changed

    def known(self, record: PathRecord) -> list[Address]:
        """Those of the path's addresses that BGP or BFD know."""
        return [
            address for address in self._known.get(record.key.interface, ()) if address in record.addresses
        ]

    def unclaimed(self) -> Iterator[NextHopKey]:
        """What BGP or BFD know on interfaces with paths, and is no path's address."""
        for interface, addresses in self._known.items():
            if self._registry.on(interface):
                for address in addresses:
                    key = NextHopKey(interface, address)
                    if self._registry.get(key) is None:
                        yield key

    # --- who is who -------------------------------------------------------------------------------------------------

    def find(self, key: NextHopKey, ifindex: int) -> PathRecord | None:
        """The path to the neighbour that has this address, too; the eldest where there are several."""
        mac = self.mac(ifindex, key.address)
        likely = mac or eui64_mac(key.address)
        if likely:
            for record in self._registry.on(key.interface):
                if likely in _macs(record.addresses):
                    return record
        partner = self._partner(key)
        if partner is None:
            return None
        path = self._registry.get(NextHopKey(key.interface, partner))
        return None if path is None or (mac and path.addresses[partner]) else path

    def kin(self, record: PathRecord) -> list[PathRecord]:
        """Other paths to the same neighbour: its MAC was not known when they were made."""
        others = self._registry.on(record.key.interface)
        if len(others) == 1:
            return []
        macs = _macs(record.addresses)
        return [other for other in others if other is not record and macs & _macs(other.addresses)]

    def attach(self, record: PathRecord, address: Address, ifindex: int) -> bool:
        """Make it one of the path's addresses; False: it has too many that are needed."""
        if len(record.addresses) >= ADDRESSES_MAX:
            known = self.known(record)
            idle = [
                other
                for other in record.addresses
                if other not in record.uses and other not in known and other != record.key.address
            ]
            if not idle:
                return False
            self._registry.detach(record, idle[0])
        self._registry.attach(record, address)
        self.learn(record, ifindex)
        return True

    def learn(self, record: PathRecord, ifindex: int) -> None:
        """Note the MACs that the path's addresses have now."""
        for address in record.addresses:
            mac = self.mac(ifindex, address)
            if mac:
                record.addresses[address] = mac

    def _partner(self, key: NextHopKey) -> Address | None:
        """FRR's stand-in belongs to the interface's only unnumbered peer, and the other way round."""
        known = self._known.get(key.interface, ())
        unnumbered = [address for address in known if address.version == 6 and address.is_link_local]
        if len(unnumbered) != 1:
            return None
        if key.address == FRR_UNNUMBERED:
            return unnumbered[0]
        return FRR_UNNUMBERED if key.address == unnumbered[0] else None


def best_next_hop(record: PathRecord, known: Iterable[Address], born: bool) -> Address:
    """The address that packets are sent to, which is the path's next hop for everyone.

    IPv6 packets cannot be sent to an IPv4 next hop, while the reverse works: so an IPv6 one as soon as IPv6 next hops
    are in use. A new path (``born``) takes one that BGP or BFD know. Afterwards it stays until routes use the path and
    neither they nor BGP nor BFD have this address any more, as when the peer was replaced.
    """
    current = record.key.address
    referred = [*known, *record.uses]
    version = max((address.version for address in record.uses), default=4)
    fitting = [address for address in referred if address.version >= version]
    if not fitting or (not born and (current in fitting or not record.uses)):
        return current
    return fitting[0]


def eui64_mac(address: Address) -> str:
    """The MAC that a link-local address was made of (RFC 4291, appendix A); '' where it was not."""
    if (
        not isinstance(address, IPv6Address)
        or not address.is_link_local
        or address.packed[11:13] != b"\xff\xfe"
    ):
        return ""
    octets = bytearray(address.packed[8:11] + address.packed[13:])
    octets[0] ^= 0x02
    return octets.hex(":")


def _macs(addresses: Mapping[Address, str]) -> set[str]:
    return {mac or eui64_mac(address) for address, mac in addresses.items()} - {""}
