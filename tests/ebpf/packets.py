"""Every packet of these tests: declared once, used to inject and to compare.

Names as in the packet: outer is what the underlay routes by, inner is what a VTEP encapsulated.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

from scapy.contrib.roce import AETH, BTH
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from qpd.model import QueuePairKey

VTEPS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8:1::1", "2001:db8:1::2")}
HOSTS = {4: ("10.7.0.11", "10.7.0.22"), 6: ("2001:db8:7::11", "2001:db8:7::22")}
MACS: dict[str, Any] = {"src": "02:00:00:00:00:01", "dst": "02:00:00:00:00:02"}
HOST_MACS: dict[str, Any] = {"src": "02:00:00:00:00:11", "dst": "02:00:00:00:00:22"}
PORT_ROCE, PORT_VXLAN = 4791, 4789
VXLAN_SOURCE = 40000
"""Outside the range that qpd writes, so that a written port is seen."""

RC_SEND_ONLY, RC_ACKNOWLEDGE = 0x04, 0x11
PAYLOAD = bytes(range(64))


def ethernet(tags: int, macs: dict[str, Any]) -> Packet:
    """An Ethernet header with 0 to 3 VLAN tags; two and more begin with 802.1ad."""
    header: Packet = Ether(**macs)
    for position in range(tags):
        outer = position == 0 and tags > 1
        header /= Dot1AD(vlan=100) if outer else Dot1Q(vlan=200 + position)
    return header


def ip(version: int, addresses: tuple[str, str], **fields: Any) -> Packet:
    """An IPv4 or IPv6 header."""
    src, dst = addresses
    return IP(src=src, dst=dst, **fields) if version == 4 else IPv6(src=src, dst=dst, **fields)


def bth(dest_qp: int, opcode: int = RC_SEND_ONLY, psn: int = 7, **fields: Any) -> Packet:
    """A BTH with what follows it; an ICRC that nobody checks (scapy's covers IPv4 only)."""
    header = BTH(opcode=opcode, dqpn=dest_qp, psn=psn, icrc=0x12345678, **fields)
    return header / AETH(syndrome=0) if opcode == RC_ACKNOWLEDGE else header / Raw(PAYLOAD)


@dataclass(frozen=True)
class Roce:
    """A RoCEv2 packet by its headers. ``vni`` None: plain, and the inner fields are the packet's only ones."""

    inner: int = 4
    outer: int = 4
    vni: int | None = 5001
    tags: int = 0
    inner_tags: int = 0
    dest_qp: int = 0x11
    opcode: int = RC_SEND_ONLY
    outer_checksum: bool = False
    source_port: int = VXLAN_SOURCE

    @property
    def sentence(self) -> str:
        """Its headers in words."""
        inner = f"{self.inner_tags} tags, IPv{self.inner}"
        if self.vni is None:
            return f"plain: {self.tags} tags, IPv{self.inner}"
        return f"{self.tags} tags, IPv{self.outer}, VXLAN: {inner}"

    @property
    def key(self) -> QueuePairKey:
        """The QP that it belongs to."""
        return QueuePairKey(self.vni or 0, ip_address(HOSTS[self.inner][1]), self.dest_qp)

    @property
    def version(self) -> int:
        """IP version of the outermost header."""
        return self.inner if self.vni is None else self.outer

    @property
    def destination(self) -> str:
        """What the underlay routes by."""
        return HOSTS[self.inner][1] if self.vni is None else VTEPS[self.outer][1]

    def transport(self) -> Packet:
        """UDP and BTH."""
        return UDP(sport=49999, dport=PORT_ROCE, chksum=0) / bth(self.dest_qp, self.opcode)

    def layers(self) -> Packet:
        """The packet, for who wants to change it before it is built."""
        inner = ip(self.inner, HOSTS[self.inner]) / self.transport()
        if self.vni is None:
            return ethernet(self.tags, HOST_MACS) / inner
        return self.wrap(ethernet(self.inner_tags, HOST_MACS) / inner)

    def wrap(self, frame: Packet) -> Packet:
        """VXLAN around a frame."""
        udp = UDP(sport=self.source_port, dport=PORT_VXLAN)
        if not self.outer_checksum:
            udp.chksum = 0
        vxlan = VXLAN(flags=0x08, vni=self.vni or 0)
        return ethernet(self.tags, MACS) / ip(self.outer, VTEPS[self.outer]) / udp / vxlan / frame

    def build(self) -> bytes:
        """The packet's octets."""
        return bytes(self.layers())


def every_combination() -> Iterator[Roce]:
    """Ethernet with 0, 1, 2 tags; IPv4, IPv6; VXLAN or not; the same inside."""
    for tags, inner in itertools.product((0, 1, 2), (4, 6)):
        yield Roce(vni=None, tags=tags, inner=inner)
        for outer, inner_tags in itertools.product((4, 6), (0, 1, 2)):
            yield Roce(tags=tags, outer=outer, inner_tags=inner_tags, inner=inner)


def source_port(packet: bytes, *, version: int) -> int:
    """Outer UDP source port of an untagged packet without IP options."""
    at = 14 + (20 if version == 4 else 40)
    return int.from_bytes(packet[at : at + 2], "big")


def without_entropy(packet: bytes, *, version: int) -> bytes:
    """The packet with outer UDP source port and checksum zeroed: what qpd must never change."""
    at = 14 + (20 if version == 4 else 40)
    return packet[:at] + bytes(2) + packet[at + 2 : at + 6] + bytes(2) + packet[at + 8 :]


def checksum_is_right(packet: bytes) -> bool:
    """Whether the outermost UDP checksum is what scapy computes."""
    layers = Ether(packet)
    was = layers[UDP].chksum
    del layers[UDP].chksum
    return bool(Ether(bytes(layers))[UDP].chksum == was)


def others() -> dict[str, bytes]:
    """Packets that are not RoCEv2, or not in a way that qpd follows."""
    roce = Roce()
    plain = Roce(vni=None)
    ip4 = ip(4, HOSTS[4])
    udp = UDP(sport=1, dport=PORT_ROCE, chksum=0)
    gpe = roce.layers()
    gpe[VXLAN].flags = 0x04
    return {
        "ARP": bytes(Ether(**MACS) / ARP()),
        "ICMP": bytes(Ether(**MACS) / ip4 / ICMP()),
        "TCP to the port of RoCE": bytes(Ether(**MACS) / ip4 / TCP(dport=PORT_ROCE)),
        "UDP to another port": bytes(Ether(**MACS) / ip4 / UDP(dport=4792) / bth(1)),
        "UDP from the port of RoCE": bytes(Ether(**MACS) / ip4 / UDP(sport=PORT_ROCE, dport=9) / bth(1)),
        "VXLAN without a valid VNI (I flag)": bytes(gpe),
        "VXLAN with ARP inside": bytes(roce.wrap(Ether(**HOST_MACS) / ARP())),
        "VXLAN with TCP inside": bytes(roce.wrap(Ether(**HOST_MACS) / ip4 / TCP())),
        "VXLAN inside VXLAN": bytes(roce.wrap(roce.layers())),
        "three VLAN tags": replace(plain, tags=3).build(),
        "three VLAN tags inside VXLAN": replace(roce, inner_tags=3).build(),
        "a BTH of another version": bytes(Ether(**MACS) / ip4 / udp / bth(1, version=1)),
        "IPv6 with a routing header": bytes(
            Ether(**MACS)
            / IPv6(dst=HOSTS[6][1])
            / IPv6ExtHdrRouting(addresses=["2001:db8::9"])
            / udp
            / bth(1)
        ),
        "IPv6 with three extension headers": bytes(
            Ether(**MACS) / IPv6(dst=HOSTS[6][1]) / _options() / _options() / _options() / udp / bth(1)
        ),
        "IPv4 that says version 5": _patched(plain.build(), 14, 0x55),
        "IPv4 that says it has 16 octets": _patched(plain.build(), 14, 0x44),
        "IPv6 that says version 4": _patched(replace(plain, inner=6).build(), 14, 0x40),
        "a RoCE frame of version 1 (EtherType 0x8915)": bytes(Ether(type=0x8915, **MACS) / Raw(bytes(60))),
    }


def unusual() -> dict[str, tuple[Roce, bytes]]:
    """RoCEv2 all the same: options and extension headers before UDP."""
    v4, v6 = Roce(), Roce(outer=6, inner=6)
    plain4, plain6 = Roce(vni=None), Roce(vni=None, inner=6)
    nops = [IPOption_NOP()]
    frame4 = Ether(**HOST_MACS) / ip(4, HOSTS[4], options=nops * 40) / v4.transport()
    outer_options = v4.layers()
    outer_options[IP].options = nops * 4
    del outer_options[IP].ihl
    ext6 = IPv6(src=HOSTS[6][0], dst=HOSTS[6][1]) / _options()
    return {
        "IPv4 options inside VXLAN": (v4, bytes(v4.wrap(frame4))),
        "IPv4 options outside VXLAN": (v4, bytes(outer_options)),
        "IPv4 options, plain": (
            plain4,
            bytes(Ether(**HOST_MACS) / ip(4, HOSTS[4], options=nops * 8) / plain4.transport()),
        ),
        "IPv6 with one extension header, plain": (
            plain6,
            bytes(Ether(**HOST_MACS) / ext6 / plain6.transport()),
        ),
        "IPv6 with two extension headers inside VXLAN": (
            v6,
            bytes(v6.wrap(Ether(**HOST_MACS) / ext6 / IPv6ExtHdrDestOpt() / v6.transport())),
        ),
    }


def fragments() -> dict[str, bytes]:
    """UDP in IP fragments, first and later, outside and inside VXLAN."""
    v4, v6 = Roce(), Roce(inner=6, outer=6)
    whole = {}
    ipv4: dict[str, dict[str, Any]]
    ipv4 = {"first": {"flags": "MF"}, "later": {"frag": 3}, "last but one": {"flags": "MF", "frag": 3}}
    for name, fields in ipv4.items():
        inner = ip(4, HOSTS[4], **fields) / v4.transport()
        whole[f"IPv4, {name}, plain"] = bytes(Ether(**MACS) / inner)
        whole[f"IPv4, {name}, inside VXLAN"] = bytes(v4.wrap(Ether(**HOST_MACS) / inner))
        outer = v4.layers()
        for field, value in fields.items():
            setattr(outer[IP], field, value)
        whole[f"IPv4, {name}, of VXLAN"] = bytes(outer)
    for name, frag in {"first": IPv6ExtHdrFragment(m=1), "later": IPv6ExtHdrFragment(offset=9)}.items():
        inner = ip(6, HOSTS[6]) / frag / v6.transport()
        whole[f"IPv6, {name}, plain"] = bytes(Ether(**MACS) / inner)
        whole[f"IPv6, {name}, inside VXLAN"] = bytes(v6.wrap(Ether(**HOST_MACS) / inner))
        options = ip(6, HOSTS[6]) / _options() / frag / v6.transport()
        whole[f"IPv6, {name}, after options"] = bytes(Ether(**MACS) / options)
    return whole


def _options() -> Packet:
    return IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(12))])


