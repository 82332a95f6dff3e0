"""What looks show of one direction's QPs, and what that says of who answers whom: evidence for :mod:`qpd.core.pairing`.

Rows answer, columns ask, or the other way round: the two directions of a host's traffic are alike here. Pure.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from qpd.core.marks import answered_before_asked, marks_of
from qpd.core.sighting import SIGHTING, Bools, Look, Numbers, Records, newer, newest_asked

LAG_NS = 500_000_000
"""Brisk answers that are this far behind, while nothing is lost, are another QP's. Longer where looks are rare."""
LAG_LOOKS = 5
_BRISK_LOOKS, _BRISK_MOVES = 4, 2
"""Answers are brisk if they moved at so many of the last looks."""
IDLE_NS = 5_000_000_000
"""A QP that has answered nothing for so long, while another was asked, is not that one's partner."""
FAR = 1 << 20
"""More packets than a QP has unanswered, whatever it has lost."""
PROOFS = 2
"""Contradictions that rule a partner out."""


class Side:
    """One direction's entries of two hosts, aligned with one axis of the matrices."""

    def __init__(self, records: Records, look: Look) -> None:
        count = len(records)
        self.records = records
        self.look = look
        self.asked, self.answered = marks_of(records, look)
        self.past: deque[tuple[Look, Records]] = deque()
        """Earlier looks, the oldest first; entries that were not there show nothing."""
        self.moved: Bools = np.zeros(count, np.bool_)
        """New answers since the look before."""
        self.changed: Bools = np.zeros(count, np.bool_)
        """Anything new."""
        self.moves: Numbers = np.zeros(count, np.int64)
        """Looks at which anything was new …"""
        self.worked: Numbers = np.zeros(count, np.int64)
        """… since an entry was last seen to go away."""
        self.brisk: Numbers = np.zeros(count, np.int64)
        """Bit n: its answers moved n looks ago."""
        self.looks = 0
        self.born: Numbers = np.zeros(count, np.int64)
        """At which look it was seen first …"""
        self.born_ns: Numbers = np.full(count, look.begun_ns, np.int64)
        """… and when that was."""
        self.answered_ns: Numbers = np.full(count, look.begun_ns, np.int64)
        """When its answers were seen to move last, or it was seen first."""
        self.changed_ns: Numbers = self.answered_ns.copy()
        """When anything new was seen of it."""

    @property
    def lag_ns(self) -> int:
        """How old a request must be that should have been answered."""
        return max(LAG_NS, LAG_LOOKS * (self.look.begun_ns - self.past[-1][0].begun_ns))

    def then(self, before_ns: int) -> Records | None:
        """The newest look that was over by this time."""
        found = None
        for look, records in self.past:
            if look.over_ns > before_ns:
                break
            found = records
        return found

    def advance(self, records: Records, look: Look, place: Numbers) -> None:
        """Take the next look; ``place``: each entry's index in the look before, -1: it is new."""
        # Without its marks, which nobody asks for again.
        self.past.append((Look(self.look.begun_ns, self.look.over_ns), self.records))
        self.looks += 1
        if not still(place, len(self.records)):
            self.born = _kept(self.born, place, self.looks)
            self.born_ns = _kept(self.born_ns, place, look.begun_ns)
            self.past = deque((at, _aligned(past, place)) for at, past in self.past)
            self.moves = _kept(self.moves, place, 0)
            self.worked = _kept(self.worked, place, 0)
            self.brisk = _kept(self.brisk, place, 0)
            self.answered_ns = _kept(self.answered_ns, place, look.begun_ns)
            self.changed_ns = _kept(self.changed_ns, place, look.begun_ns)
        before = self.past[-1][1]
        known = before["qp"] != 0
        self.moved = known & (records["answered_psn"] != before["answered_psn"])
        self.changed = self.moved | (known & (records["request_psn"] != before["request_psn"]))
        self.moves += self.changed
        self.worked += self.changed
        self.brisk = (self.brisk << 1 | self.moved) & (1 << _BRISK_LOOKS) - 1
        self.answered_ns[self.moved] = look.begun_ns
        self.changed_ns[self.changed] = look.begun_ns
        asked, answered = marks_of(records, look)
        self.asked, self.answered = asked.after(self.asked, place), answered.after(self.answered, place)
        self.records, self.look = records, look
        while len(self.past) > 1 and self.past[1][0].over_ns <= look.begun_ns - 2 * self.lag_ns:
            self.past.popleft()


