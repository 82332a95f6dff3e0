"""RoCEv2 frames for test traffic: base transport header, invariant CRC. Pure.

InfiniBand Architecture Specification volume 1, chapter 9 (BTH) and Annex A17 (RoCEv2).
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

import numpy as np
import numpy.typing as npt

UDP_PORT = 4791
PSN_MODULUS = 1 << 24
BTH_LENGTH = 12
ICRC_LENGTH = 4

TRAFFIC_CLASS = 26 << 2 | 0b10
"""DSCP 26, as RoCE networks commonly mark it, and ECT(0)."""

# Offsets inside the BTH of what differs from packet to packet.
QPN_OFFSET, ACK_REQUEST_OFFSET, PSN_OFFSET = 5, 8, 9
_ACK_REQUEST = 0x80


class Opcode(IntEnum):
    """BTH opcodes of the reliable connection service (IBA volume 1, table 38), and of the congestion notification."""

    SEND_FIRST = 0x00
    SEND_MIDDLE = 0x01
    SEND_LAST = 0x02
    SEND_LAST_IMMEDIATE = 0x03
    SEND_ONLY = 0x04
    SEND_ONLY_IMMEDIATE = 0x05
    WRITE_FIRST = 0x06
    WRITE_MIDDLE = 0x07
    WRITE_LAST = 0x08
    WRITE_LAST_IMMEDIATE = 0x09
    WRITE_ONLY = 0x0A
    WRITE_ONLY_IMMEDIATE = 0x0B
    ACKNOWLEDGE = 0x11
    CNP = 0x81

    @property
    def extension(self) -> int:
        """Length of what stands between the BTH and the data: RETH, immediate data, AETH, or a CNP's reserved bytes."""
        return _EXTENSIONS.get(self, 0)


FIRSTS = frozenset(
    {
        Opcode.SEND_FIRST,
        Opcode.SEND_ONLY,
        Opcode.SEND_ONLY_IMMEDIATE,
        Opcode.WRITE_FIRST,
        Opcode.WRITE_ONLY,
        Opcode.WRITE_ONLY_IMMEDIATE,
    }
)
"""Requests that begin a message."""

LASTS = frozenset(
    {
        Opcode.SEND_LAST,
        Opcode.SEND_LAST_IMMEDIATE,
        Opcode.SEND_ONLY,
        Opcode.SEND_ONLY_IMMEDIATE,
        Opcode.WRITE_LAST,
        Opcode.WRITE_LAST_IMMEDIATE,
        Opcode.WRITE_ONLY,
        Opcode.WRITE_ONLY_IMMEDIATE,
    }
)
"""Requests that end a message."""

REQUESTS = FIRSTS | LASTS | {Opcode.SEND_MIDDLE, Opcode.WRITE_MIDDLE}

WITH_RETH = frozenset({Opcode.WRITE_FIRST, Opcode.WRITE_ONLY, Opcode.WRITE_ONLY_IMMEDIATE})
"""Requests that say where in the peer's memory their message goes, and how long it is."""

WITH_IMMEDIATE = frozenset(
    {
        Opcode.SEND_LAST_IMMEDIATE,
        Opcode.SEND_ONLY_IMMEDIATE,
        Opcode.WRITE_LAST_IMMEDIATE,
        Opcode.WRITE_ONLY_IMMEDIATE,
    }
)

_EXTENSIONS = {
    Opcode.SEND_LAST_IMMEDIATE: 4,
    Opcode.SEND_ONLY_IMMEDIATE: 4,
    Opcode.WRITE_FIRST: 16,
    Opcode.WRITE_LAST_IMMEDIATE: 4,
    Opcode.WRITE_ONLY: 16,
    Opcode.WRITE_ONLY_IMMEDIATE: 20,
    Opcode.ACKNOWLEDGE: 4,
    Opcode.CNP: 16,
}


def bth(opcode: int, destination_qp: int, psn: int, *, ack_request: bool = False) -> bytes:
    """A base transport header with the default partition key."""
    flags = 0x40  # migration state "migrated", as adapters without path migration send it
    return struct.pack(
        ">BBHII",
        opcode,
        flags,
        0xFFFF,
        destination_qp,
        (_ACK_REQUEST << 24 if ack_request else 0) | psn % PSN_MODULUS,
    )


