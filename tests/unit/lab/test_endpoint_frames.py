"""Frames of the emulated endpoint: what is written is read, and Scapy finds the headers and the ICRC right."""

from __future__ import annotations

import struct
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.lab import roce
from qpd.lab.endpoint import frames
from qpd.lab.endpoint.connections import (
    BINS,
    FIRST_PORT,
    Numbering,
    SourcePorts,
    check,
    connect,
    numbered,
)
from qpd.lab.endpoint.requester import Request, Segment
from qpd.lab.endpoint.responder import Reply, Syndrome
from qpd.lab.errors import LabError
from qpd.lab.roce import Opcode

V4 = ("172.16.100.11", "172.16.100.21")
V6 = ("fd00:100::11", "fd00:100::21")
MTU = 256


def written(request: Request, index: int, addresses: tuple[str, str] = V4, *, ask: bool = False) -> bytes:
    request.packets = max(1, -(-request.length // MTU))
    prefix = frames.Prefix(*addresses, 50000)
    row = memoryview(bytearray(1000))
    memory = memoryview(bytes(i & 0xFF for i in range(4096)))
    segment = Segment(request, index, 1)
    return bytes(row[: frames.Writer(prefix, 0x123456, MTU).request(row, segment, 0, memory, ask=ask)])


def headers(addresses: tuple[str, str]) -> int:
    return 48 if ":" in addresses[0] else 28


@settings(deadline=None)
@given(
    addresses=st.sampled_from([V4, V6]),
    length=st.integers(0, 1000),
    destination=st.one_of(st.none(), st.integers(0, 1 << 40)),
    immediate=st.one_of(st.none(), st.integers(0, 0xFFFFFFFF)),
    first=st.integers(0, 1 << 26),
    data=st.data(),
)
def test_what_is_written_is_read(  # noqa: PLR0917 - one argument a strategy
    addresses: tuple[str, str],
    length: int,
    destination: int | None,
    immediate: int | None,
    first: int,
    data: st.DataObject,
) -> None:
    request = Request(5, length, destination, immediate)
    request.first = first
    packets = max(1, -(-length // MTU))
    index = data.draw(st.integers(0, packets - 1))
    frame = written(request, index, addresses, ask=True)
    payload = memoryview(frame)[headers(addresses) :]
    packet = frames.read(payload, len(payload))
    assert packet is not None
    assert (packet.qp, packet.psn, packet.ask) == (0x123456, (first + index) % (1 << 24), True)
    body = bytes(i & 0xFF for i in range(4096))[5 : 5 + length]
    assert bytes(payload[packet.begin : packet.end]) == body[index * MTU : (index + 1) * MTU]
    if index == 0 and destination is not None:
        assert (packet.address, packet.total) == (destination, length)
    if index == packets - 1 and immediate is not None:
        assert packet.immediate == immediate
    assert frames.check(payload, len(payload), frames.Prefix(*addresses, 50000))
    # The ICRC again, by the definition and not by the prefix.
    at = headers(addresses) - 8
    assert frame[-4:] == roce.icrc(frame[:at], frame[at : at + 8], frame[at + 8 : -4])


@given(st.integers(0, 10_000))
def test_a_changed_bit_is_noticed(which: int) -> None:
    frame = bytearray(written(Request(0, 300, 0), 1))
    payload = frame[28:]
    bit = which % (len(payload) * 8)
    payload[bit // 8] ^= 1 << bit % 8
    # The reserved byte of the BTH is left out of the ICRC.
    assert frames.check(memoryview(payload), len(payload), frames.Prefix(*V4, 50000)) == (bit // 8 == 4)


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_told_too_short(data: bytes) -> None:
    packet = frames.read(memoryview(data), len(data))
    assert packet is None or 12 <= packet.begin <= packet.end <= len(data) - 4


@pytest.mark.parametrize("addresses", [V4, V6])
def test_scapy_agrees(addresses: tuple[str, str]) -> None:
    from scapy.contrib.roce import AETH, BTH
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6

    network = IPv6 if ":" in addresses[0] else IP
    prefix = frames.Prefix(*addresses, 50000)
    writer = frames.Writer(prefix, 0x654321, MTU)
    row = memoryview(bytearray(1000))
    ack = bytes(row[: writer.reply(row, Reply(77, Syndrome.ACK, 3))])
    cnp = bytes(row[: writer.cnp(row)])
    cases = [written(Request(0, 601, 64, 7), index, addresses) for index in range(3)] + [ack, cnp]
    codes = [
        Opcode.WRITE_FIRST,
        Opcode.WRITE_MIDDLE,
        Opcode.WRITE_LAST_IMMEDIATE,
        Opcode.ACKNOWLEDGE,
        Opcode.CNP,
    ]
    for frame, opcode in zip(cases, codes, strict=True):
        packet = network(frame)
        assert packet[BTH].opcode == opcode
        assert packet[UDP].len == len(frame) - headers(addresses) + 8
        assert packet[BTH].compute_icrc(frame[-4:])[:4] == frame[-4:]
    assert network(cases[2])[BTH].padcount == 3
    acknowledgement = network(ack)
    assert (acknowledgement[AETH].syndrome, acknowledgement[AETH].msn) == (31, 3)
    assert (network(cnp)[BTH].becn, network(cnp)[BTH].dqpn) == (1, 0x654321)
    assert bytes(network(cnp)[BTH])[12:28] == bytes(16)


def test_ports_by_policy() -> None:
    by_linux = connect("a", "b", 50, seed=3)
    for one in by_linux:
        assert one.source.source_port == one.destination.source_port
        assert one.source.source_port == roce.linux_source_port(one.source.qp, one.destination.qp)
    assert {c.source.source_port for c in connect("a", "b", 50, source_ports="fixed")} == {49152}
    assert len({c.source.source_port for c in connect("a", "b", 50, source_ports="random")}) > 40
    bins = [
        (c.source.source_port - FIRST_PORT) * BINS // 0x4000
        for c in connect("a", "b", 50, source_ports="bins")
    ]
    assert bins == [index % 4 for index in range(50)]


def test_numbers_are_repeatable_and_never_twice() -> None:
    def all_of(seed: int) -> list[object]:
        numbering = Numbering(seed, SourcePorts.RANDOM)
        return [*numbering.connect("a", "b", 900), *numbering.connect("c", "a", 900)]

    assert all_of(1) == all_of(1)
    assert all_of(1) != all_of(2)
    numbering = Numbering(1)
    made = [*numbering.connect("a", "b", 900), *numbering.connect("c", "a", 900)]
    check(made)
    assert max(Counter((c.source.host, c.source.qp) for c in made).values()) == 1
    with pytest.raises(LabError, match="QP 0x7 of a is in two connections"):
        check(numbered("a", "b", [(7, 8), (7, 9)]))


def test_a_header_of_rfc_length() -> None:
    """The UDP length counts from the UDP header to the ICRC."""
    frame = written(Request(0, 10, 0), 0)
    assert struct.unpack_from(">H", frame, 24)[0] == len(frame) - 20
    assert struct.unpack_from(">H", frame, 2)[0] == len(frame)