def _patched(packet: bytes, at: int, octet: int) -> bytes:
    return packet[:at] + bytes([octet]) + packet[at + 1 :]


# --- Checksums -------------------------------------------------------------------------------------------------------


def udp_checksum(packet: bytes, *, version: int) -> int:
    """The outermost UDP checksum of an untagged packet without IP options."""
    at = 14 + (20 if version == 4 else 40) + 6
    return int.from_bytes(packet[at : at + 2], "big")


def with_pseudo_sum(packet: bytes, *, version: int) -> bytes:
    """The packet as the kernel hands it to a device that will finish the outer checksum."""
    at = 14 + (20 if version == 4 else 40)
    addresses = packet[26:34] if version == 4 else packet[22:54]
    words = addresses + packet[at + 4 : at + 6] + (17).to_bytes(2, "big")
    return packet[: at + 6] + ones_sum(words).to_bytes(2, "big") + packet[at + 8 :]


def with_zero_sum_at(roce: Roce, port: int) -> bytes:
    """The packet with a payload that makes the outer checksum 0xffff once its source port is ``port``."""
    packet = bytearray(replace(roce, source_port=port).build())
    at = 14 + (20 if roce.outer == 4 else 40)
    packet[-6:-4] = bytes(2)
    unsummed = with_pseudo_sum(bytes(packet), version=roce.outer)
    packet[-6:-4] = (0xFFFF - ones_sum(unsummed[at:])).to_bytes(2, "big")
    layers = Ether(bytes(packet))
    layers[UDP].sport = roce.source_port
    del layers[UDP].chksum
    return bytes(layers)


