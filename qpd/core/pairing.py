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

from dataclasses import dataclass, field

import numpy as np

from qpd.core.evidence import PROOFS
from qpd.core.sighting import Bools, Look, Numbers, Records, newer, newest_asked
from qpd.core.two_hosts import FirstPsns, TwoHosts, hosts_of, mixed

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
        self._at_work: dict[int, TwoHosts] = {}
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
        firsts = FirstPsns(arriving, leaving)
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
        watch, unwatch = self._whom_to_watch(arriving, leaving)
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
                self._at_work[key] = TwoHosts(*entries, looks)
            else:
                waiting += 1
        return waiting

    def watched(self) -> list[Entry]:
        """Entries that were watched at the last look, and still are."""
        return self._entries_at_work(watched=True)

    def _entries_at_work(self, *, watched: bool) -> list[Entry]:
        found: list[Entry] = []
        for hosts in self._at_work.values():
            for side, arrives in ((hosts.rows, True), (hosts.columns, False)):
                chosen = (side.records["marks"] > 0) == watched
                found += [_entry(one, arrives) for one in side.records[chosen]]
        return found

    def _whom_to_watch(
        self, arriving: Records, leaving: Records
    ) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """Who is to be watched and is not, and the other way round."""
        watch = self._entries_at_work(watched=False)
        unwatch: list[Entry] = []
        for records, arrives in ((arriving, True), (leaving, False)):
            watched = records[records["marks"] > 0]
            idle = [key not in self._at_work for key in hosts_of(watched).tolist()]
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
        keys = {_key_of(pair) for pair in ended}
        now_ns = max(look.over_ns for look in looks)
        self._distrusted = {key: until for key, until in self._distrusted.items() if until > now_ns}
        for key in keys:
            self._distrusted[key] = now_ns + DISTRUST_NS
            self._at_work.pop(key, None)
        theirs = np.isin(hosts_of(arriving), np.array(list(keys), np.uint64))[near]
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


def _key_of(pair: Pair) -> int:
    words = np.frombuffer(pair.near.host + pair.far.host, np.uint64)
    return int(mixed(*(words[index : index + 1] for index in range(4)))[0])


def _partners(arriving: Records, leaving: Records) -> tuple[Numbers, Numbers]:
    """Where the entries are that name each other, in the same order."""
    near, far = np.flatnonzero(arriving["peer_qp"]), np.flatnonzero(leaving["peer_qp"])
    if not len(near) or not len(far):
        return near[:0], far[:0]
    of_near = mixed(
        hosts_of(arriving)[near],
        arriving["qp"][near].astype(np.uint64),
        arriving["peer_qp"][near].astype(np.uint64),
    )
    of_far = mixed(
        hosts_of(leaving)[far],
        leaving["peer_qp"][far].astype(np.uint64),
        leaving["qp"][far].astype(np.uint64),
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
    hosts = hosts_of(records)[at]
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
