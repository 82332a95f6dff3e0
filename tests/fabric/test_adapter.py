"""Two adapters with real sockets in one namespace: marks, receivers that are not ready, packets that are wrong."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from qpd.lab import mmsg, namespaces, roce
from qpd.lab.endpoint.adapter import Adapter, QueuePair
from qpd.lab.endpoint.config import Transport
from qpd.lab.endpoint.connections import connect
from qpd.lab.endpoint.requester import Request

PATIENT = 60.0
TRANSPORT = Transport(mtu=1024, timeout=19)
ADDRESSES = {4: ("127.0.0.1", "127.0.0.2"), 6: ("fd00::1", "fd00::2")}


@dataclass
class Pair:
    """An adapter that sends, and one that receives, with a queue pair between them."""

    sender: Adapter
    receiver: Adapter
    near: QueuePair
    far: QueuePair
    target: np.ndarray[tuple[int], np.dtype[np.uint8]]

    def run(self, reached: Callable[[], object]) -> None:
        limit = time.monotonic() + PATIENT
        while not reached():
            assert time.monotonic() < limit, (self.near.requester.counters, self.far.responder.counters)
            self.sender.step(0.001)
            self.receiver.step(0.001)


@pytest.fixture
def place() -> Iterator[str]:
    name = f"qpdt-{os.getpid()}-adapters"
    namespaces.add(name)
    for address in ADDRESSES[6]:
        namespaces.run(["ip", "-n", name, "address", "add", f"{address}/128", "dev", "lo", "nodad"])
    try:
        yield name
    finally:
        namespaces.delete(name)


def pair(place: str, transport: Transport, family: int = 4) -> Pair:
    source = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)
    target = np.zeros(1 << 22, dtype=np.uint8)
    here, there = ADDRESSES[family]
    (connection,) = connect("a", "b", seed=5)
    sender = namespaces.inside(place, partial(Adapter, here, source, transport))
    receiver = namespaces.inside(place, partial(Adapter, there, target, transport))
    near = sender.add(connection.source, connection.destination, there)
    far = receiver.add(connection.destination, connection.source, here)
    return Pair(sender, receiver, near, far, target)


@pytest.fixture
def closing() -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for one in made:
        one.sender.close()
        one.receiver.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_megabyte_arrives_and_every_icrc_is_checked(place: str, closing: list[Pair], family: int) -> None:
    both = pair(place, TRANSPORT, family)
    closing.append(both)
    both.sender.post(both.near, Request(64, 1_000_001, 3))
    both.run(lambda: both.sender.sent)
    expected = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)[64 : 64 + 1_000_001]
    assert np.array_equal(both.target[3 : 3 + 1_000_001], expected)
    assert not both.target[:3].any()
    assert not both.target[3 + 1_000_001 :].any()
    assert not any(vars(both.receiver.tell()).values())
    assert both.far.responder.counters.bytes == 1_000_001


@pytest.mark.parametrize("family", [4, 6])
def test_marked_packets_are_notified_and_the_sender_slows_down(
    place: str, closing: list[Pair], family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Congestion experienced in every packet, as a switch would set it: the ICRC leaves it out."""
    monkeypatch.setattr(roce, "TRAFFIC_CLASS", roce.TRAFFIC_CLASS | 0b11)
    both = pair(place, replace(TRANSPORT, dcqcn=True, rate=200e6), family)
    closing.append(both)
    both.sender.post(both.near, Request(0, 1 << 19, 0))
    both.run(lambda: both.sender.sent)
    assert both.near.requester.counters.cnps > 0
    assert both.near.requester.reaction is not None
    assert both.near.requester.reaction.rate(time.monotonic()) <= 200e6


