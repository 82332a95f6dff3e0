"""What every queue pair did in a capture, reckoned from tshark's fields: the judge of qpd's own counting.

It shares no code with qpd (and must not), and has what a program in the kernel has not: all packets at once and memory
without bounds. So it remembers every sequence number instead of a window of them, and pairs queue pairs by looking at
whole conversations.

By itself it prints the reckoning of a capture: ``python tests/ebpf/reckoning.py FILE...``.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

_FIELDS = (
    "frame.number",
    "vxlan.vni",
    "ip.src",
    "ip.dst",
    "ip.dsfield.ecn",
    "infiniband.bth.opcode",
    "infiniband.bth.destqp",
    "infiniband.bth.psn",
    "infiniband.aeth.syndrome",
    "infiniband.reth.dmalen",
    "udp.length",
    "udp.payload",
)

_HALF, _WHOLE = 1 << 23, 1 << 24
"""Sequence numbers have 24 bits; of two, the newer is at most half the circle ahead."""

RECONNECTED = 1 << 16
"""A request so far from the newest one belongs to a new connection of the same number: more is never in flight."""


class Opcode(IntEnum):
    """BTH opcodes (InfiniBand Architecture Specification, volume 1, 9.2.1)."""

    READ_REQUEST = 0x0C
    READ_FIRST = 0x0D
    ATOMIC_ACKNOWLEDGE = 0x12
    UD_SEND = 0x64
    UD_SEND_IMMEDIATE = 0x65
    CNP = 0x81


@dataclass(frozen=True, order=True)
class Key:
    """A queue pair as packets name it: VNI (0 without VXLAN), destination host, destination QP."""

    vni: int
    dst: str
    qp: int


@dataclass(frozen=True)
class Packet:
    """One RoCEv2 packet. ``syndrome``: of its AETH; None: it has none. ``length``: of a READ request's data."""

    frame: int
    key: Key
    src: str
    ecn: int
    opcode: int
    psn: int
    syndrome: int | None
    length: int | None
    payload: int
    """Octets between the transport headers and the ICRC."""
    octets: bytes
    """The UDP payload, as far as it was captured."""

    @property
    def response(self) -> bool:
        """An answer: its sequence number is one of the requester's."""
        return Opcode.READ_FIRST <= self.opcode <= Opcode.ATOMIC_ACKNOWLEDGE

    @property
    def connected(self) -> bool:
        """Reliable or unreliable connection: its sequence numbers tell what is missing."""
        return self.opcode < Opcode.UD_SEND


@dataclass
class Reckoning:
    """The packets to one queue pair."""

    packets: int = 0
    retransmitted: int = 0
    """Requests sent again: all that a repetition brings (go-back-N), up to the newest that had passed before it."""
    out_of_order: int = 0
    """Requests that came behind later ones, and not as part of a repetition."""
    lost: int = 0
    """Requests that a pass along the numbers left out and that did not come late; in a repetition, too."""
    ecn_marked: int = 0
    cnps: int = 0
    naks: Counter[str] = field(default_factory=Counter)
    """By kind: ``sequence``, ``rnr``, ``remote``."""
    connections: int = 0
    """Of the same number, one after the other."""


