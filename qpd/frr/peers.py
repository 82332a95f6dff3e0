"""``show bgp neighbors json`` of bgpd as host names of next hops; pure.

Peers tell their host name by the hostname capability (draft-walton-bgp-hostname-capability). Seen in a live FRR 8.4.4
and read in the sources up to 10.7 (bgpd/bgp_vty.c, bgp_show_peer), where a peer without one is called "Unknown".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from qpd.frr.bfd import InterfaceOf, to_address
from qpd.model import Address, NextHopKey

COMMAND = "show bgp neighbors json"

_UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class BgpPeer:
    """A neighbour of bgpd's default instance.

    ``name``: as bgpd lists it, an address or, for an unnumbered one, an interface. ``interface`` is None where only
    the kernel can tell it, ``address`` where the peer of an unnumbered session has not been heard yet.
    """

    name: str
    interface: str | None
    address: Address | None
    host_name: str | None
    established: bool


def parse_peers(text: str) -> tuple[BgpPeer, ...]:
    """All neighbours.

    Raises:
        ValueError: the text is not what bgpd answers; one line.
    """
    try:
        entries = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"bgpd's answer to {COMMAND!r} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"bgpd's answer to {COMMAND!r} is not an object: {text[:60]!r}")  # noqa: TRY004 - of the text
    # Beside neighbours there are plain values (vrfId, vrfName, bgpNoSuchNeighbor, ...).
    return tuple(_peer(name, entry) for name, entry in entries.items() if isinstance(entry, dict))


def _peer(name: str, entry: dict[str, object]) -> BgpPeer:
    host_name = entry.get("hostname")
    known = host_name if isinstance(host_name, str) and host_name not in ("", _UNKNOWN) else None
    established = entry.get("bgpState") == "Established"
    numbered = to_address(name.lstrip("*"))  # an asterisk marks peers that were accepted by a listen range
    if numbered is not None:
        return BgpPeer(name, None, numbered, known, established)
    address = to_address(entry.get("bgpNeighborAddr")) or to_address(entry.get("hostForeign"))
    if address is not None and address.is_unspecified:
        address = None
    return BgpPeer(name, name, address, known, established)


class PeerNames:
    """Host names of next hops, remembered for as long as bgpd lists the neighbour.

    A path must not lose its name when its session goes down: its place in the slots' orders hangs on it.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[NextHopKey, str]] = {}

    def update(self, peers: Iterable[BgpPeer], interface_of: InterfaceOf) -> dict[NextHopKey, str]:
        """Take all of bgpd's neighbours and return the name of every next hop that has one."""
        names: dict[str, dict[NextHopKey, str]] = {}
        for peer in peers:
            kept = self._names.get(peer.name, {})
            found = self._found(peer, interface_of)
            # A peer that answers from a new link-local address is the same neighbour: the old address is forgotten.
            names[peer.name] = found or kept
        self._names = names
        return {key: name for of_peer in names.values() for key, name in of_peer.items()}

    @staticmethod
    def _found(peer: BgpPeer, interface_of: InterfaceOf) -> dict[NextHopKey, str]:
        if peer.host_name is None or peer.address is None:
            return {}
        interface = peer.interface or interface_of(peer.address)
        return {} if interface is None else {NextHopKey(interface, peer.address): peer.host_name}