def test_a_receiver_that_is_not_ready_is_asked_again(place: str, closing: list[Pair]) -> None:
    both = pair(place, TRANSPORT)
    closing.append(both)
    both.sender.post(both.near, Request(0, 3000))
    both.run(lambda: both.near.requester.counters.rnr_naks >= 2)
    assert not both.sender.sent
    both.far.responder.post_receive(100, 5000)
    both.run(lambda: both.sender.sent)
    (_, arrived), *more = both.receiver.arrived
    assert (arrived.address, arrived.length, arrived.immediate, more) == (100, 3000, None, [])


def test_a_write_out_of_bounds_fails_the_queue_pair(place: str, closing: list[Pair]) -> None:
    both = pair(place, TRANSPORT)
    closing.append(both)
    both.sender.post(both.near, Request(0, 10_000, len(both.target) - 5000))
    both.run(lambda: both.sender.failed)
    assert both.sender.failed == [both.near]
    assert both.near.requester.error == "remote access error"
    assert not both.target.any()


def test_a_failed_queue_pair_answers_nobody(place: str, closing: list[Pair]) -> None:
    """So the peer's requests run out of retries."""
    both = pair(place, replace(TRANSPORT, timeout=10, retry_count=2))
    closing.append(both)
    both.far.requester.refused("remote operation error")
    both.sender.post(both.near, Request(0, 100, 0))
    both.run(lambda: both.sender.failed)
    assert both.near.requester.error == "transport retry counter exceeded"
    assert both.near.requester.counters.timeouts == 3
    assert not both.target.any()


def test_what_is_no_packet_of_ours_is_counted_and_dropped(place: str, closing: list[Pair]) -> None:
    both = pair(place, TRANSPORT)
    closing.append(both)
    frame = roce.bth(roce.Opcode.WRITE_ONLY, both.far.own.qp, 0) + bytes(16 + 8)
    stranger = roce.bth(roce.Opcode.ACKNOWLEDGE, 0x42, 0) + bytes(8)
    with namespaces.inside(place, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)) as plain:
        for payload in (frame, stranger, b"short"):
            plain.sendto(payload, (ADDRESSES[4][1], roce.UDP_PORT))
    counters = both.receiver.counters
    both.run(lambda: counters.bad_icrc + counters.unknown_qp + counters.malformed == 3)
    assert (counters.bad_icrc, counters.unknown_qp, counters.malformed) == (1, 1, 1)
    assert not both.target.any()


def test_a_host_that_is_cut_off_loses_and_goes_on(place: str, closing: list[Pair]) -> None:
    both = pair(place, replace(TRANSPORT, timeout=12))
    closing.append(both)
    namespaces.run(["ip", "-n", place, "link", "set", "lo", "down"])
    both.sender.post(both.near, Request(0, 3000, 0))
    both.run(lambda: both.near.requester.counters.timeouts >= 1)
    assert both.sender.counters.unsendable + both.near.requester.counters.retransmitted > 0
    namespaces.run(["ip", "-n", place, "link", "set", "lo", "up"])
    both.run(lambda: both.sender.sent or both.sender.failed)
    assert both.sender.sent


def test_rows_of_all_lengths_go_to_their_own_addresses(place: str) -> None:
    """One call for packets of different lengths and destinations."""

    def sockets() -> list[socket.socket]:
        made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for index, one in enumerate(made):
            one.bind(("127.0.0.1", 7000 + index))
        return made

    out, *ins = namespaces.inside(place, sockets)
    outbox = mmsg.Outbox(8, 100)
    names = [
        ctypes.create_string_buffer(raw := mmsg.sockaddr("127.0.0.1", 7001 + index), len(raw))
        for index in range(2)
    ]
    for index in range(8):
        outbox.rows[outbox.used][:] = bytes([index]) * 100
        outbox.add(10 + index, names[index % 2])
    assert outbox.full
    assert outbox.send(out.fileno()) == 0
    assert outbox.used == 0
    got = [[one.recv(200) for _ in range(4)] for one in ins]
    assert got == [[bytes([i]) * (10 + i) for i in range(first, 8, 2)] for first in range(2)]
    for one in (out, *ins):
        one.close()
