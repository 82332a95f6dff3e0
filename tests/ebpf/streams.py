"""RoCEv2 packets by what they mean to a queue pair: requests and responses with their PSNs, in a line.

Two hosts: A is behind this node, B at the far end of the fabric. QP ``A_QP`` of A and ``B_QP`` of B are one pair.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from qpd.kernel import bpf
from qpd.model import Hook, QueuePairKey
from tests.ebpf.harness import Classifier

A, B = IPv4Address("10.7.0.11"), IPv4Address("10.7.0.22")
A_QP, B_QP = 0xA1, 0xB2
FROM_A, FROM_B = QueuePairKey(0, B, B_QP), QueuePairKey(0, A, A_QP)
"""Keys of what A sends to B, and B to A."""
MODULUS = 1 << 24
_ICRC = bytes(4)


@dataclass(frozen=True)
class Packet:
    """A packet's BTH and what follows it. ``size``: octets of payload."""

    opcode: int
    psn: int
    extra: bytes = b""
    size: int = 64
    asks: bool = False
    fecn: bool = False
    becn: bool = False
    tos: int = 2

    def build(self, key: QueuePairKey, src: IPv4Address) -> bytes:
        """The frame, to this QP."""
        qp = key.dest_qp | self.fecn << 31 | self.becn << 30
        bth = struct.pack("!BBHII", self.opcode, 0x40, 0xFFFF, qp, self.asks << 31 | self.psn % MODULUS)
        rest = bth + self.extra + bytes(self.size) + _ICRC
        udp = struct.pack("!HHHH", 49999, 4791, 8 + len(rest), 0) + rest
        head = struct.pack("!BBHHHBBH", 0x45, self.tos, 20 + len(udp), 0, 0x4000, 64, 17, 0)
        macs = bytes.fromhex("020000000002020000000001")
        return macs + b"\x08\x00" + head + src.packed + key.dst.packed + udp


# --- Requests ---------------------------------------------------------------------------------------------------------


def send(psn: int, *, asks: bool = False) -> Packet:
    """RC SEND ONLY."""
    return Packet(0x04, psn, asks=asks)


def sends(*psns: int) -> list[Packet]:
    """RC SEND ONLY, one for each PSN."""
    return [send(psn) for psn in psns]


def uc(*psns: int) -> list[Packet]:
    """UC SEND ONLY."""
    return [Packet(0x24, psn) for psn in psns]


def middle(psn: int, pmtu: int = 1024) -> Packet:
    """RC WRITE MIDDLE, which carries a whole path MTU."""
    return Packet(0x07, psn, size=pmtu)


def read(psn: int, octets: int) -> Packet:
    """RC READ REQUEST."""
    return Packet(0x0C, psn, struct.pack("!QII", 0, 0, octets), size=0)


def fetch_and_add(psn: int) -> Packet:
    """RC FETCH AND ADD."""
    return Packet(0x14, psn, bytes(28), size=0)


# --- Responses --------------------------------------------------------------------------------------------------------

ACK, RNR, SEQUENCE, REMOTE_ACCESS = 0x1F, 0x2C, 0x60, 0x62
"""AETH syndromes: an ACK without credits, and NAKs."""


def ack(psn: int, syndrome: int = ACK) -> Packet:
    """RC ACKNOWLEDGE."""
    return Packet(0x11, psn, struct.pack("!I", syndrome << 24), size=0)


def answers(first: int, last: int, pmtu: int = 1024) -> list[Packet]:
    """All responses of a READ whose PSNs are ``first`` to ``last``."""
    aeth = struct.pack("!I", ACK << 24)
    if first == last:
        return [Packet(0x10, first, aeth, size=pmtu)]
    between = [Packet(0x0E, psn, size=pmtu) for psn in range(first + 1, last)]
    return [Packet(0x0D, first, aeth, size=pmtu), *between, Packet(0x0F, last, aeth, size=pmtu)]


def atomic_ack(psn: int) -> Packet:
    """RC ATOMIC ACKNOWLEDGE."""
    return Packet(0x12, psn, struct.pack("!IQ", ACK << 24, 0), size=0)


def cnp() -> Packet:
    """Congestion notification: BECN set, 16 octets of nothing."""
    return Packet(0x81, 0, bytes(16), size=0, becn=True)


def without(packets: Iterable[Packet], *lost: int) -> list[Packet]:
    """The packets less those with these PSNs."""
    return [packet for packet in packets if packet.psn not in lost]


def shifted(packets: Iterable[Packet], offset: int) -> list[Packet]:
    """The same at other PSNs."""
    return [replace(packet, psn=(packet.psn + offset) % MODULUS) for packet in packets]


# --- Runs -------------------------------------------------------------------------------------------------------------


def leave(classifier: Classifier, *packets: Packet) -> None:
    """A sends these to B: they leave by an uplink."""
    for packet in packets:
        bpf.prog_test_run(classifier.programs[Hook.STEER], packet.build(FROM_A, A))


def arrive(classifier: Classifier, *packets: Packet) -> None:
    """B sends these to A: they arrive on an uplink."""
    for packet in packets:
        bpf.prog_test_run(classifier.programs[Hook.OBSERVE], packet.build(FROM_B, B))


COUNTERS = (
    "missing",
    "out_of_order",
    "duplicates",
    "retransmitted",
    "go_backs",
    "lost_behind",
    "naks_sequence",
    "naks_rnr",
    "naks_remote",
    "cnps",
    "ecn_marked",
    "fecn",
    "becn",
    "restarts",
)


def counted(classifier: Classifier, hook: Hook) -> dict[str, int]:
    """The counters of the pair's entry at this hook that are not zero."""
    leaves = hook is Hook.STEER
    record = classifier.maps.qp(FROM_A if leaves else FROM_B, "qps" if leaves else "arrivals")
    assert record is not None
    return {name: int(record[name]) for name in COUNTERS if record[name]}
