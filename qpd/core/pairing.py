"""Which queue pair answers which, from packets alone: {host A, QP a} <-> {host B, QP b}. Pure.

A packet names the QP that it goes to and no other. What ties the two directions of a reliable connection together is
that an answer (ACK, READ response, atomic ACK) repeats the packet sequence number of the request that it answers
(InfiniBand Architecture Specification volume 1, 9.7.5.1). One leaf sees both: requests to b leave, answers to a arrive,
or the other way round at the far leaf. So four kinds of evidence, none of which is a UDP port:

- **meeting**: a's newest answer is b's newest request, or nearly so, and nobody else's. With PSNs that were drawn at
  random that is no accident (:mod:`qpd.core.meeting`): one look tells, also after the traffic is over.
- **contradiction**: an answer of PSN x came to a before a request of PSN x was sent to b, as looks show, or times that
  the kernel has noted (:mod:`qpd.core.marks`). No delay, loss or reordering of the network can make that of a true
  pair; only what the leaf has not seen (programs attached, or an entry evicted, amid a retransmission) might, and so it
  takes ``PROOFS`` of them.
- **straying**: long after something was sent to b, a's answers, brisk as they come, have not reached it, and neither
  was in trouble; or a has long been silent while b is asked on and on.
- **agreement**: a's answers moved, to what b was sent since, and no further.

By the others, for PSNs that all began alike or run far ahead of their answers, a pair is stated when agreements are
many and every other partner of *both* is ruled out; or, where all QPs of the two hosts have their partners in sight,
when contradictions and long straying leave them no other way to be paired (:mod:`qpd.core.assignment`). Who cannot be
told apart (in lockstep at the same moments, or at rest) is not stated.

What this counts on: both directions of a host's traffic pass this leaf. Where one does not, its QPs find no partner,
and while there are such, only what is ruled out for both sides is stated.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qpd.core.assignment import certain
from qpd.core.marks import answered_before_asked, marks_of
from qpd.core.meeting import CHANCE_MAX, YOUNG, Firsts, drawn, meetings, only_each_other
from qpd.core.sighting import SIGHTING, Bools, Look, Numbers, Records, newer, newest_asked

Counts = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

LAG_NS = 500_000_000
"""Brisk answers that are this far behind, while nothing is lost, are another QP's. Longer where looks are rare."""
LAG_LOOKS = 5
_BRISK_LOOKS, _BRISK_MOVES = 4, 2
"""Answers are brisk if they moved at so many of the last looks."""
IDLE_NS = 5_000_000_000
"""A QP that has answered nothing for so long, while another was asked, is not that one's partner."""
RECENT_NS = 10_000_000_000
"""Who has shown nothing new for so long is at rest: it meets nobody any more, and is no stranger."""
FAR = 1 << 20
"""More packets than a QP has unanswered, whatever it has lost."""
PROOFS = 2
"""Contradictions that rule a partner out."""
AGREEMENTS = 6
"""Moves that must have agreed before a pair is stated …"""
AGREEMENTS_DOUBTED = 4 * AGREEMENTS
"""… and where QPs of the same hosts find no partner."""
STRAYS = 3
"""Strayings in a row that rule a partner out where both sides are unique …"""
STRAYS_ALONE = 12
"""… and where only one is."""
EDGES_MAX = 4_000_000
"""Possible partnerships looked at together, three octets each."""
ENTRIES_MAX = 8192
"""Entries looked at together, of each of which some looks are kept."""
PARK_NS = 10_000_000_000
"""Two hosts whose QPs stay the same, and alike, for so long give way to others that wait …"""
PARK_ALONE_NS = 30_000_000_000
"""… or for so long, where none wait …"""
REST_NS = 60_000_000_000
"""… for so long."""
PROGRESS = 1000
"""They are not the same where one possible partnership in so many has been ruled out."""
DISTRUST_NS = 300_000_000_000
"""Two hosts of which a stated pair proved wrong get no pair from one-sided evidence for so long."""


@dataclass(frozen=True, slots=True)
class QpName:
    """A QP in a packet's words: VNI, the host that it is at (16 octets, an IPv4 address mapped), its number."""

    vni: int
    host: bytes
    qp: int


