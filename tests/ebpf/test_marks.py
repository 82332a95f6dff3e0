"""When PSNs were first asked for and first answered: what an entry remembers of it, against the packets' own times."""

from __future__ import annotations

import random
import time

import pytest

from qpd.kernel import layout, marks
from qpd.kernel.maps import Side
from qpd.kernel.tell import Teller, Told
from qpd.model import NO_PSN, SLOTS
from qpd.pairs import PairKeeper
from tests.ebpf import streams
from tests.ebpf.harness import Classifier, uplinks
from tests.ebpf.streams import (
    FROM_A,
    FROM_B,
    MODULUS,
    SEQUENCE,
    Packet,
    ack,
    answers,
    arrive,
    cnp,
    leave,
    read,
    send,
    sends,
    shifted,
)

pytestmark = pytest.mark.root

ASKED, ANSWERED = 0, 1
Span = tuple[int, int]
"""Between these times, in units of 256 ns."""


@pytest.fixture
def node(classifier: Classifier, teller: Teller) -> Classifier:
    """Watched, both ways, from their first packets on, which tell nothing yet."""
    classifier.fabric(uplinks(2))
    leave(classifier, cnp())
    arrive(classifier, cnp())
    assert teller.set_watched(FROM_A, "qps", True) is Told.DONE
    assert teller.set_watched(FROM_B, "arrivals", True) is Told.DONE
    return classifier


def units() -> int:
    return time.monotonic_ns() >> layout.MARK_SHIFT


def timed(node: Classifier, packet: Packet) -> Span:
    """Send one packet to B; when that was."""
    before = units()
    leave(node, packet)
    return before, units()


def seen(node: Classifier, which: int, side: Side = "qps") -> dict[int, int]:
    """Marked PSNs and their times."""
    record = node.maps.qp(FROM_A if side == "qps" else FROM_B, side)
    assert record is not None
    psns, times = marks.read(record.reshape(1))
    return {int(psn): int(at) for psn, at in zip(psns[0, which], times[0, which], strict=True) if psn >= 0}


def classes(psns: list[int]) -> dict[int, int]:
    """The newest PSN of each class, of those that came by in this order."""
    newest: dict[int, int] = {}
    for psn in psns:
        divided = 0 if psn == 0 else (psn & -psn).bit_length() - 1
        if psn and divided in layout.MARK_EXPONENTS:
            newest[divided] = psn
    return newest


def agree(found: dict[int, int], wanted: dict[int, Span]) -> None:
    """``wanted``: when each PSN was first asked for or answered, in the order of their numbers."""
    assert set(found) == set(classes(list(wanted)).values())
    for psn, at in found.items():
        low, high = wanted[psn]
        assert low & 0xFFFFFFFF <= at <= high & 0xFFFFFFFF or high >> 32 != low >> 32, psn


@pytest.mark.parametrize("first", [0, 5, MODULUS - 40])
def test_every_request_has_its_time_but_the_first(node: Classifier, first: int) -> None:
    """Of the first nobody knows whether it is the first."""
    wanted = {}
    for number, packet in enumerate(shifted(sends(*range(300)), first)):
        span = timed(node, packet)
        if number:
            wanted[packet.psn] = span
    agree(seen(node, ASKED), wanted)
    assert seen(node, ANSWERED) == {}


@pytest.mark.parametrize("first", [0, MODULUS - 20])
def test_an_answer_is_one_to_all_before_it(node: Classifier, first: int) -> None:
    rolls = random.Random(4)
    wanted: dict[int, Span] = {}
    newest = first
    leave(node, ack(first))
    while len(wanted) < 200:
        newer = newest + rolls.choice([1, 1, 1, 2, 7, 40])
        span = timed(node, ack(newer % MODULUS))
        wanted |= {psn % MODULUS: span for psn in range(newest + 1, newer + 1)}
        newest = newer
        leave(node, ack((newest - 3) % MODULUS))  # an old one tells nothing
    agree(seen(node, ANSWERED), wanted)


def test_a_nak_answers_what_came_before_it(node: Classifier) -> None:
    leave(node, ack(16))
    span = timed(node, ack(21, SEQUENCE))
    agree(seen(node, ANSWERED), dict.fromkeys(range(17, 21), span))


def test_what_was_passed_over_is_not_known(node: Classifier) -> None:
    leave(node, *sends(*range(8)))
    spans = {psn: timed(node, send(psn)) for psn in (8, 9, 12)}
    # 10 and 11 are missing, and what their classes held before (6 and 9) is too old.
    assert set(seen(node, ASKED)) == {8, 12}
    assert spans[12][0] & 0xFFFFFFFF <= seen(node, ASKED)[12] <= spans[12][1] & 0xFFFFFFFF


