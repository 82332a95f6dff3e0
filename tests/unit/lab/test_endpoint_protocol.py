"""The RC protocol over a wire that loses, repeats and reorders: delivered once and in order, or an error is told."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.lab.endpoint import psn
from qpd.lab.endpoint.config import Transport, rnr_seconds
from qpd.lab.endpoint.requester import Request, Requester
from qpd.lab.endpoint.responder import Reply, Responder, Syndrome
from qpd.lab.roce import Opcode

FLIGHT = 0.001
"""Seconds that a packet needs."""

_MIDDLE, _FIRST, _LAST, _ONLY = (
    Opcode.WRITE_MIDDLE,
    Opcode.WRITE_FIRST,
    Opcode.WRITE_LAST_IMMEDIATE,
    Opcode.WRITE_ONLY_IMMEDIATE,
)


@dataclass
class Pair:
    """A requester and a responder with a wire between them; memory is real, so that order and content are seen."""

    transport: Transport
    fates: list[list[int]]
    """What becomes of each transmission in turn: one delay (in flights) for each copy that arrives; none: lost."""
    first_psn: int = 0
    size: int = 1 << 16
    now: float = 0.0
    scheduled: int = 0
    """Copies of packets put on the wire: those that arrive at one time do so in this order."""
    order: list[int] = field(default_factory=list)
    """Tags of requests as they were completed."""
    delivered: list[int] = field(default_factory=list)
    """Immediate data as it arrived."""

    def __post_init__(self) -> None:
        self.requester = Requester(self.transport, self.first_psn)
        self.responder = Responder(self.transport.mtu, self.first_psn, self.size, self.transport.rnr_timer)
        self.memory = bytearray(self.size)
        self.source = bytes((7 * i + i // 251) & 0xFF for i in range(self.size))
        self._wire: list[tuple[float, int, object]] = []
        self._count = 0

    def _put(self, what: object) -> None:
        fate = self.fates[self._count] if self._count < len(self.fates) else [1]
        for delay in fate:
            self.scheduled += 1
            heapq.heappush(self._wire, (self.now + delay * FLIGHT, self.scheduled, what))
        self._count += 1

    def post(self, length: int, place: int, tag: int) -> None:
        self.responder.post_receive(0, 0)
        self.requester.post(Request(place, length, place, immediate=tag, tag=tag))

    def run(self, limit: int = 20000) -> None:
        """Until all is acknowledged, or the queue pair has failed."""
        for _ in range(limit):
            self._send()
            if self.requester.error is not None or (self.requester.idle and not self._wire):
                return
            times = [entry[0] for entry in self._wire[:1]]
            deadline = self.requester.deadline(self.now)
            if deadline is not None:
                assert deadline > self.now, "what is due now has been done"
                times.append(deadline)
            assert times, "nothing is on its way, nothing is waited for, and yet not all is acknowledged"
            self.now = max(self.now, min(times))
            while self._wire and self._wire[0][0] <= self.now:
                self._deliver(heapq.heappop(self._wire)[2])
            self.requester.on_time(self.now)
        pytest.fail("no end")

    def _send(self) -> None:
        for segment in self.requester.transmit(self.now, 1000):
            request = segment.request
            for index in range(segment.offset, segment.offset + segment.count):
                self._put((request, index))

    def _deliver(self, what: object) -> None:
        if isinstance(what, Reply):
            self._answer(what)
            return
        assert isinstance(what, tuple)
        request, index = what
        assert isinstance(request, Request)
        mtu = self.transport.mtu
        first, last = index == 0, index == request.packets - 1
        opcode = {(True, True): _ONLY, (True, False): _FIRST, (False, True): _LAST}.get(
            (first, last), _MIDDLE
        )
        size = min(mtu, request.length - index * mtu)
        place = self.responder.receive(
            opcode,
            (request.first + index) % psn.MODULUS,
            size,
            ask=self.requester.asks(request.first + index, last=last),
            address=request.destination or 0,
            total=request.length,
            immediate=request.immediate or 0,
        )
        if place is not None:
            begin = request.source + index * mtu
            self.memory[place : place + size] = self.source[begin : begin + size]
        self.delivered += [one.immediate for one in self.responder.arrived if one.immediate is not None]
        self.responder.arrived.clear()
        if self.responder.reply is not None:
            self._put(self.responder.reply)
            self.responder.reply = None

    def _answer(self, reply: Reply) -> None:
        kind = reply.syndrome >> 5
        if reply.is_ack:
            done = self.requester.acknowledge(reply.psn, self.now)
        elif kind == Syndrome.RNR_NAK >> 5:
            done = self.requester.not_ready(reply.psn, reply.syndrome & 31, self.now)
        elif reply.syndrome == Syndrome.SEQUENCE_ERROR:
            done = self.requester.sequence_error(reply.psn, self.now)
        else:
            self.requester.refused(f"refused {reply.syndrome:#x}")
            done = []
        self.order += [request.tag for request in done]


FATE: st.SearchStrategy[list[int]] = st.one_of(
    st.just([1]),
    st.just([1]),
    st.just([]),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
)


@settings(deadline=None, max_examples=150)
@given(
    fates=st.lists(FATE, max_size=120),
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    window=st.integers(1, 20),
    ack_every=st.integers(1, 8),
    first_psn=st.one_of(st.just(0), st.integers(psn.MODULUS - 20, psn.MODULUS - 1)),
    retries=st.integers(0, 7),
)
def test_exactly_once_in_order_or_an_error(  # noqa: PLR0917 - one argument a strategy
    fates: list[list[int]],
    lengths: list[int],
    window: int,
    ack_every: int,
    first_psn: int,
    retries: int,
) -> None:
    """Whatever the wire does: what is completed was delivered, nothing twice, nothing out of order, all of the data."""
    transport = Transport(mtu=256, window=window, ack_every=ack_every, timeout=14, retry_count=retries)
    pair = Pair(transport, fates, first_psn)
    place = 0
    places = []
    for tag, length in enumerate(lengths):
        pair.post(length, place, tag)
        places.append((place, length))
        place += length
    pair.run()
    count = len(pair.delivered)
    assert pair.delivered == list(range(count)), "each once, in order"
    assert pair.order == list(range(len(pair.order)))
    assert len(pair.order) <= count, "nothing is completed that was not delivered"
    for begin, length in places[:count]:
        assert pair.memory[begin : begin + length] == pair.source[begin : begin + length]
    if pair.requester.error is None:
        assert count == len(lengths) == len(pair.order)
        assert pair.responder.counters.bytes == sum(lengths)
    else:
        assert pair.requester.error == "transport retry counter exceeded"
        assert pair.requester.counters.timeouts + pair.requester.counters.naks > retries


def test_a_dead_wire_kills_the_queue_pair_after_the_retries() -> None:
    transport = Transport(mtu=256, timeout=14, retry_count=7)
    pair = Pair(transport, [[]] * 1000)
    pair.post(1000, 0, 0)
    pair.run()
    assert pair.requester.error == "transport retry counter exceeded"
    assert pair.requester.counters.timeouts == 8
    assert transport.ack_timeout is not None
    assert pair.now == pytest.approx(8 * transport.ack_timeout)
    assert pair.requester.counters.stall == pytest.approx(pair.now)


def test_one_lost_packet_costs_one_nak_and_what_was_behind_it() -> None:
    """Go-back-N: the fourth of twelve packets is lost; the other eight behind it go twice."""
    pair = Pair(Transport(mtu=256, timeout=20), [[1], [1], [1], []])
    pair.post(12 * 256, 0, 0)
    pair.run()
    assert pair.requester.counters.naks == 1
    assert pair.requester.counters.timeouts == 0
    assert pair.requester.counters.retransmitted == 9
    assert pair.responder.counters.out_of_sequence == 8
    assert pair.responder.counters.naks == 1
    assert pair.delivered == [0]


def test_a_lost_ack_is_made_good_by_the_next() -> None:
    """ACKs are cumulative: the first message's ACK is lost and nothing is sent again."""
    pair = Pair(Transport(mtu=256, timeout=20), [[1], [1], []])
    pair.post(256, 0, 0)
    pair.post(256, 256, 1)
    pair.run()
    assert pair.order == [0, 1]
    assert pair.requester.counters.retransmitted == 0