@dataclass(frozen=True, slots=True)
class Pair:
    """``near``: the QP at this leaf's host. ``far``: its partner."""

    near: QpName
    far: QpName
    restarts: tuple[int, int] = field(default=(0, 0), compare=False)
    """Of near's and far's entries: which lives of their numbers this is about."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One direction of a QP. ``arrives``: in which map it is."""

    arrives: bool
    name: QpName


@dataclass(frozen=True, slots=True)
class Found:
    """What one look has brought."""

    stated: tuple[Pair, ...] = ()
    ended: tuple[Pair, ...] = ()
    """Stated before, and contradicted since."""
    halves: tuple[Entry, ...] = ()
    """Entries that name a partner who does not name them: what is left of pairs of which one entry is gone."""
    watch: tuple[Entry, ...] = ()
    """Entries of which the times of PSNs are wanted from now on."""
    unwatch: tuple[Entry, ...] = ()
    """Those of which they are not any more."""
    waiting: int = 0
    """Pairs of hosts that had to wait for their turn."""


_DOUBTS_MAX = 4096
_ODD, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)


class _Side:
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
        """Looks at which anything was new."""
        self.brisk: Numbers = np.zeros(count, np.int64)
        """Bit n: its answers moved n looks ago."""
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
        if not _still(place, len(self.records)):
            self.past = deque((at, _aligned(past, place)) for at, past in self.past)
            self.moves = _kept(self.moves, place, 0)
            self.brisk = _kept(self.brisk, place, 0)
            self.answered_ns = _kept(self.answered_ns, place, look.begun_ns)
            self.changed_ns = _kept(self.changed_ns, place, look.begun_ns)
        before = self.past[-1][1]
        known = before["qp"] != 0
        self.moved = known & (records["answered_psn"] != before["answered_psn"])
        self.changed = self.moved | (known & (records["request_psn"] != before["request_psn"]))
        self.moves += self.changed
        self.brisk = (self.brisk << 1 | self.moved) & (1 << _BRISK_LOOKS) - 1
        self.answered_ns[self.moved] = look.begun_ns
        self.changed_ns[self.changed] = look.begun_ns
        asked, answered = marks_of(records, look)
        self.asked, self.answered = asked.after(self.asked, place), answered.after(self.answered, place)
        self.records, self.look = records, look
        while len(self.past) > 1 and self.past[1][0].over_ns <= look.begun_ns - 2 * self.lag_ns:
            self.past.popleft()


def _places(before: Records, after: Records) -> Numbers:
    """For each entry its index in an earlier look, -1: it was not there."""
    identity = ["vni", "qp", "life"]
    if len(before) == len(after) and np.array_equal(before[identity], after[identity]):
        return np.arange(len(after))
    known = {name: index for index, name in enumerate(before[identity].tolist())}
    return np.array([known.get(name, -1) for name in after[identity].tolist()], np.int64)


def _still(place: Numbers, before: int) -> bool:
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


def _read_before(answers: _Side, questions: _Side) -> Records:
    """The newest look at the answers that was over before the questions were read."""
    return answers.records if answers.look.over_ns <= questions.look.begun_ns else answers.past[-1][1]


def _contradicted(answers: _Side, questions: _Side) -> Bools:
    """[answering, asking]: answers that were there before what they would answer had been sent."""
    then = _read_before(answers, questions)
    fresh = answers.changed[:, None] | questions.changed
    contradicted = fresh & _beyond(then, questions.records, answers.moves[:, None])
    contradicted |= answered_before_asked(answers.answered, questions.asked)
    return contradicted


def _beyond(answers: Records, questions: Records, moves: Numbers) -> Bools:
    """[answering, asking]: answers to what had not been sent when the questions were read."""
    # 32 bits are enough for PSNs, and half the work.
    to, newest = answers["answered_psn"][:, None], newest_asked(questions).astype(np.int32)
    # Who has never been asked while others answered, again and again, is not whom they answer.
    unasked = (newest < 0) & (moves >= PROOFS)
    beyond: Bools = np.asarray((to >= 0) & (unasked | (newest >= 0) & (newer(to, newest) > 0)))
    return beyond


def _followed(answers: _Side, questions: _Side) -> tuple[Bools, Bools] | None:
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