def ones_sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071)."""
    total = sum(int.from_bytes(data[n : n + 2].ljust(2, b"\0"), "big") for n in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


# --- BFD -------------------------------------------------------------------------------------------------------------

PORT_BFD = 3784
ADMIN_DOWN, DOWN, INIT, UP = range(4)
POLL, FINAL, AUTHENTICATION, DEMAND, MULTIPOINT = 0x20, 0x10, 0x04, 0x02, 0x01
NODE = {4: "198.51.100.0", 6: "fe80::a"}
PEER = {4: "198.51.100.1", 6: "fe80::1"}
NODE_DISCRIMINATOR, PEER_DISCRIMINATOR = 0x11, 0x22


@dataclass(frozen=True)
class Bfd:
    """A BFD control packet (RFC 5880, 4.1) that leaves (``leaves``) or arrives. Intervals in microseconds."""

    leaves: bool
    state: int
    version: int = 4
    my: int | None = None
    your: int | None = None
    multiplier: int = 3
    tx: int = 10_000_000
    rx: int = 10_000_000
    flags: int = 0
    diagnostic: int = 0
    ttl: int = 255
    bfd_version: int = 1
    length: int = 24
    port: int = PORT_BFD
    peer: str = ""
    tags: int = 0

    def layers(self) -> Packet:
        """The packet, for who wants to wrap it."""
        ours, theirs = NODE_DISCRIMINATOR, PEER_DISCRIMINATOR
        my = (ours if self.leaves else theirs) if self.my is None else self.my
        your = (theirs if self.leaves else ours) if self.your is None else self.your
        body = struct.pack(
            "!BBBBIIIII",
            self.bfd_version << 5 | self.diagnostic,
            self.state << 6 | self.flags,
            self.multiplier,
            self.length,
            my,
            your,
            self.tx,
            self.rx,
            0,
        )
        body += bytes(max(0, self.length - 24))
        peer = self.peer or PEER[self.version]
        addresses = (NODE[self.version], peer) if self.leaves else (peer, NODE[self.version])
        hops = {"ttl": self.ttl} if self.version == 4 else {"hlim": self.ttl}
        header = ip(self.version, addresses, **hops)
        return ethernet(self.tags, MACS) / header / UDP(sport=49152, dport=self.port) / Raw(body)

    def build(self) -> bytes:
        """The packet's octets."""
        return bytes(self.layers())
