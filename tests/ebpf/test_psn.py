"""Packet sequence numbers: what is missing, late, twice or sent again, as sentences about packets on a wire."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from qpd.kernel.layout import PSN_KNOWN, PSN_MASK
from qpd.model import Hook
from tests.ebpf import streams
from tests.ebpf.harness import OWN_IFINDEX, Classifier, uplinks
from tests.ebpf.streams import (
    Packet,
    ack,
    answers,
    arrive,
    atomic_ack,
    cnp,
    counted,
    fetch_and_add,
    leave,
    middle,
    read,
    send,
    sends,
    shifted,
    uc,
    without,
)

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Case:
    """What comes by, in this order, and what is counted. Counters that are not named are zero."""

    sentence: str
    packets: list[Packet]
    counts: dict[str, int]


def case(sentence: str, packets: list[Packet], **counts: int) -> Case:
    return Case(sentence, packets, counts)


REQUESTS = [
    case("in order", sends(*range(200))),
    case("the first packet seen is anywhere", sends(5000, 5001)),
    case("one lost before, never sent again", sends(0, 1, 3, 4), missing=1),
    case("three lost at once", sends(0, 4, 5), missing=3),
    case("more lost than the window holds", sends(0, 101, 102), missing=100),
    case("two neighbours swapped", sends(0, 2, 1, 3), missing=1, out_of_order=1),
    case("one late by two", sends(0, 2, 3, 1, 4), missing=1, out_of_order=1),
    case("a block late", sends(0, 3, 4, 1, 2, 5), missing=2, out_of_order=2),
    case("two late, in reverse", sends(0, 3, 2, 1, 4), missing=2, out_of_order=2),
    case("late ones of two gaps", sends(0, 2, 4, 1, 3, 5), missing=2, out_of_order=2),
    case(
        "lost before, and sent again from there",
        sends(0, 1, 3, 4, 5, 2, 3, 4, 5, 6),
        missing=1,
        retransmitted=4,
        go_backs=1,
    ),
    case(
        "two lost before, and sent again",
        sends(0, 1, 4, 5, 2, 3, 4, 5, 6),
        missing=2,
        retransmitted=4,
        go_backs=1,
    ),
    case(
        "lost behind: sent again without a gap here",
        sends(0, 1, 2, 3, 4, 2, 3, 4, 5),
        retransmitted=3,
        go_backs=1,
        lost_behind=1,
    ),
    case(
        "the last one sent again after a timeout",
        sends(0, 1, 2, 2),
        retransmitted=1,
        go_backs=1,
        lost_behind=1,
    ),
    case(
        "the last one sent again twice",
        sends(0, 1, 2, 2, 2, 3),
        retransmitted=2,
        go_backs=2,
        lost_behind=2,
    ),
    case("one comes again, alone, amid new ones", sends(0, 1, 2, 3, 1, 4, 5), duplicates=1),
    case(
        "lost before, and once more while it is sent again",
        sends(0, 1, 3, 4, 5, 2, 3, 5, 6),
        missing=2,
        retransmitted=3,
        go_backs=1,
    ),
    case(
        "lost behind, and again as it was sent once more",
        sends(0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4),
        retransmitted=6,
        go_backs=2,
        lost_behind=2,
    ),
    case(
        "the gap in the run is sent again in turn",
        sends(0, 1, 2, 3, 4, 1, 3, 4, 2, 3, 4, 5),
        missing=1,
        retransmitted=6,
        go_backs=2,
        lost_behind=1,
    ),
    case(
        "the first one sent again is lost before: the second begins the run",
        sends(0, 1, 2, 3, 4, 5, 3, 4, 5, 6),
        retransmitted=3,
        go_backs=1,
        lost_behind=1,
    ),
    case(
        "sent again from before the window",
        sends(*range(200), *range(50, 202)),
        retransmitted=150,
        go_backs=1,
        lost_behind=1,
    ),
    case(
        "lost before, and sent again from before the window",
        without(sends(*range(200)), 50) + sends(*range(50, 202)),
        missing=1,
        retransmitted=150,
        go_backs=1,
    ),
    case(
        "lost behind before the loss here",
        sends(0, 1, 2, 3, 5, 6, 1, 2, 3, 4, 5, 6, 7),
        missing=1,
        retransmitted=6,
        go_backs=1,
        lost_behind=1,
    ),
    case("a new life of the QP number, ahead", sends(0, 1, 0x400000, 0x400001), restarts=1),
    case("a new life of the QP number, behind", sends(0x400000, 0x400001, 7, 8), restarts=1),
]


@pytest.mark.parametrize("offset", [0, 0xFFFFFE, 0xFFFF80], ids=["at 0", "over the wrap", "beyond the wrap"])
@pytest.mark.parametrize("one", REQUESTS, ids=lambda one: one.sentence)
def test_requests(classifier: Classifier, one: Case, offset: int) -> None:
    classifier.fabric(uplinks(1))
    packets = shifted(one.packets, offset)
    leave(classifier, *packets)
    arrive(classifier, *packets)
    assert counted(classifier, Hook.STEER) == one.counts
    assert counted(classifier, Hook.OBSERVE) == one.counts


UC = [
    case("in order", uc(*range(100))),
    case("lost", uc(0, 1, 3, 4), missing=1),
    case("late", uc(0, 2, 1, 3), missing=1, out_of_order=1),
    case(
        "late, and the next one with it: nothing is sent again", uc(0, 3, 1, 2, 4), missing=2, out_of_order=2
    ),
    case("twice", uc(0, 1, 1, 2), duplicates=1),
    case("late, beyond the window", uc(*range(10), *range(11, 90), 10, 90), missing=1, out_of_order=1),
]


@pytest.mark.parametrize("offset", [0, 0xFFFFFE], ids=["at 0", "over the wrap"])
@pytest.mark.parametrize("one", UC, ids=lambda one: one.sentence)
def test_unreliable_requests(classifier: Classifier, one: Case, offset: int) -> None:
    arrive(classifier, *shifted(one.packets, offset))
    assert counted(classifier, Hook.OBSERVE) == one.counts


READS = [
    case("takes as many PSNs as its responses", [middle(0), read(1, 4096), read(5, 4096), send(9)]),
    case("one octet more takes one more", [middle(0), read(1, 4097), send(6)]),
    case("of nothing takes one", [middle(0), read(1, 0), send(2)]),
    case("one of 1 GB, path MTU not known, is no new life", [send(0), read(1, 1 << 30), send(1 + (1 << 20))]),
    case("a loss after it is seen", [middle(0), read(1, 4096), send(6)], missing=1),
    case("path MTU not known: nothing is missing that may be its own", [send(0), read(1, 4096), send(5)]),
    case("path MTU not known: what it cannot take is missing", [send(0), read(1, 1024), send(6)], missing=1),
    case(
        "requested again",
        [middle(0), read(1, 4096), read(5, 4096), read(1, 4096), read(5, 4096), send(9)],
        retransmitted=2,
        go_backs=1,
        lost_behind=1,
    ),
    case(
        "the rest of it requested again",
        [middle(0), read(1, 4096), read(3, 2048), send(5)],
        retransmitted=1,
        go_backs=1,
        lost_behind=1,
    ),
    case(
        "requested again, path MTU not known",
        [send(0), read(1, 4096), read(5, 4096), read(1, 4096), read(5, 4096), send(9)],
        retransmitted=2,
        go_backs=1,
        lost_behind=1,
    ),
    case("an atomic takes one", [fetch_and_add(0), fetch_and_add(1), send(2)]),
]


@pytest.mark.parametrize("offset", [0, 0xFFFFFE], ids=["at 0", "over the wrap"])
@pytest.mark.parametrize("one", READS, ids=lambda one: one.sentence)
def test_read_requests(classifier: Classifier, one: Case, offset: int) -> None:
    arrive(classifier, *shifted(one.packets, offset))
    assert counted(classifier, Hook.OBSERVE) == one.counts


RESPONSES = [
    case("of READs, one after the other", answers(0, 3) + answers(4, 7) + answers(8, 8)),
    case("ACKs leave out what they acknowledge as well", [ack(0), ack(7), ack(7), ack(20)]),
    case("with PSNs of other requests in between", [*answers(0, 3), ack(50), *answers(51, 54), atomic_ack(60)]),
    case("a middle one lost", without(answers(0, 9), 4), missing=1),
    case("several lost", without(answers(0, 9), 4, 5, 6), missing=3),
    case("the first lost", answers(0, 3) + without(answers(4, 7), 4), missing=1),
    case("the first lost after an ACK", [ack(10), *without(answers(30, 33), 30)], missing=1),
    case("the last lost", without(answers(0, 3), 3) + answers(4, 7), missing=1),
    case("the last lost before an ACK", [*without(answers(0, 3), 3), ack(9)], missing=1),
    case("two swapped", [*answers(0, 3)[:1], answers(0, 3)[2], answers(0, 3)[1], answers(0, 3)[3]],
         missing=1, out_of_order=1),
    case("lost, and requested again from there", without(answers(0, 9), 4) + answers(4, 9) + answers(10, 13),
         missing=1, retransmitted=6, go_backs=1),
    case("lost behind, and requested again", answers(0, 9) + answers(4, 9) + answers(10, 13),
         retransmitted=6, go_backs=1, lost_behind=1),
    case("an atomic's sent again", [atomic_ack(0), atomic_ack(1), atomic_ack(1), atomic_ack(2)], retransmitted=1),
    case("one ACK of a whole message of 1 GB", [ack(0), ack(0x40000), ack(0x40001)]),
    case("a new life of the QP number, ahead", answers(0, 3) + answers(0x300000, 0x300003), restarts=1),
    case("a new life of the QP number, behind", [*answers(0x300000, 0x300003), atomic_ack(0)], restarts=1),
    case("a new life in the midst of a READ's", [*answers(0, 9)[:4], ack(0x600000), ack(0x600001)], restarts=1),
]  # fmt: skip


@pytest.mark.parametrize("offset", [0, 0xFFFFFE], ids=["at 0", "over the wrap"])
@pytest.mark.parametrize("one", RESPONSES, ids=lambda one: one.sentence)
def test_responses(classifier: Classifier, one: Case, offset: int) -> None:
    classifier.fabric(uplinks(1))
    packets = shifted(one.packets, offset)
    leave(classifier, *packets)
    arrive(classifier, *packets)
    assert counted(classifier, Hook.STEER) == one.counts
    assert counted(classifier, Hook.OBSERVE) == one.counts


def test_requests_and_responses_to_one_qp_are_two_streams(classifier: Classifier) -> None:
    """As in bidirectional traffic: the one PSNs are the sender's, the others those of this QP's own requests."""
    mixed: list[Packet] = []
    for number in range(40):
        mixed += [send(1000 + number), ack(9_000_000 + number)]
    mixed += [*answers(9_000_040, 9_000_043), send(1040)]
    arrive(classifier, *mixed)
    assert counted(classifier, Hook.OBSERVE) == {}
    record = classifier.maps.qp(streams.FROM_B, "arrivals")
    assert record is not None
    assert (int(record["next_psn"]), int(record["acked_psn"])) == (1041 | PSN_KNOWN, 9_000_043 | PSN_KNOWN)


@pytest.mark.parametrize(
    ("packets", "newest", "moves"),
    [
        ([ack(5)], 5, 1),
        ([ack(5), ack(9), ack(7), ack(9)], 9, 2),
        ([ack(5), ack(8, streams.SEQUENCE)], 7, 2),
        ([ack(5), ack(8, streams.RNR), ack(8)], 8, 3),
        ([ack(PSN_MASK), ack(2)], 2, 2),
        (answers(0, 5), 5, 6),
        ([atomic_ack(3)], 3, 1),
    ],
)
def test_what_is_acknowledged(classifier: Classifier, packets: list[Packet], newest: int, moves: int) -> None:
    arrive(classifier, *packets)
    record = classifier.maps.qp(streams.FROM_B, "arrivals")
    assert record is not None
    assert (int(record["acked_psn"]), int(record["acks"])) == (newest | PSN_KNOWN, moves)


@pytest.mark.parametrize(
    ("packets", "counts"),
    [
        ([ack(1, streams.SEQUENCE), ack(1, streams.SEQUENCE), ack(1)], {"naks_sequence": 2}),
        ([ack(1, streams.RNR)], {"naks_rnr": 1}),
        ([ack(1, 0x61), ack(1, streams.REMOTE_ACCESS), ack(1, 0x63), ack(1, 0x64)], {"naks_remote": 4}),
        ([cnp(), cnp()], {"cnps": 2, "becn": 2}),
        ([Packet(4, 0, tos=3), Packet(4, 1, tos=2), Packet(4, 2, tos=0x6B)], {"ecn_marked": 2}),
        ([Packet(4, 0, fecn=True), Packet(4, 1, becn=True)], {"fecn": 1, "becn": 1}),
    ],
    ids=["sequence errors", "receiver not ready", "remote errors", "CNP", "CE", "FECN and BECN"],
)
def test_what_speaks_of_trouble(
    classifier: Classifier, packets: list[Packet], counts: dict[str, int]
) -> None:
    classifier.fabric(uplinks(1))
    arrive(classifier, *packets)
    leave(classifier, *packets)
    assert counted(classifier, Hook.OBSERVE) == counts
    assert counted(classifier, Hook.STEER) == counts


@pytest.mark.parametrize("opcode", [0x64, 0x65, 0xA4, 0x44, 0xFF])
def test_other_services_are_only_counted(classifier: Classifier, opcode: int) -> None:
    """UD has no order to keep, XRC one for each of many senders."""
    arrive(classifier, *(Packet(opcode, psn) for psn in (7, 3, 900, 3)))
    assert counted(classifier, Hook.OBSERVE) == {}
    record = classifier.maps.qp(streams.FROM_B, "arrivals")
    assert record is not None
    assert (int(record["packets"]), int(record["transport"])) == (4, opcode >> 5)


def test_loss_is_charged_to_the_path_that_the_packets_took(classifier: Classifier) -> None:
    """What is missing at the first packet of another path was sent by the old one, and so are its late ones."""
    classifier.fabric(uplinks(2))
    home = classifier.path_of(classifier.steer(send(0).build(streams.FROM_A, streams.A)))
    before = classifier.maps.counters().faults
    leave(classifier, *sends(1, 3))
    classifier.maps.set_living(1 << (1 - home))
    leave(classifier, *sends(6, 7, 5, 8))
    after = classifier.maps.counters().faults

    def more(name: str, path: int) -> int:
        return int(after[name][Hook.STEER, path] - before[name][Hook.STEER, path])

    assert [more(name, home) for name in ("missing", "out_of_order")] == [3, 1]
    assert [more(name, 1 - home) for name in ("missing", "out_of_order")] == [0, 0]


def test_what_is_lost_behind_is_charged_to_the_path_and_told_from_loss_before(classifier: Classifier) -> None:
    classifier.fabric(uplinks(1))
    before = classifier.maps.counters().faults
    leave(classifier, *sends(*range(10), *range(5, 10), 11, 12, *range(10, 14)))
    after = classifier.maps.counters().faults
    changed = {
        name: int(after[name][Hook.STEER, 0] - before[name][Hook.STEER, 0])
        for name in after.dtype.names or ()
    }
    assert changed == {"missing": 1, "out_of_order": 0, "retransmitted": 8, "lost_behind": 1, "ecn_marked": 0}


def test_marks_are_counted_on_the_path(classifier: Classifier) -> None:
    classifier.fabric(uplinks(1))
    classifier.maps.replace_neighbours({(OWN_IFINDEX, "02:00:00:00:00:01"): 0})
    before = classifier.maps.counters().faults["ecn_marked"]
    arrive(classifier, Packet(4, 0, tos=3), Packet(4, 1))
    assert (
        int(classifier.maps.counters().faults["ecn_marked"][Hook.OBSERVE, 0] - before[Hook.OBSERVE, 0]) == 1
    )


@pytest.mark.parametrize("loss", [0.001, 0.02, 0.2])
def test_random_loss_of_a_stream_in_order_is_counted_exactly(classifier: Classifier, loss: float) -> None:
    draw = random.Random(4791)
    kept = [psn for psn in range(4000) if psn in {0, 3999} or draw.random() >= loss]
    arrive(classifier, *shifted(uc(*kept), 0xFFFF00))
    assert counted(classifier, Hook.OBSERVE) == ({"missing": 4000 - len(kept)})


def test_random_loss_under_reordering_is_counted_within_one_per_cent(classifier: Classifier) -> None:
    draw = random.Random(3)
    kept = [psn for psn in range(4000) if psn in {0, 3999} or draw.random() >= 0.05]
    kept.sort(key=lambda psn: psn + draw.randrange(8) * (psn not in {0, 3999}))
    arrive(classifier, *uc(*kept))
    counts = counted(classifier, Hook.OBSERVE)
    lost = 4000 - len(kept)
    assert abs(counts["missing"] - counts["out_of_order"] - lost) <= lost / 100
    assert counts["out_of_order"] > 1000


def test_go_back_n_with_random_loss(classifier: Classifier) -> None:
    """A sender and a receiver by the book, 24 packets at a time, and a wire that loses 2 %.

    Two kinds of loss leave no gap for anybody behind them: of the last ones of a burst, and of the first ones where a
    burst repeats what has been seen. All others are counted.
    """
    draw = random.Random(1)
    expected, newest, told, again = 0, -1, 0, 0
    seen: list[int] = []
    while expected < 3000:
        came = [psn for psn in range(expected, expected + 24) if draw.random() >= 0.02]
        told += sum(psn not in came for psn in range(max(min(came[0], newest + 1), expected), came[-1]))
        for psn in came:
            again += psn <= newest
            newest = max(newest, psn)
            expected += psn == expected
        seen += came
    arrive(classifier, *sends(*seen))
    counts = counted(classifier, Hook.OBSERVE)
    assert counts["missing"] - counts.get("out_of_order", 0) == told > 40
    assert counts["retransmitted"] == again > 800