class _Firsts:
    """First PSNs at one look; sorted when they are asked for."""

    def __init__(self, arriving: Records, leaving: Records) -> None:
        self._both = (arriving, leaving)

    @cached_property
    def arriving(self) -> Firsts:
        """Of all that arrive."""
        return Firsts(self._both[0]["first_psn"])

    @cached_property
    def leaving(self) -> Firsts:
        """Of all that leave."""
        return Firsts(self._both[1]["first_psn"])

    @cached_property
    def _hosts(self) -> tuple[Words, Words]:
        return _hosts(self._both[0]), _hosts(self._both[1])

    def between(self, one: np.void) -> Firsts:
        """Of all between the two hosts of this entry, both ways, also of those whose partner is known."""
        key = _hosts(np.array([one]))[0]
        chosen = zip(self._both, self._hosts, strict=True)
        return Firsts(np.concatenate([records["first_psn"][hosts == key] for records, hosts in chosen]))


class _Hosts:
    """The QPs of two hosts whose partners are not known yet. Rows: those that arrive; columns: those that leave."""

    def __init__(self, arriving: Records, leaving: Records, looks: tuple[Look, Look]) -> None:
        self.rows = _Side(arriving, looks[0])
        self.columns = _Side(leaving, looks[1])
        shape = (len(arriving), len(leaving))
        self.contradicted: Counts = np.zeros(shape, np.uint8)
        self.strayed: Counts = np.zeros(shape, np.uint8)
        self.agreed: Counts = np.zeros(shape, np.uint8)
        self.since_ns = looks[1].over_ns
        """When it last brought a pair, or some progress, or a QP came up."""
        self._left = 0
        """Possible partnerships when it did."""

    def observe(self, arriving: Records, leaving: Records, looks: tuple[Look, Look]) -> None:
        """Take the next look at both directions."""
        rows, columns = _places(self.rows.records, arriving), _places(self.columns.records, leaving)
        if (rows < 0).any() or (columns < 0).any():
            self.since_ns = looks[1].over_ns
        if not _still(rows, len(self.rows.records)) or not _still(columns, len(self.columns.records)):
            self.contradicted = _rearranged(self.contradicted, rows, columns)
            self.strayed = _rearranged(self.strayed, rows, columns)
            self.agreed = _rearranged(self.agreed, rows, columns)
        self.rows.advance(arriving, looks[0], rows)
        self.columns.advance(leaving, looks[1], columns)
        self._weigh(self.rows, self.columns, transposed=False)
        self._weigh(self.columns, self.rows, transposed=True)
        left = int(np.count_nonzero(self.contradicted < PROOFS))
        if abs(left - self._left) * PROGRESS > left:
            self._left = left
            self.since_ns = looks[1].over_ns

    def _weigh(self, answers: _Side, questions: _Side, *, transposed: bool) -> None:
        """Count what one direction's answers say of the other's questions."""
        contradicted, strayed, agreed = (
            (self.contradicted.T, self.strayed.T, self.agreed.T)
            if transposed
            else (self.contradicted, self.strayed, self.agreed)
        )
        if not (
            (answers.records["answered_psn"] >= 0).any() or (questions.records["request_psn"] >= 0).any()
        ):
            return
        _add(contradicted, _contradicted(answers, questions))
        followed = _followed(answers, questions)
        if followed is not None:
            follows, strays = followed
            _add(agreed, follows)
            _add(strayed, strays)
            strayed[follows & ~strays] = 0

    def meet(self, firsts: _Firsts) -> list[tuple[int, int]]:
        """Rows and columns that one look tells."""
        sides = (self.rows, self.columns)
        since_ns = min(side.look.begun_ns for side in sides) - RECENT_NS
        rows, columns = (side.changed_ns > since_ns for side in sides)
        met = only_each_other(
            meetings(_read_before(self.rows, self.columns), self.columns.records, (rows, columns)),
            meetings(_read_before(self.columns, self.rows), self.rows.records, (columns, rows)),
        )
        changes = 1 + self.rows.moves[met.rows] + self.columns.moves[met.columns]
        sure = met.chances * changes <= CHANCE_MAX
        sure &= rows[met.rows] & columns[met.columns] & (self.contradicted[met.rows, met.columns] < PROOFS)
        sure &= (self.rows.records["packets"] < YOUNG)[met.rows]
        sure &= (self.columns.records["packets"] < YOUNG)[met.columns]
        if not sure.any():
            return []
        begun = (
            self.columns.records["first_psn"][met.columns].astype(np.int64),
            self.rows.records["first_psn"][met.rows].astype(np.int64),
        )
        between = firsts.between(self.rows.records[0])
        sure[0] &= drawn(begun[0], begun[1], between, firsts.leaving)
        sure[1] &= drawn(begun[1], begun[0], between, firsts.arriving)
        which = sure.any(axis=0)
        return list(zip(met.rows[which].tolist(), met.columns[which].tolist(), strict=True))

    def decide(self, firsts: _Firsts, *, trusted: bool) -> list[tuple[int, int]]:
        """Rows and columns that belong together; ``trusted``: also by evidence of one side alone."""
        found = {*self._last(trusted=trusted), *(self.meet(firsts) if trusted else ())}
        rows, columns = Counter(row for row, _ in found), Counter(column for _, column in found)
        return [(row, column) for row, column in sorted(found) if rows[row] == columns[column] == 1]

    def _last(self, *, trusted: bool) -> Iterator[tuple[int, int]]:
        """Rows and columns whom time has left no other partner."""
        left = (self.contradicted < PROOFS) & (self.strayed < STRAYS_ALONE)
        complete = self._complete(left)
        agreed = self.agreed >= (AGREEMENTS if complete else AGREEMENTS_DOUBTED)
        both = (self.contradicted < PROOFS) & (self.strayed < STRAYS)
        mutual = both & agreed & (both.sum(axis=1) == 1)[:, None] & (both.sum(axis=0) == 1)
        taken = [(int(row), int(column)) for row, column in np.argwhere(mutual)]
        yield from taken
        if trusted and complete:
            yield from _forced(left, agreed, taken)

    def _complete(self, left: Bools) -> bool:
        """Whether everybody who is at work has somebody to work with."""
        rows, columns = self.rows.moves >= AGREEMENTS, self.columns.moves >= AGREEMENTS
        if np.count_nonzero(rows) != np.count_nonzero(columns):
            return False
        return bool(left[rows].any(axis=1).all() and left[:, columns].any(axis=0).all())