def test_the_rate_is_kept() -> None:
    """A megabyte at 8 Mbit/s takes a second, but for the first burst."""
    pair = Pair(Transport(mtu=1024, rate=8e6, timeout=20, window=1000), [], size=1 << 20)
    pair.post(1 << 20, 0, 0)
    pair.run()
    assert pair.now == pytest.approx((1 << 20) * 8 / 8e6, abs=0.05)


def test_receiver_not_ready_is_tried_again_after_its_time() -> None:
    pair = Pair(Transport(mtu=256, rnr_timer=16), [])
    pair.requester.post(Request(0, 600, 0, immediate=1))
    pair._send()
    for _ in range(3):
        pair._deliver(pair._wire.pop(0)[2])
    pair.now = FLIGHT
    naks = [entry[2] for entry in pair._wire]
    assert [nak.syndrome for nak in naks if isinstance(nak, Reply)] == [Syndrome.RNR_NAK | 16]
    pair._deliver(naks[0])
    pair._wire.clear()
    assert not pair.requester.ready(pair.now)
    assert pair.requester.deadline(pair.now) == pytest.approx(FLIGHT + rnr_seconds(16))
    pair.responder.post_receive(0, 0)
    pair.run()
    assert pair.delivered == [1]
    assert pair.requester.counters.rnr_naks == 1


