"""What the classifier tells the daemon of its own accord."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qpd.kernel import bpf, layout
from qpd.kernel.ring import EventKind, Ring
from qpd.model import Hook
from tests.ebpf.harness import Classifier, uplinks
from tests.ebpf.packets import Roce

pytestmark = pytest.mark.root


@pytest.fixture
def ring(classifier: Classifier) -> Iterator[Ring]:
    ring = Ring(classifier.pins.map("events"))
    while ring.read():
        pass
    yield ring
    ring.close()


def test_a_new_qp_is_told_once_with_its_home(classifier: Classifier, ring: Ring) -> None:
    classifier.fabric(uplinks(4))
    roce = Roce(inner=6)
    home = classifier.path_of(classifier.steer(roce.build()))
    classifier.steer(roce.build())
    (event,) = ring.read()
    assert (event.kind, event.path, event.qp) == (EventKind.QP_NEW, home, roce.key)
    entry = classifier.entry(roce.key)
    assert entry is not None
    assert 0 < entry["first_seen_ns"] <= event.kernel_ns


def test_a_move_is_told_once_and_so_is_the_return(classifier: Classifier, ring: Ring) -> None:
    classifier.fabric(uplinks(2))
    roce = Roce()
    home = classifier.path_of(classifier.steer(roce.build()))
    for living in (1 << (1 - home), 0b11):
        classifier.maps.set_living(living)
        classifier.steer(roce.build())
        classifier.steer(roce.build())
    told = [(event.kind, event.path, event.qp) for event in ring.read()]
    assert told == [
        (EventKind.QP_NEW, home, roce.key),
        (EventKind.QP_MOVED, 1 - home, roce.key),
        (EventKind.QP_MOVED, home, roce.key),
    ]


def test_a_full_ring_loses_events_and_no_packet(classifier: Classifier, ring: Ring) -> None:
    classifier.fabric(uplinks(2))
    packet = Roce().build()
    room = layout.EVENTS_BYTES // (layout.EVENT_QP.itemsize + 8)
    moves = room + 500
    before = classifier.maps.counters().packets[Hook.STEER]
    for number in range(moves + 1):
        classifier.maps.set_living(1 << number % 2)
        bpf.prog_test_run(classifier.programs[Hook.STEER], packet)
    events = 0
    while some := ring.read():
        events += len(some)
    assert room - 2 <= events <= room
    entry = classifier.entry(Roce().key)
    assert entry is not None
    assert entry["moves"] == moves
    taken = (classifier.maps.counters().packets[Hook.STEER] - before)[:2]
    assert sorted(taken.tolist()) == [(moves + 1) // 2, moves + 1 - (moves + 1) // 2]