def _forced(left: Bools, agreed: Bools, taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs that are the same in every way to give each who is at work a partner of his own."""
    left = left.copy()
    rows: Bools = np.asarray(agreed.any(axis=1))
    columns: Bools = np.asarray(agreed.any(axis=0))
    for row, column in taken:
        left[row] = left[:, column] = False
        rows[row] = columns[column] = False
    return [(int(row), int(column)) for row, column in np.argwhere(certain(left, rows, columns) & agreed)]


def _add(counts: Counts, events: Bools) -> None:
    np.add(counts, events, out=counts, where=counts != np.iinfo(np.uint8).max)


def _rearranged(matrix: Counts, rows: Numbers, columns: Numbers) -> Counts:
    fresh = np.zeros((len(rows), len(columns)), np.uint8)
    old_rows, old_columns = np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    fresh[np.ix_(old_rows, old_columns)] = matrix[np.ix_(rows[old_rows], columns[old_columns])]
    return fresh


@dataclass(slots=True)
class _Room:
    """What may be looked at together still."""

    edges: int
    entries: int = ENTRIES_MAX

    def take(self, both: tuple[Records, Records]) -> bool:
        """Take what two hosts need; False: there is not enough."""
        rows, columns = len(both[0]), len(both[1])
        if rows * columns > self.edges or rows + columns > self.entries:
            return False
        self.edges -= rows * columns
        self.entries -= rows + columns
        return True


class Pairing:
    """Gathers evidence look by look. As many pairs of hosts at once as ``edges_max`` allows; the others take turns."""

    def __init__(self, edges_max: int = EDGES_MAX) -> None:
        self._edges_max = edges_max
        self._at_work: dict[int, _Hosts] = {}
        self._resting: dict[int, tuple[int, int]] = {}
        """Until when, and which QPs: with others they are taken up again at once."""
        self._distrusted: dict[int, int] = {}
        self._doubts: dict[Pair, set[int]] = {}
        self._halves: set[Entry] = set()
        self._waiting = 0
        self.known: tuple[Numbers, Numbers] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        """Where in the arrays of the last look known pairs are, in the same order."""

    @property
    def at_work(self) -> bool:
        """Whether there are QPs whose partners another look may tell."""
        return bool(self._at_work)

    def observe(self, arriving: Records, leaving: Records, looks: tuple[Look, Look]) -> Found:
        """One look at all QPs (arrays of SIGHTING); ``looks``: when each of them was read.

        Args:
            arriving: QPs of hosts at this leaf, whose packets come from the fabric.
            leaving: QPs of far hosts, whose packets go into the fabric.
            looks: when ``arriving`` and ``leaving`` were read, which must not overlap.
        """
        now_ns = max(look.over_ns for look in looks)
        ended, halves = self._verify(arriving, leaving, looks)
        rows = _by_hosts(arriving, arriving["peer_qp"] == 0)
        columns = _by_hosts(leaving, leaving["peer_qp"] == 0)
        both = {key: (rows[key], columns[key]) for key in rows if key in columns}
        self._rest(both, now_ns)
        stated: list[Pair] = []
        firsts = _Firsts(arriving, leaving)
        for key, hosts in self._at_work.items():
            hosts.observe(*both[key], looks)
            trusted = self._distrusted.get(key, 0) <= now_ns
            found = [
                _pair(hosts.rows.records[row], hosts.columns.records[column])
                for row, column in hosts.decide(firsts, trusted=trusted)
            ]
            if found:
                hosts.since_ns = now_ns
                stated += found
        self._waiting = self._take_up(both, looks)
        watch, unwatch = self._watched(arriving, leaving)
        return Found(tuple(stated), tuple(ended), tuple(halves), watch, unwatch, self._waiting)

    def _rest(self, both: dict[int, tuple[Records, Records]], now_ns: int) -> None:
        """Those whose evidence has brought nothing for long give way, and those who have outgrown their room."""
        room = _Room(self._edges_max)
        park_ns = PARK_NS if self._waiting else PARK_ALONE_NS
        for key, hosts in list(self._at_work.items()):
            if key not in both:
                del self._at_work[key]
            elif not room.take(both[key]) or now_ns - hosts.since_ns > park_ns:
                del self._at_work[key]
                self._resting[key] = now_ns + REST_NS, _lives(both[key])
        self._resting = {
            key: (until, lives)
            for key, (until, lives) in self._resting.items()
            if key in both and until > now_ns and lives == _lives(both[key])
        }

    def _take_up(self, both: dict[int, tuple[Records, Records]], looks: tuple[Look, Look]) -> int:
        """Begin with as many others as there is room for; gives how many have to wait."""
        room = _Room(self._edges_max)
        for key in self._at_work:
            room.take(both[key])
        waiting = 0
        for key, entries in both.items():
            if key in self._at_work or key in self._resting:
                continue
            if room.take(entries):
                self._at_work[key] = _Hosts(*entries, looks)
            else:
                waiting += 1
        return waiting

    def _watched(self, arriving: Records, leaving: Records) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """Who is to be watched and is not, and the other way round."""
        watch: list[Entry] = []
        for hosts in self._at_work.values():
            watch += [_entry(one, True) for one in hosts.rows.records[~hosts.rows.records["watched"]]]
            watch += [_entry(one, False) for one in hosts.columns.records[~hosts.columns.records["watched"]]]
        unwatch: list[Entry] = []
        for records, arrives in ((arriving, True), (leaving, False)):
            watched = records[records["watched"]]
            idle = [key not in self._at_work for key in _hosts(watched).tolist()]
            unwatch += [_entry(one, arrives) for one in watched[np.array(idle, np.bool_)]]
        return tuple(watch), tuple(unwatch)

    def _verify(
        self, arriving: Records, leaving: Records, looks: tuple[Look, Look]
    ) -> tuple[list[Pair], list[Entry]]:
        """Known pairs that are contradicted (all of their hosts end with them), and those of which a half is left."""
        near, far = self.known = _partners(arriving, leaving)
        halves = self._left_over(arriving, leaving)
        # Only answers that were read before the questions can be ahead of them.
        if looks[0].over_ns <= looks[1].begun_ns:
            answered, asked = arriving["answered_psn"][near], newest_asked(leaving[far])
        else:
            answered, asked = leaving["answered_psn"][far], newest_asked(arriving[near])
        wrong = (answered >= 0) & (asked >= 0) & (newer(answered, asked) > 0)
        ended: list[Pair] = []
        if len(self._doubts) > _DOUBTS_MAX:
            self._doubts.clear()
        for index in np.flatnonzero(wrong).tolist():
            pair = _pair(arriving[near[index]], leaving[far[index]])
            facts = self._doubts.setdefault(pair, set())
            facts.add(int(answered[index]))
            if len(facts) >= PROOFS:
                ended.append(pair)
        if not ended:
            return [], halves
        keys = {_hosts_of(pair) for pair in ended}
        now_ns = max(look.over_ns for look in looks)
        self._distrusted = {key: until for key, until in self._distrusted.items() if until > now_ns}
        for key in keys:
            self._distrusted[key] = now_ns + DISTRUST_NS
            self._at_work.pop(key, None)
        theirs = np.isin(_hosts(arriving), np.array(list(keys), np.uint64))[near]
        ended = [
            _pair(arriving[one], leaving[other]) for one, other in zip(near[theirs], far[theirs], strict=True)
        ]
        for pair in ended:
            self._doubts.pop(pair, None)
        return ended, halves

    def _left_over(self, arriving: Records, leaving: Records) -> list[Entry]:
        """Entries whose partner names nobody, or another, at two looks in a row: their partner is gone."""
        near, far = arriving["peer_qp"] != 0, leaving["peer_qp"] != 0
        near[self.known[0]] = far[self.known[1]] = False
        alone = [_entry(one, True) for one in arriving[near]] + [_entry(one, False) for one in leaving[far]]
        before, self._halves = self._halves, set(alone)
        return [half for half in alone if half in before]


def _lives(both: tuple[Records, Records]) -> int:
    """One number for these QPs."""
    return hash(tuple(records["life"].tobytes() + records["qp"].tobytes() for records in both))


def _mixed(first: Words, *more: Words) -> Words:
    """One number of several: integers sort without the interpreter's lock, records do not."""
    mixed = first.copy()
    for words in more:
        mixed = (mixed ^ mixed >> _SHIFT) * _ODD ^ words
    return (mixed ^ mixed >> _SHIFT) * _ODD


def _hosts(records: Records) -> Words:
    """One number for each two hosts."""
    local, remote = records["local"], records["remote"]
    return _mixed(local[:, 0], local[:, 1], remote[:, 0], remote[:, 1])


def _hosts_of(pair: Pair) -> int:
    words = np.frombuffer(pair.near.host + pair.far.host, np.uint64)
    return int(_mixed(*(words[index : index + 1] for index in range(4)))[0])


def _partners(arriving: Records, leaving: Records) -> tuple[Numbers, Numbers]:
    """Where the entries are that name each other, in the same order."""
    near, far = np.flatnonzero(arriving["peer_qp"]), np.flatnonzero(leaving["peer_qp"])
    if not len(near) or not len(far):
        return near[:0], far[:0]
    of_near = _mixed(
        _hosts(arriving)[near],
        arriving["qp"][near].astype(np.uint64),
        arriving["peer_qp"][near].astype(np.uint64),
    )
    of_far = _mixed(
        _hosts(leaving)[far], leaving["peer_qp"][far].astype(np.uint64), leaving["qp"][far].astype(np.uint64)
    )
    _, first, second = np.intersect1d(of_near, of_far, return_indices=True)
    near, far = near[first], far[second]
    same = (arriving["qp"][near] == leaving["peer_qp"][far]) & (
        arriving["peer_qp"][near] == leaving["qp"][far]
    )
    for name in ("local", "remote"):
        same &= (arriving[name][near] == leaving[name][far]).all(axis=1)
    return near[same], far[same]


def _by_hosts(records: Records, wanted: Bools) -> dict[int, Records]:
    """The wanted entries by local and remote host."""
    at = np.flatnonzero(wanted)
    if not len(at):
        return {}
    hosts = _hosts(records)[at]
    order = np.argsort(hosts, kind="stable")
    keys, begins = np.unique(hosts[order], return_index=True)
    ends = [*begins[1:].tolist(), len(at)]
    return {
        key: records[at[order[begin:end]]]
        for key, begin, end in zip(keys.tolist(), begins.tolist(), ends, strict=True)
    }


def _pair(arriving: np.void, leaving: np.void) -> Pair:
    restarts = int(arriving["restarts"]), int(leaving["restarts"])
    return Pair(_near(arriving), _far(leaving), restarts)


def _entry(one: np.void, arrives: bool) -> Entry:
    return Entry(arrives, _near(one) if arrives else _far(one))


def _near(arriving: np.void) -> QpName:
    return QpName(int(arriving["vni"]), arriving["local"].tobytes(), int(arriving["qp"]))


def _far(leaving: np.void) -> QpName:
    return QpName(int(leaving["vni"]), leaving["remote"].tobytes(), int(leaving["qp"]))
