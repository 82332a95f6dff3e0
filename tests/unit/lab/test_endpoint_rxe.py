"""The responder beside a real one: it gets what Soft-RoCE got, and must answer what Soft-RoCE answered."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from qpd.lab.endpoint import frames, psn
from qpd.lab.endpoint.responder import Responder, Syndrome
from qpd.lab.roce import Opcode

CAPTURE = Path(__file__).parents[2] / "data/roce/rxe-clean-host.pcap"
MTU = 1024
JUMP = 10_000
"""PSNs: a queue pair number that is used again begins this far away, at least."""

Stream = tuple[bytes, bytes, int]
"""Source address, destination address, destination QP."""

Answer = tuple[int, int, int]
"""PSN, syndrome, MSN."""


def packets() -> list[tuple[bytes, bytes, frames.Packet, int]]:
    """Source, destination, packet and AETH of each RoCE packet over IPv4; the data is cut off by the capture."""
    raw = CAPTURE.read_bytes()
    at, found = 24, []
    while at < len(raw):
        (kept,) = struct.unpack_from("<I", raw, at + 8)
        frame = raw[at + 16 : at + 16 + kept]
        at += 16 + kept
        if frame[12:14] != b"\x08\x00" or frame[23] != 17 or frame[36:38] != b"\x12\xb7":
            continue
        length = int.from_bytes(frame[38:40], "big") - 8
        payload = frame[42:]
        packet = frames.read(memoryview(payload.ljust(length, b"\0")), length)
        assert packet is not None
        found.append((frame[26:30], frame[30:34], packet, int.from_bytes(payload[12:16], "big")))
    return found


@dataclass
class Connection:
    """A stream from one first PSN on: queue pair numbers are used again."""

    first: int
    responder: Responder
    answers: set[Answer] = field(default_factory=set)


def test_the_answers_are_those_of_soft_roce() -> None:
    """PSN, syndrome and MSN of every acknowledgement of writes and sends, and of nothing else.

    Where Soft-RoCE sent a NAK, something was lost behind the place of the capture: those are left out.
    """
    everything = packets()
    opcodes: dict[Stream, set[int]] = defaultdict(set)
    for source, destination, packet, _ in everything:
        opcodes[source, destination, packet.qp].add(packet.opcode)
    # READ and atomic requests use up PSNs, too, and this responder does not know them.
    known = {*range(Opcode.WRITE_ONLY_IMMEDIATE + 1), Opcode.ACKNOWLEDGE}
    plain = {stream for stream, seen in opcodes.items() if seen <= known}

    connections: dict[Stream, list[Connection]] = defaultdict(list)
    theirs: dict[tuple[bytes, bytes], set[Answer]] = defaultdict(set)
    for source, destination, packet, aeth in everything:
        stream = (source, destination, packet.qp)
        if packet.opcode == Opcode.ACKNOWLEDGE:
            theirs[source, destination].add((packet.psn, aeth >> 24, aeth & 0xFFFFFF))
        elif stream in plain:
            made = connections[stream]
            if not made or abs(psn.distance(packet.psn, made[-1].responder.expected % psn.MODULUS)) > JUMP:
                made.append(Connection(packet.psn, Responder(MTU, packet.psn, 1 << 62)))
                for _ in range(100):
                    made[-1].responder.post_receive(0, 1 << 31)
            answer(made[-1], packet)

    compared = 0
    for (source, destination, qp), made in connections.items():
        for one in made:
            # The way back has a QP number of its own; first PSNs are random, so that a PSN tells whose it is.
            length = one.responder.expected - one.first
            given = {
                said
                for said in theirs[destination, source]
                if 0 <= psn.distance(said[0], one.first) <= length
            }
            if any(syndrome == Syndrome.SEQUENCE_ERROR for _, syndrome, _ in given):
                continue
            assert one.answers == given, f"QP {qp} from PSN {one.first}"
            compared += len(given)
    assert compared > 250


def answer(connection: Connection, packet: frames.Packet) -> None:
    """Let the responder take a packet, and keep what it answers."""
    responder = connection.responder
    size = packet.end - packet.begin
    responder.receive(
        packet.opcode,
        packet.psn,
        size,
        ask=packet.ask,
        total=packet.total,
        immediate=packet.immediate,
    )
    if responder.reply is not None:
        connection.answers.add((responder.reply.psn, responder.reply.syndrome, responder.reply.msn))
        responder.reply = None
