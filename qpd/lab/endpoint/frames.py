"""Frames of an emulated endpoint: from IP header to ICRC, written into and read from flat buffers. Pure.

The hot path of the endpoint: what does not change from packet to packet of a queue pair (headers, and the ICRC over
them) is computed once for each length.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

from qpd.lab import roce
from qpd.lab.endpoint.requester import Segment
from qpd.lab.endpoint.responder import Reply
from qpd.lab.roce import BTH_LENGTH, ICRC_LENGTH, WITH_IMMEDIATE, WITH_RETH, Opcode

UDP_LENGTH = 8
_BTH = struct.Struct(">BBHII")
_RETH = struct.Struct(">QII")
_AETH = struct.Struct(">I")
_WORD = struct.Struct(">I")
_ICRC = struct.Struct("<I")
_KEY = 0x1234
_ASK = 0x80000000
_BECN = 0x40000000
_MIGRATED = 0x40
# The resv8a byte before the destination QP number counts as ones in the ICRC and is zero on the wire.
_MASKED = 0xFF000000

# By whether the packet is its message's first, its last, and whether the message has immediate data.
_WRITES = {
    (True, True, False): Opcode.WRITE_ONLY,
    (True, True, True): Opcode.WRITE_ONLY_IMMEDIATE,
    (True, False, False): Opcode.WRITE_FIRST,
    (True, False, True): Opcode.WRITE_FIRST,
    (False, True, False): Opcode.WRITE_LAST,
    (False, True, True): Opcode.WRITE_LAST_IMMEDIATE,
}
_SENDS = {
    (True, True, False): Opcode.SEND_ONLY,
    (True, True, True): Opcode.SEND_ONLY_IMMEDIATE,
    (True, False, False): Opcode.SEND_FIRST,
    (True, False, True): Opcode.SEND_FIRST,
    (False, True, False): Opcode.SEND_LAST,
    (False, True, True): Opcode.SEND_LAST_IMMEDIATE,
}


class Prefix:
    """IP and UDP headers of one direction of a connection, by length of what follows, with the ICRC so far."""

    def __init__(self, source: str, destination: str, source_port: int) -> None:
        self._source, self._destination, self._port = source, destination, source_port
        self._made: dict[int, tuple[bytes, int]] = {}

    def of(self, length: int) -> tuple[bytes, int]:
        """The headers before `length` bytes (BTH to ICRC), and the ICRC's state after them."""
        known = self._made.get(length)
        if known is None:
            udp = struct.pack(">HHHH", self._port, roce.UDP_PORT, UDP_LENGTH + length, 0)
            ip = roce.ip_header(self._source, self._destination, UDP_LENGTH + length)
            known = ip + udp, zlib.crc32(roce.icrc_header(ip, udp))
            self._made[length] = known
        return known


class Writer:
    """Writes one queue pair's packets.

    Args:
        prefix: the headers of this direction.
        peer: the peer's queue pair number.
        mtu: bytes of data in a packet.
    """

    def __init__(self, prefix: Prefix, peer: int, mtu: int) -> None:
        self._prefix = prefix
        self._peer = peer
        self._mtu = mtu

    def request(self, row: memoryview, segment: Segment, index: int, memory: memoryview, *, ask: bool) -> int:
        """Write the `index`-th packet of a segment into `row`; returns its length."""
        request = segment.request
        packet = segment.offset + index
        begin = packet * self._mtu
        size = min(self._mtu, request.length - begin)
        first, last = packet == 0, packet == request.packets - 1
        is_write = request.destination is not None
        extension = b""
        if first or last:
            opcode = (_WRITES if is_write else _SENDS)[first, last, request.immediate is not None]
            if first and is_write:
                extension = _RETH.pack(request.destination, _KEY, request.length)
            if last and request.immediate is not None:
                extension += _WORD.pack(request.immediate)
        else:
            opcode = Opcode.WRITE_MIDDLE if is_write else Opcode.SEND_MIDDLE
        number = (request.first + packet) & 0xFFFFFF
        begin += request.source
        return self._write(
            row, opcode, number | (_ASK if ask else 0), extension, memory[begin : begin + size]
        )

    def reply(self, row: memoryview, reply: Reply) -> int:
        """Write an ACK or NAK; returns its length."""
        aeth = _AETH.pack(reply.syndrome << 24 | reply.msn)
        return self._write(row, Opcode.ACKNOWLEDGE, reply.psn, aeth, b"")

    def cnp(self, row: memoryview) -> int:
        """Write a congestion notification (annex A17.9.3: BECN set, 16 reserved bytes); returns its length."""
        return self._write(row, Opcode.CNP, 0, bytes(16), b"", flags=_BECN)

    def _write(
        self,
        row: memoryview,
        opcode: int,
        word: int,
        extension: bytes,
        data: bytes | memoryview,
        *,
        flags: int = 0,
    ) -> int:
        size = len(data)
        pad = -size & 3
        length = BTH_LENGTH + len(extension) + size + pad + ICRC_LENGTH
        headers, state = self._prefix.of(length)
        at = len(headers)
        row[:at] = headers
        _BTH.pack_into(row, at, opcode, _MIGRATED | pad << 4, 0xFFFF, _MASKED | self._peer, word)
        place = at + BTH_LENGTH
        if extension:
            row[place : place + len(extension)] = extension
            place += len(extension)
        row[place : place + size] = data
        place += size
        if pad:
            row[place : place + pad] = bytes(pad)
            place += pad
        _ICRC.pack_into(row, place, zlib.crc32(row[at:place], state))
        row[at + 4] = flags >> 24
        return place + ICRC_LENGTH


class Packet(NamedTuple):
    """What was read of a packet; `begin` and `end` bound its data in the row."""

    opcode: int
    qp: int
    psn: int
    ask: bool
    begin: int
    end: int
    address: int = 0
    total: int = 0
    immediate: int = 0
    syndrome: int = 0
    """Of an AETH."""


def check(row: memoryview, length: int, prefix: Prefix) -> bool:
    """Whether the ICRC at the end of a UDP payload is right; `prefix` is that of its direction."""
    # A copy for the masked bytes: the row itself is what was received.
    state = prefix.of(length)[1]
    state = zlib.crc32(row[:4], state)
    state = zlib.crc32(b"\xff", state)
    state = zlib.crc32(row[5 : length - ICRC_LENGTH], state)
    return bool(state == _ICRC.unpack_from(row, length - ICRC_LENGTH)[0])


_EXTENSION = [0] * 256
for _opcode in Opcode:
    _EXTENSION[_opcode] = _opcode.extension


def read(row: memoryview, length: int) -> Packet | None:
    """Read a UDP payload of `length` bytes; None where it is too short to be what its opcode says."""
    if length < BTH_LENGTH + ICRC_LENGTH:
        return None
    opcode, flags, _, qp, word = _BTH.unpack_from(row, 0)
    begin = BTH_LENGTH + _EXTENSION[opcode]
    end = length - ICRC_LENGTH - (flags >> 4 & 3)
    if end < begin:
        return None
    more: dict[str, Any] = {}
    if opcode in WITH_RETH:
        more["address"], _, more["total"] = _RETH.unpack_from(row, BTH_LENGTH)
    if opcode in WITH_IMMEDIATE:
        more["immediate"] = _WORD.unpack_from(row, begin - 4)[0]
    if opcode == Opcode.ACKNOWLEDGE:
        more["syndrome"] = row[BTH_LENGTH]
    return Packet(opcode, qp & 0xFFFFFF, word & 0xFFFFFF, bool(word & _ASK), begin, end, **more)