def icrc_header(ip_header: bytes, udp_header: bytes) -> bytes:
    """What the ICRC covers before the BTH: what routers may change counts as ones (Annex A17.3.3).

    So do eight bytes in place of the local route header.
    """
    ip = bytearray(ip_header)
    if ip[0] >> 4 == 4:
        ip[1] = ip[8] = ip[10] = ip[11] = 0xFF
    else:
        ip[0] |= 0x0F
        ip[1] = ip[2] = ip[3] = ip[7] = 0xFF
    return b"\xff" * 8 + bytes(ip) + udp_header[:6] + b"\xff\xff"


def icrc(ip_header: bytes, udp_header: bytes, transport: bytes) -> bytes:
    """The invariant CRC over a packet; `transport` is everything from the BTH up to, not including, the ICRC."""
    masked_bth = transport[:4] + b"\xff" + transport[5:]
    return struct.pack("<I", zlib.crc32(icrc_header(ip_header, udp_header) + masked_bth))


def ip_header(source: str, destination: str, udp_length: int) -> bytes:
    """The IP header that Linux sends for an unconnected UDP socket that forbids fragments: identification 0, DF."""
    if ":" in source:
        v6 = struct.pack(">IHBB", 6 << 28 | TRAFFIC_CLASS << 20, udp_length, 17, 64)
        return v6 + IPv6Address(source).packed + IPv6Address(destination).packed
    v4 = struct.pack(">BBHHHBBH", 0x45, TRAFFIC_CLASS, 20 + udp_length, 0, 0x4000, 64, 17, 0)
    return v4 + IPv4Address(source).packed + IPv4Address(destination).packed


class Template:
    """The UDP payload of one QP's packets: all of them differ in PSN, ACK request and ICRC alone.

    CRC is linear: the ICRC of a packet is that of the template xor what the changed bytes contribute, so a batch of
    packets costs four table look-ups a packet, whatever its size.
    """

    def __init__(
        self,
        source: str,
        destination: str,
        source_port: int,
        destination_qp: int,
        *,
        opcode: Opcode = Opcode.SEND_ONLY,
        size: int = 1024,
    ) -> None:
        data = bytes(opcode.extension) + bytes(index & 0xFF for index in range(size))
        if opcode is Opcode.WRITE_ONLY:
            data = struct.pack(">QII", 0x7F0000000000, 0x1234, size) + data[16:]
        self.transport = bth(opcode, destination_qp, 0) + data
        self._udp_length = 8 + len(self.transport) + ICRC_LENGTH
        self._ip = ip_header(source, destination, self._udp_length)
        self._udp = struct.pack(">HHHH", source_port, UDP_PORT, self._udp_length, 0)
        self.base = self._crc(self.transport)

    @property
    def length(self) -> int:
        """Length of the UDP payload."""
        return len(self.transport) + ICRC_LENGTH

    def _crc(self, transport: bytes) -> int:
        return int(struct.unpack("<I", icrc(self._ip, self._udp, transport))[0])

    def contributions(self) -> npt.NDArray[np.uint32]:
        """[4][256]: what a value of the bytes at offset 8 (ACK request) to 11 (end of the PSN) adds to the ICRC.

        Depends on nothing but the packet's length: QPs with packets of one size share it.
        """
        table = np.zeros((4, 256), dtype=np.uint32)
        values = np.arange(256, dtype=np.uint32)
        for position in range(4):
            # Linear: the contribution of a byte is the xor of its bits' contributions.
            for bit in range(8):
                changed = bytearray(self.transport)
                changed[ACK_REQUEST_OFFSET + position] ^= 1 << bit
                table[position] ^= (values >> bit & 1) * np.uint32(self._crc(bytes(changed)) ^ self.base)
        return table


def linux_source_port(source_qp: int, destination_qp: int) -> int:
    """The UDP source port that Linux derives for an RC QP without a flow label; symmetric in the two QP numbers.

    rdma_calc_flow_label() and rdma_flow_label_to_udp_sport() of linux/include/rdma/ib_verbs.h.
    """
    product = source_qp * destination_qp
    label = (product ^ product >> 20 ^ product >> 40) & 0xFFFFF
    folded = (label & 0x3FFF) ^ (label & 0xFC000) >> 14
    return folded | 0xC000