def test_receiver_never_ready_ends_a_finite_count() -> None:
    pair = Pair(Transport(mtu=256, rnr_retry=2), [])
    pair.requester.post(Request(0, 100, 0, immediate=1))
    pair.run()
    assert pair.requester.error == "receiver not ready: retries exceeded"
    assert pair.requester.counters.rnr_naks == 3


@pytest.mark.parametrize(("destination", "length"), [((1 << 16) - 10, 100), (1 << 16, 1), (1 << 40, 5000)])
def test_writing_outside_the_memory_ends_the_queue_pair(destination: int, length: int) -> None:
    pair = Pair(Transport(mtu=256), [])
    pair.responder.post_receive(0, 0)
    pair.requester.post(Request(0, length, destination, immediate=1))
    pair.run()
    assert pair.requester.error == f"refused {int(Syndrome.REMOTE_ACCESS_ERROR):#x}"
    assert not any(pair.memory)


def test_opcodes_out_of_place_are_refused() -> None:
    responder = Responder(256, 0, 1000)
    assert responder.receive(Opcode.WRITE_MIDDLE, 0, 256, ask=False) is None
    assert responder.reply == Reply(0, Syndrome.INVALID_REQUEST, 0)
    responder = Responder(256, 0, 1000)
    assert responder.receive(Opcode.WRITE_FIRST, 0, 256, ask=False, total=512) == 0
    assert responder.receive(Opcode.WRITE_FIRST, 1, 256, ask=False, total=512) is None
    assert responder.reply == Reply(1, Syndrome.INVALID_REQUEST, 0)


def test_sends_go_to_the_posted_receives_in_order() -> None:
    responder = Responder(256, 5, 1000)
    responder.post_receive(100, 300)
    responder.post_receive(500, 300)
    assert responder.receive(Opcode.SEND_FIRST, 5, 256, ask=False) == 100
    assert responder.receive(Opcode.SEND_LAST, 6, 10, ask=True) == 356
    assert responder.reply == Reply(6, Syndrome.ACK, 1)
    assert responder.receive(Opcode.SEND_ONLY_IMMEDIATE, 7, 20, ask=False, immediate=9) == 500
    assert [(a.address, a.length, a.immediate) for a in responder.arrived] == [(100, 266, None), (500, 20, 9)]


@given(st.integers(0, psn.MODULUS - 1), st.integers(-(psn.MODULUS // 2), psn.MODULUS // 2 - 1))
def test_serial_arithmetic(a: int, step: int) -> None:
    assert psn.distance((a + step) % psn.MODULUS, a) == step
    assert psn.unfold((a + step) % psn.MODULUS, a + 5 * psn.MODULUS) == a + step + 5 * psn.MODULUS
