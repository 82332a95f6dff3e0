"""The frames that the classifier is measured with, and where in them the harness writes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from qpd.model import Address

ROCE, VXLAN = 4791, 4789
RDMA_WRITE_ONLY, ACKNOWLEDGE = 0x0A, 0x11
PAYLOAD = 1024
"""The path MTU of RoCE over Ethernet's 1 500 octets (InfiniBand Architecture 1, 9.7.1 lists the sizes)."""
VNI = 10010
LOCAL_VTEP, LOCAL_VTEP6 = IPv4Address("10.255.0.1"), IPv6Address("fd00::1")
HOST, PEER = IPv4Address("192.168.10.1"), IPv4Address("192.168.10.2")
SOURCE_MAC, DESTINATION_MAC = bytes.fromhex("0200000000a1"), bytes.fromhex("0200000000b1")
KERNEL_PORT = 50001
"""An outer source port as the VXLAN driver might choose it; never that of a measured QP, which the harness checks."""


@dataclass(frozen=True)
class Frame:
    """A frame, and the offsets of its BTH's destination QP and of its outer UDP header (0: it has none)."""

    octets: bytes
    qp_at: int = 0
    port_at: int = 0
    port: int = 0
    check: int = 0


def plain(destination: Address, qp: int) -> Frame:
    """RoCEv2 as a host sends it, or a router forwards it."""
    octets = _ethernet(_ip(HOST, destination, _udp(49200, ROCE, _bth(qp))), destination)
    return Frame(octets, qp_at=len(octets) - PAYLOAD - 4 - 8)


def vxlan(vtep: Address, qp: int, opcode: int = RDMA_WRITE_ONLY) -> Frame:
    """RoCEv2 in VXLAN; over IPv6 with the outer checksum that Linux computes by default."""
    inner = _ethernet(_ip(HOST, PEER, _udp(49200, ROCE, _bth(qp, opcode))), PEER)
    tunnelled = struct.pack("!B3xI", 0x08, VNI << 8) + inner
    local = LOCAL_VTEP if vtep.version == 4 else LOCAL_VTEP6
    check = 0
    if vtep.version == 6:
        pseudo = local.packed + vtep.packed + struct.pack("!II", len(tunnelled) + 8, 17)
        check = _checksum(pseudo + _udp(KERNEL_PORT, VXLAN, tunnelled)) or 0xFFFF
    octets = _ethernet(_ip(local, vtep, _udp(KERNEL_PORT, VXLAN, tunnelled, check)), vtep)
    port_at = 14 + (20 if vtep.version == 4 else 40)
    return Frame(octets, qp_at=len(octets) - PAYLOAD - 4 - 8, port_at=port_at, port=KERNEL_PORT, check=check)


def tcp(destination: Address) -> Frame:
    """A TCP segment, not encapsulated."""
    segment = struct.pack("!HHIIBBHHH", 40000, 5201, 1, 1, 0x50, 0x10, 512, 0, 0) + bytes(PAYLOAD)
    return Frame(_ethernet(_ip(HOST, destination, segment, protocol=6), destination))


def vxlan_tcp(vtep: Address) -> Frame:
    """A TCP segment in VXLAN."""
    segment = struct.pack("!HHIIBBHHH", 40000, 5201, 1, 1, 0x50, 0x10, 512, 0, 0) + bytes(PAYLOAD)
    inner = _ethernet(_ip(HOST, PEER, segment, protocol=6), PEER)
    tunnelled = struct.pack("!B3xI", 0x08, VNI << 8) + inner
    return Frame(_ethernet(_ip(LOCAL_VTEP, vtep, _udp(KERNEL_PORT, VXLAN, tunnelled)), vtep))


def host_payload(qp: int) -> bytes:
    """What a UDP socket sends to port 4791: BTH, data and room for the ICRC."""
    return _bth(qp)


def _bth(qp: int, opcode: int = RDMA_WRITE_ONLY) -> bytes:
    return struct.pack("!BBHII", opcode, 0x40, 0xFFFF, qp, 0) + bytes(PAYLOAD + 4)


def _udp(source: int, destination: int, payload: bytes, check: int = 0) -> bytes:
    return struct.pack("!HHHH", source, destination, 8 + len(payload), check) + payload


def _ip(source: Address | str, destination: Address, payload: bytes, protocol: int = 17) -> bytes:
    source = ip_address(str(source))
    if destination.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
        return head + source.packed + destination.packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0)
    head += source.packed + destination.packed
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + payload


def _ethernet(packet: bytes, destination: Address) -> bytes:
    return DESTINATION_MAC + SOURCE_MAC + (b"\x08\x00" if destination.version == 4 else b"\x86\xdd") + packet


def _checksum(octets: bytes) -> int:
    """RFC 1071's, of octets whose checksum field is zero."""
    octets += bytes(len(octets) % 2)
    total: int = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