def test_what_is_sent_again_keeps_its_time(node: Classifier) -> None:
    leave(node, *sends(*range(40)))
    before = seen(node, ASKED)
    leave(node, *sends(*range(30, 40)))
    assert seen(node, ASKED) == before
    span = timed(node, send(40))
    assert span[0] & 0xFFFFFFFF <= seen(node, ASKED)[40] <= span[1] & 0xFFFFFFFF


def test_a_read_asks_for_all_its_psns(node: Classifier) -> None:
    leave(node, streams.middle(0), send(1))
    span = timed(node, read(2, 20 * 1024))
    agree({psn: at for psn, at in seen(node, ASKED).items() if psn > 1}, dict.fromkeys(range(2, 22), span))


def test_a_read_of_unknown_length_asks_for_its_first(node: Classifier) -> None:
    leave(node, *sends(0, 1))
    leave(node, read(2, 20 * 1024))
    assert set(seen(node, ASKED)) == {1, 2}
    leave(node, send(22))
    assert set(seen(node, ASKED)) == {22}


def test_responses_of_a_read_answer(node: Classifier) -> None:
    leave(node, ack(9))
    wanted = {packet.psn: timed(node, packet) for packet in answers(10, 90)}
    agree(seen(node, ANSWERED), wanted)


def test_what_arrives_has_its_times_as_well(node: Classifier) -> None:
    arrive(node, *sends(0, 1, 2, 3))
    assert set(seen(node, ASKED, "arrivals")) == {2, 3}


def test_another_life_forgets(node: Classifier) -> None:
    leave(node, *sends(*range(40)), ack(7), ack(8))
    leave(node, send(6_000_000))
    assert seen(node, ASKED) == {}
    assert seen(node, ANSWERED) == {}


def test_who_is_not_watched_pays_nothing(classifier: Classifier) -> None:
    classifier.fabric(uplinks(2))
    leave(classifier, *sends(*range(20)), *(ack(psn) for psn in range(20)))
    record = classifier.maps.qp(FROM_A)
    assert record is not None
    assert not record["asked_at"].any()
    assert not record["answered_at"].any()


def test_to_be_watched_begins_and_ends_with_nothing(node: Classifier, teller: Teller) -> None:
    """What was noted before grows stale."""
    leave(node, *sends(*range(20)))
    for watched in (False, True):
        assert teller.set_watched(FROM_A, "qps", watched) is Told.DONE
        assert seen(node, ASKED) == {}
        leave(node, *sends(20) if watched else sends(*range(20, 30)))
    assert slot_of(node) == slot_of(node) & SLOTS - 1 | layout.SLOT_WATCHED


def test_who_has_a_partner_is_not_watched_any_more(node: Classifier, teller: Teller) -> None:
    leave(node, *sends(*range(20)))
    slot = slot_of(node)
    assert teller.set_peer(FROM_A, "qps", streams.A_QP) is Told.DONE
    assert slot_of(node) == slot & SLOTS - 1
    leave(node, *sends(*range(20, 80)))
    assert seen(node, ASKED) == {}


def test_the_daemon_watches_whose_partners_it_looks_for(classifier: Classifier, teller: Teller) -> None:
    """From the look after it has found them on, and until it stops."""
    classifier.fabric(uplinks(2))
    leave(classifier, *sends(*range(5)), ack(3))
    keeper = PairKeeper(classifier.maps, teller, symmetric=False, idle=0.1)
    keeper.look([])
    assert slot_of(classifier) & layout.SLOT_WATCHED == 0, "nobody who could be its partner is in sight"
    arrive(classifier, ack(4), *sends(0, 1, 2, 3))
    for _ in range(2):
        keeper.look([])
        assert slot_of(classifier) & layout.SLOT_WATCHED
    keeper.close()
    assert slot_of(classifier) & layout.SLOT_WATCHED == 0


def slot_of(node: Classifier) -> int:
    record = node.maps.qp(FROM_A)
    assert record is not None
    return int(record["slot"])


def test_an_entry_that_changed_while_it_was_read_is_left_aside(node: Classifier) -> None:
    leave(node, *sends(*range(30)))
    record = node.maps.qp(FROM_A, "qps")
    assert record is not None
    torn = record.reshape(1).copy()
    torn["asked_at"][0, 2] += 1_000_000  # PSN 28's, as if it were later than that of 29
    assert (marks.read(torn)[0][0, ASKED] == NO_PSN).all()
