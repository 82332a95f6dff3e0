"""The event ring: every record once and in order, across the wrap, in bounded portions, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
import uvloop

from qpd.kernel import bpf, layout
from qpd.kernel.ring import BUDGET, EventKind, Ring, RingEvent
from qpd.kernel.table import LayoutMismatchError
from qpd.model import QueuePairKey
from tests.conftest import BPFFS, PREFIX
from tests.ebpf.other_program import instruction

RECORD = 8 + layout.EVENT_QP.itemsize
CAPACITY = layout.EVENTS_BYTES // RECORD
MARK = 8
"""Offset of ``mark`` in struct __sk_buff: what a run says about itself."""


def producer(ring: int, kind: int, size: int) -> int:
    """A program that puts {kind, path = skb->mark, time = 7, vni = 9, dest_qp = mark, dst = ::} into the ring."""
    start = -layout.EVENT_QP.itemsize
    zeros = [instruction(0x7A, dst=10, offset=offset) for offset in range(start, 0, 8)]
    return bpf.prog_load(
        [
            *zeros,
            instruction(0x61, dst=6, src=1, offset=MARK),
            instruction(0x62, dst=10, offset=start, immediate=kind),
            instruction(0x63, dst=10, src=6, offset=start + 4),
            instruction(0x7A, dst=10, offset=start + 8, immediate=7),
            instruction(0x62, dst=10, offset=start + 16, immediate=9),
            instruction(0x63, dst=10, src=6, offset=start + 20),
            instruction(0x18, dst=1, src=1, immediate=ring),
            0,
            instruction(0xBF, dst=2, src=10),
            instruction(0x07, dst=2, immediate=start),
            instruction(0xB7, dst=3, immediate=size),
            instruction(0xB7, dst=4),
            instruction(0x85, immediate=130),  # bpf_ringbuf_output
            instruction(0x95),
        ]
    )


class Producer:
    """A pinned ring and a program that fills it."""

    def __init__(self, pin: Path) -> None:
        self.pin = pin
        self.map = bpf.map_create(bpf.MapType.RINGBUF, 0, 0, layout.EVENTS_BYTES, name="events")
        bpf.obj_pin(self.map, pin)

    def put(
        self, mark: int, *, kind: int = EventKind.QP_NEW, size: int = layout.EVENT_QP.itemsize, times: int = 1
    ) -> int:
        """Run the program; what bpf_ringbuf_output gave back the last time (0: done)."""
        program = producer(self.map, kind, size)
        context = bytearray(192)
        struct.pack_into("=I", context, MARK, mark)
        result = bpf.prog_test_run(program, bytes(64), ctx_in=bytes(context), repeat=times)
        os.close(program)
        return result.retval

    def close(self) -> None:
        os.close(self.map)
        self.pin.unlink()


@pytest.fixture
def produced() -> Iterator[Producer]:
    producing = Producer(BPFFS / f"{PREFIX}-ring")
    yield producing
    producing.close()


@pytest.fixture
def ring(produced: Producer) -> Iterator[Ring]:
    opened = Ring(produced.pin)
    yield opened
    opened.close()


def test_a_record_says_what_the_kernel_put_there(produced: Producer, ring: Ring) -> None:
    assert ring.read() == []
    produced.put(3)
    (event,) = ring.read()
    assert (event.kind, event.path, event.kernel_ns) == (EventKind.QP_NEW, 3, 7)
    assert event.qp == QueuePairKey(9, ip_address("::"), 3)
    assert ring.read() == []


def test_every_record_once_and_in_order_across_the_wrap(produced: Producer, ring: Ring) -> None:
    expected, found = [], []
    for number in range(60):
        produced.put(number, times=400)
        expected += [number] * 400
        while events := ring.read():
            found += [event.path for event in events]
    assert len(expected) > 2 * CAPACITY
    assert found == expected


def test_a_burst_is_read_in_portions(produced: Producer, ring: Ring) -> None:
    produced.put(1, times=BUDGET + 10)
    assert [len(ring.read()), len(ring.read()), len(ring.read())] == [BUDGET, 10, 0]
    produced.put(2, times=3)
    assert len(ring.read(budget=2)) == 2


def test_a_full_ring_drops_and_goes_on(produced: Producer, ring: Ring) -> None:
    assert produced.put(1, times=CAPACITY + 100) != 0
    assert sum(len(events) for events in iter(ring.read, [])) == pytest.approx(CAPACITY, abs=1)
    assert produced.put(2) == 0
    assert [event.path for event in ring.read()] == [2]


def test_what_was_not_read_waits_for_the_next_daemon(produced: Producer) -> None:
    first = Ring(produced.pin)
    produced.put(1, times=5)
    assert len(first.read(budget=2)) == 2
    first.close()
    first.close()
    second = Ring(produced.pin)
    assert len(second.read()) == 3
    second.close()


def test_a_path_state_keeps_its_own_content(produced: Producer, ring: Ring) -> None:
    produced.put(4, kind=EventKind.PATH_STATE)
    (event,) = ring.read()
    assert (event.kind, event.path, event.qp) == (EventKind.PATH_STATE, 4, None)
    assert event.content == layout.pack_qp_key(QueuePairKey(9, ip_address("::"), 4))


def test_unknown_kinds_and_short_records_are_counted_and_passed_over(produced: Producer, ring: Ring) -> None:
    produced.put(1, kind=99)
    produced.put(2, size=8)
    produced.put(3, size=layout.EVENT.itemsize)
    produced.put(4)
    assert [event.path for event in ring.read()] == [4]
    assert ring.unknown == 3


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_records_wake_the_event_loop(
    produced: Producer, ring: Ring, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    loop = new_loop()
    found: list[RingEvent] = []
    count = BUDGET + 100

    async def wait() -> None:
        arrived = asyncio.Event()
        portions: list[int] = []

        def handle(events: list[RingEvent]) -> None:
            portions.append(len(events))
            found.extend(events)
            if len(found) >= count:
                arrived.set()

        ring.watch(loop, handle)
        await asyncio.sleep(0)
        produced.put(5, times=count)
        await asyncio.wait_for(arrived.wait(), 10)
        ring.unwatch(loop)
        assert max(portions) <= BUDGET

    try:
        loop.run_until_complete(wait())
    finally:
        loop.close()
    assert len(found) == count


def test_another_kind_of_map_is_refused() -> None:
    pin = BPFFS / f"{PREFIX}-no-ring"
    fd = bpf.map_create(bpf.MapType.ARRAY, 4, 4, 1)
    bpf.obj_pin(fd, pin)
    os.close(fd)
    try:
        with pytest.raises(LayoutMismatchError, match="this qpd needs ringbuf"):
            Ring(pin)
    finally:
        pin.unlink()