def places(before: Records, after: Records) -> Numbers:
    """For each entry its index in an earlier look, -1: it was not there."""
    identity = ["vni", "qp", "life"]
    if len(before) == len(after) and np.array_equal(before[identity], after[identity]):
        return np.arange(len(after))
    known = {name: index for index, name in enumerate(before[identity].tolist())}
    return np.array([known.get(name, -1) for name in after[identity].tolist()], np.int64)


def still(place: Numbers, before: int) -> bool:
    """Whether these are the same entries in the same order as ``before`` ones."""
    return len(place) == before and bool((place == np.arange(before)).all())


def _kept(values: Numbers, place: Numbers, fresh: int) -> Numbers:
    return np.where(place >= 0, values[place], fresh) if len(values) else np.full(len(place), fresh, np.int64)


def _aligned(past: Records, place: Numbers) -> Records:
    """An earlier look's records at the present places."""
    aligned = np.zeros(len(place), SIGHTING)
    aligned["first_psn"] = aligned["request_psn"] = aligned["answered_psn"] = -1
    kept = place >= 0
    aligned[kept] = past[place[kept]]
    return aligned


def read_before(answers: Side, questions: Side) -> Records:
    """The newest look at the answers that was over before the questions were read."""
    return answers.records if answers.look.over_ns <= questions.look.begun_ns else answers.past[-1][1]


def contradicted_by(answers: Side, questions: Side) -> Bools:
    """[answering, asking]: answers that were there before what they would answer had been sent."""
    then = read_before(answers, questions)
    fresh = answers.changed[:, None] | questions.changed
    contradicted = fresh & _beyond(then, questions.records, answers.moves[:, None])
    contradicted |= answered_before_asked(answers.answered, questions.asked)
    return contradicted & ~_come_back(answers, questions)


def _come_back(answers: Side, questions: Side) -> Bools:
    """[answering, asking]: what is asked may have been asked before, and the entry evicted since.

    So it is with an entry that is younger than the answers', until what was on its way is over.
    """
    lag_ns = max(answers.lag_ns, questions.lag_ns)
    recent = questions.born_ns > questions.look.begun_ns - lag_ns
    if not recent.any():
        return np.zeros((1, 1), np.bool_)
    younger: Bools = recent & (questions.born > answers.born[:, None])
    return younger


def _beyond(answers: Records, questions: Records, moves: Numbers) -> Bools:
    """[answering, asking]: answers to what had not been sent when the questions were read."""
    # 32 bits are enough for PSNs, and half the work.
    to, newest = answers["answered_psn"][:, None], newest_asked(questions).astype(np.int32)
    # Who has never been asked while others answered, again and again, is not whom they answer.
    unasked = (newest < 0) & (moves >= PROOFS)
    beyond: Bools = np.asarray((to >= 0) & (unasked | (newest >= 0) & (newer(to, newest) > 0)))
    return beyond


def followed(answers: Side, questions: Side) -> tuple[Bools, Bools] | None:
    """[answering, asking]: whether the answers moved with the questions, and whether they stay behind old ones."""
    lag_ns = max(answers.lag_ns, questions.lag_ns)
    since_ns = min(answers.look.begun_ns, questions.look.begun_ns) - lag_ns
    old, before = questions.then(since_ns), answers.then(since_ns)
    if old is None or before is None:
        return None
    now = questions.records
    asked = (old["request_psn"] >= 0) & (now["request_psn"] != old["request_psn"])
    to = answers.records["answered_psn"][:, None]
    reached = (to >= 0) & (newer(to, old["request_psn"]) >= 0)
    follows = (asked & answers.moved[:, None]) & reached
    brisk = (_bits(answers.brisk) >= _BRISK_MOVES) & (before["qp"] != 0)
    calm = answers.records["trouble"] == before["trouble"]
    idle = answers.answered_ns <= answers.look.begun_ns - IDLE_NS
    late = (brisk & calm | idle)[:, None] & (asked & (old["trouble"] == now["trouble"]))
    # Of so many packets even those who lose some have had answers.
    far = (brisk[:, None] & asked & (to >= 0)) & (newer(old["request_psn"], to) > FAR)
    strays = (late & ~reached) | far
    return follows, strays


def _bits(words: Numbers) -> Numbers:
    return sum((words >> bit & 1 for bit in range(_BRISK_LOOKS)), np.zeros_like(words))
