"""What a node's frr.conf says about addresses and neighbours. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Interface


@dataclass
class FrrConf:
    """The facts of an frr.conf that the lab needs; everything else in it is FRR's business."""

    hostname: str = ""
    asn: int = 0
    """AS number of the default VRF's BGP instance; 0 where there is none."""
    addresses: dict[str, list[IPv4Interface]] = field(default_factory=dict)
    """IPv4 addresses by interface."""
    neighbors: list[str] = field(default_factory=list)
    """BGP neighbours of the default VRF: an address, or an interface name where BGP is unnumbered."""

    @property
    def loopback(self) -> str | None:
        """The first loopback address, which is a leaf's VTEP."""
        for address in self.addresses.get("lo", []):
            return str(address.ip)
        return None

    def neighbor_on(self, interface: str) -> str | None:
        """The BGP neighbour that is reached through `interface`, as `neighbor` commands name it."""
        if interface in self.neighbors:
            return interface
        networks = [address.network for address in self.addresses.get(interface, [])]
        for neighbor in self.neighbors:
            if neighbor[0].isdigit() and any(IPv4Interface(neighbor).ip in network for network in networks):
                return neighbor
        return None


def parse(text: str) -> FrrConf:
    """Read the text of an frr.conf; unknown lines are passed over."""
    conf = FrrConf()
    section: list[str] = []
    for indented, words in _lines(text):
        if not indented:
            section = words
            if words[0] == "hostname":
                conf.hostname = words[1]
            elif words[:2] == ["router", "bgp"] and len(words) == 3:
                conf.asn = int(words[2])
        elif section[0] == "interface" and words[:2] == ["ip", "address"]:
            conf.addresses.setdefault(section[1], []).append(IPv4Interface(words[2]))
        elif section[:2] == ["router", "bgp"] and len(section) == 3 and words[0] == "neighbor":
            _neighbor(conf, words)
    return conf


def _neighbor(conf: FrrConf, words: list[str]) -> None:
    name = words[1]
    # "remote-as" of a peer group names no neighbour; group names begin with a letter.
    is_neighbor = words[2] == "interface" or (words[2] == "remote-as" and name[0].isdigit())
    if is_neighbor and name not in conf.neighbors:
        conf.neighbors.append(name)


def _lines(text: str) -> Iterator[tuple[bool, list[str]]]:
    for line in text.splitlines():
        words = line.split()
        if words and not words[0].startswith("!"):
            yield line[0].isspace(), words