def packets(capture: Path) -> list[Packet]:
    """All RoCEv2 packets of a capture, encapsulated ones as their inner packet. Raises CalledProcessError."""
    command = [
        "tshark",
        "-r",
        str(capture),
        "-d",
        "udp.port==4789,vxlan",
        "-Y",
        "infiniband.bth",
        "-T",
        "fields",
    ]
    command += [word for name in _FIELDS for word in ("-e", name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [_packet(line.split("\t")) for line in done.stdout.splitlines()]


def _packet(values: Sequence[str]) -> Packet:
    # Of an encapsulated packet tshark gives outer and inner values, the inner ones last.
    of = {name: value.split(",")[-1] for name, value in zip(_FIELDS, values, strict=True)}
    opcode = int(of["infiniband.bth.opcode"])
    syndrome, length = of["infiniband.aeth.syndrome"], of["infiniband.reth.dmalen"]
    headers = 8 + 12 + 4 + (4 if syndrome else 0) + (16 if length else 0)
    return Packet(
        frame=int(of["frame.number"]),
        key=Key(int(of["vxlan.vni"] or 0), of["ip.dst"], int(of["infiniband.bth.destqp"], 16)),
        src=of["ip.src"],
        ecn=int(of["ip.dsfield.ecn"]),
        opcode=opcode,
        psn=int(of["infiniband.bth.psn"]),
        syndrome=int(syndrome, 0) if syndrome else None,
        length=int(length) if length and opcode == Opcode.READ_REQUEST else None,
        payload=int(of["udp.length"]) - headers,
        octets=bytes.fromhex(of["udp.payload"]),
    )


def ahead(newer: int, older: int) -> int:
    """How far one sequence number is ahead of another; negative: behind."""
    return (newer - older + _HALF) % _WHOLE - _HALF


def connections(requests: Iterable[Packet]) -> Iterator[list[Packet]]:
    """The requests to one queue pair, connection by connection."""
    current: list[Packet] = []
    for packet in requests:
        if current and abs(ahead(packet.psn, current[-1].psn)) > RECONNECTED:
            yield current
            current = []
        current.append(packet)
    if current:
        yield current


def used(packet: Packet, mtu: int) -> range:
    """The sequence numbers that a request takes, first to last, not yet wrapped: a READ one for each answer."""
    count = 1 if packet.length is None else max(1, -(-packet.length // mtu))
    return range(packet.psn, packet.psn + count)


def path_mtu(all_packets: Iterable[Packet]) -> int:
    """The largest payload, which is the path MTU wherever a message is longer than a packet; 4096 where none is."""
    sizes = [packet.payload for packet in all_packets if packet.connected]
    mtu = max(sizes, default=4096)
    return mtu if mtu in (256, 512, 1024, 2048, 4096) else 4096


def reckon(all_packets: Sequence[Packet]) -> dict[Key, Reckoning]:
    """Every queue pair's packets."""
    by_key: dict[Key, list[Packet]] = defaultdict(list)
    for packet in all_packets:
        by_key[packet.key].append(packet)
    mtu = path_mtu(all_packets)
    return {key: _reckon(some, mtu) for key, some in by_key.items()}


def _reckon(some: Sequence[Packet], mtu: int) -> Reckoning:
    found = Reckoning(packets=len(some))
    found.ecn_marked = sum(packet.ecn == 3 for packet in some)
    found.cnps = sum(packet.opcode == Opcode.CNP for packet in some)
    for packet in some:
        kind = nak(packet.syndrome) if packet.response else None
        if kind:
            found.naks[kind] += 1
    requests = [packet for packet in some if packet.connected and not packet.response]
    for connection in connections(requests):
        found.connections += 1
        _follow(connection, mtu, found)
    return found


def _follow(connection: Sequence[Packet], mtu: int, found: Reckoning) -> None:
    """Tell apart what passes for the first time, late, again, or never.

    A sender passes along its numbers, and goes back to begin another pass (go-back-N). What a pass leaves out is lost,
    in a later pass as in the first, unless it comes late.
    """
    first = connection[0].psn
    numbers = [[ahead(psn % _WHOLE, first) for psn in used(packet, mtu)] for packet in connection]
    newest = numbers[0][0] - 1
    due = numbers[0][0]
    left_out: set[int] = set()
    """What this pass has not brought yet."""
    for position, (number, *_) in enumerate(numbers):
        last = numbers[position][-1]
        late: bool | None = False
        if number < due:
            late = _late(numbers[position:], due, left_out)
            if late:
                found.out_of_order += 1
                left_out.discard(number)
            elif late is not None:
                found.lost += len(left_out)
                left_out = set()
        elif number > due:
            left_out.update(range(due, number))
        if late is False:
            found.retransmitted += number <= newest
            due = last + 1
        newest = max(newest, last)
    found.lost += len(left_out)


def _late(rest: Sequence[Sequence[int]], due: int, left_out: set[int]) -> bool | None:
    """Whether the first of these only fills a gap: all that comes before the pass goes on are such fillings.

    None: it does not go on any more, so nobody can know.
    """
    filled: set[int] = set()
    for number, *_ in rest:
        if number >= due:
            return True
        if number not in left_out or number in filled:
            # Before the very first packet there is no pass that could have left it out.
            return number < 0
        filled.add(number)
    return None


def nak(syndrome: int | None) -> str | None:
    """What an AETH says is wrong (9.7.5.1.4, table 44); None: nothing."""
    if syndrome is None:
        return None
    kind, value = syndrome >> 5 & 3, syndrome & 31
    if kind == 1:
        return "rnr"
    if kind == 3:
        return "sequence" if value == 0 else "remote"
    return None


# --- Pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two queue pairs that speak with each other from ``begin`` (frame number) on; numbers are used again later."""

    asked: Key
    answered: Key
    begin: int


def pairs(all_packets: Sequence[Packet]) -> list[Pair]:
    """Which queue pair answers which, in order of time: by CM messages, and by what acknowledges what.

    Answers belong to the only connection of the other host that had sent all the numbers which they answer, each before
    its answer; a connection without answers has no pair.
    """
    found = {(pair.asked, pair.answered): pair for pair in reversed(answered(all_packets))}
    for pair in agreed(all_packets):
        if (pair.answered, pair.asked) not in found:
            found.setdefault((pair.asked, pair.answered), pair)
    return sorted(found.values(), key=lambda pair: pair.begin)


def peers(all_packets: Sequence[Packet]) -> dict[Key, set[Key]]:
    """Every queue pair's peers in the whole capture."""
    found: dict[Key, set[Key]] = defaultdict(set)
    for pair in pairs(all_packets):
        found[pair.asked].add(pair.answered)
        found[pair.answered].add(pair.asked)
    return dict(found)


def answered(all_packets: Sequence[Packet]) -> list[Pair]:
    mtu = path_mtu(all_packets)
    requests: dict[Key, list[Packet]] = defaultdict(list)
    responses: dict[Key, list[Packet]] = defaultdict(list)
    for packet in all_packets:
        if packet.connected:
            # A NAK names the number that is awaited, which need not have been sent yet.
            if not packet.response:
                requests[packet.key].append(packet)
            elif nak(packet.syndrome) is None:
                responses[packet.key].append(packet)
    asking = [
        (some[0], _first_frames(some, mtu)) for stream in requests.values() for some in connections(stream)
    ]
    fitting = [
        (some[0], [begin for begin, sent in asking if _explains(begin, sent, some)])
        for stream in responses.values()
        for some in connections(stream)
    ]
    claimed = Counter(begin.frame for _, begins in fitting for begin in begins)
    return [
        Pair(begins[0].key, answer.key, answer.frame)
        for answer, begins in fitting
        if len(begins) == 1 and claimed[begins[0].frame] == 1
    ]


def _first_frames(connection: Sequence[Packet], mtu: int) -> dict[int, int]:
    """Sequence number to the first frame that carried it."""
    frames: dict[int, int] = {}
    for packet in connection:
        for psn in used(packet, mtu):
            frames.setdefault(psn % _WHOLE, packet.frame)
    return frames


def _explains(begin: Packet, sent: Mapping[int, int], answers: Sequence[Packet]) -> bool:
    """Whether all these are answers to what was sent, between the same two hosts."""
    same = (begin.key.vni, begin.key.dst, begin.src) == (
        answers[0].key.vni,
        answers[0].src,
        answers[0].key.dst,
    )
    return same and all(sent.get(packet.psn, packet.frame) < packet.frame for packet in answers)


_CM = 0x07
"""Management class of the connection manager (12.6)."""
_REQ, _REP, _DREQ = 0x0010, 0x0013, 0x0015
_QPN = {_REQ: 32, _REP: 12, _DREQ: 8}
"""Where a message has a queue pair's number: its sender's own; in a DREQ that of the peer."""


def agreed(all_packets: Sequence[Packet]) -> list[Pair]:
    """Pairs as connection managers name them, from the octets: tshark does not dissect a MAD that was cut."""
    numbers: dict[tuple[int, str, int], int] = {}
    """VNI, host and its communication id to its QP."""
    found: dict[tuple[Key, Key], Pair] = {}
    for packet in all_packets:
        mad = packet.octets[20:]  # behind BTH and DETH
        attribute = int.from_bytes(mad[16:18], "big")
        if packet.opcode != Opcode.UD_SEND or packet.key.qp != 1 or mad[1:2] != bytes([_CM]):
            continue
        if attribute not in _QPN or len(mad) < 24 + _QPN[attribute] + 3:
            continue
        message, vni = mad[24:], packet.key.vni
        ours = (vni, packet.src, int.from_bytes(message[0:4], "big"))
        theirs = (vni, packet.key.dst, int.from_bytes(message[4:8], "big"))
        number = int.from_bytes(message[_QPN[attribute] : _QPN[attribute] + 3], "big")
        numbers[theirs if attribute == _DREQ else ours] = number
        if attribute != _REQ and ours in numbers and theirs in numbers:
            pair = (Key(vni, packet.src, numbers[ours]), Key(vni, packet.key.dst, numbers[theirs]))
            found.setdefault((min(pair), max(pair)), Pair(*pair, packet.frame))
    return list(found.values())


def _print(capture: Path, reckoned: Mapping[Key, Reckoning], known: Mapping[Key, set[Key]]) -> None:
    print(capture)
    for key, one in sorted(reckoned.items()):
        others = " ".join(f"{other.dst}:{other.qp:#x}" for other in sorted(known.get(key, ())))
        print(
            f"  {key.vni} {key.dst} {key.qp:#x}: packets {one.packets} retransmitted {one.retransmitted}"
            f" lost {one.lost} out_of_order {one.out_of_order} naks {dict(one.naks)} cnps {one.cnps}"
            f" ecn {one.ecn_marked} connections {one.connections} peers {others or '-'}"
        )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        frames = packets(Path(name))
        _print(Path(name), reckon(frames), peers(frames))
