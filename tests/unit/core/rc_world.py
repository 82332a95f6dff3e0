"""Reliable connections between two hosts, and what a leaf between them sees: packets with delays, losses, reordering.

An end sends messages, asks for acknowledgements, goes back to the first packet that is missing after a NAK or a timeout
(InfiniBand Architecture Specification volume 1, 9.7); the other end takes packets in their order only, and answers. The
leaf keeps of each entry what the classifier keeps.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpd.core.pairing import Found, Pair, Pairing, QpName
from qpd.core.sighting import SIGHTING, Look, Records, newer

NEAR, FAR = bytes(10) + b"\xff\xff\x0a\x00\x00\x01", bytes(10) + b"\xff\xff\x0a\x00\x00\x02"
MS = 1_000_000
_MASK = 0xFFFFFF
CLASSES = 8
"""Of PSNs that are marked; the last is for those that are not."""


@dataclass
class Network:
    """What lies between a host and the leaf, and between the leaf and the far host."""

    delay_ns: tuple[int, int] = (2_000, 20_000)
    """At the near side, at the far side."""
    jitter_ns: int = 0
    """Added at random to each packet: beyond the distance of packets it puts them out of order."""
    loss: float = 0.0
    """Of each packet on each side of the leaf."""
    timeout_ns: int = 67 * MS


def _class(psn: int) -> int:
    """By how often two divides it."""
    return min((psn | 1 << 23) & -(psn | 1 << 23), 1 << CLASSES - 1).bit_length() - 1


@dataclass
class Entry:
    """One direction of a QP at the leaf."""

    qp: int
    life: int = 1
    packets: int = 0
    peer_qp: int = 0
    first_psn: int = -1
    request_psn: int = -1
    answered_psn: int = -1
    trouble: int = 0
    watched: bool = False
    asked_at: dict[int, tuple[int, int]] = field(default_factory=dict)
    answered_at: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each class the newest PSN and when it came by."""

    def request(self, psn: int, now: int) -> None:
        self.packets += 1
        if self.first_psn < 0:
            self.first_psn = psn
        if self.request_psn >= 0 and newer(psn, self.request_psn) <= 0:
            self.trouble += 1
            return
        if self.request_psn >= 0:
            # What was passed over may have been sent another way.
            for one in range(1, newer(psn, self.request_psn)):
                self.asked_at.pop(_class(self.request_psn + one & _MASK), None)
            self.asked_at[_class(psn)] = psn, now
        self.request_psn = psn

    def answer(self, psn: int, refused: bool, now: int) -> None:
        self.packets += 1
        self.trouble += refused
        if self.answered_psn < 0:
            self.answered_psn = psn
        for one in range(1, newer(psn, self.answered_psn) + 1):
            passed = self.answered_psn + one & _MASK
            self.answered_at[_class(passed)] = passed, now
        if newer(psn, self.answered_psn) > 0:
            self.answered_psn = psn

    def marks(self) -> list[list[tuple[int, int]]]:
        """As Look has them; units of 256 ns."""
        return [
            [(psn, at >> 8 & 0xFFFFFFFF) for psn, at in (seen.get(name, (-1, 0)) for name in range(CLASSES))]
            for seen in (self.asked_at, self.answered_at)
        ]


@dataclass
class Connection:
    """One QP's sending half: ``qp`` at its own host sends to ``peer`` at the other."""

    qp: int
    peer: int
    at_near: bool
    next_psn: int
    window: int = 16
    message: int = 4
    """Packets; the last asks."""
    left: int = 1 << 60
    """Packets still to send."""
    unacked: int = field(init=False)
    newest: int = field(init=False)
    """One beyond the newest PSN ever sent."""
    expected: int = field(init=False)
    """The responder's."""
    refused: bool = False
    """The responder has said so, and says it once."""
    timer: int = 0
    sending: bool = False

    def __post_init__(self) -> None:
        self.unacked = self.newest = self.expected = self.next_psn


class World:
    """Two hosts, one leaf. ``seen_ns`` is the leaf's clock."""

    def __init__(self, network: Network, seed: int, gap: Callable[[random.Random], int]) -> None:
        self.network = network
        self.random = random.Random(seed)
        self.gap = gap
        """Nanoseconds between two packets of a QP, drawn for each."""
        self.now = 1_000 * MS
        self.leaving: dict[int, Entry] = {}
        self.arriving: dict[int, Entry] = {}
        self.hidden: set[tuple[bool, int]] = set()
        """(leaves, QP): directions that pass another leaf."""
        self.truth: set[tuple[int, int]] = set()
        """(near QP, far QP)"""
        self.connections: list[Connection] = []
        self._events: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0

    # --- building ---------------------------------------------------------------------------------------------------

    def connect(
        self, near: int, far: int, psn: int, *, both_ways: bool = False, near_sends: bool = True, **how: Any
    ) -> None:
        self.truth.add((near, far))
        if near_sends or both_ways:
            self._start(Connection(near, far, True, psn, **how))
        if both_ways or not near_sends:
            self._start(Connection(far, near, False, psn, **how))

    def _start(self, connection: Connection) -> None:
        self.connections.append(connection)
        self._kick(connection)

    # --- time -------------------------------------------------------------------------------------------------------

    def at(self, when: int, act: Callable[..., None], *arguments: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, act, arguments))

    def run_until(self, when: int) -> None:
        while self._events and self._events[0][0] <= when:
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self.now = when

    # --- packets ----------------------------------------------------------------------------------------------------

    def _travel(self, from_near: bool, seen: Callable[[], None], came: Callable[[], None]) -> None:
        """A packet on its way past the leaf; each side may lose or delay it."""
        first, second = self.network.delay_ns if from_near else self.network.delay_ns[::-1]
        if self.random.random() < self.network.loss:
            return
        jitter = self.network.jitter_ns
        leaf_at = self.now + first + (self.random.randrange(jitter) if jitter else 0)

        def at_leaf() -> None:
            seen()
            if self.random.random() >= self.network.loss:
                self.at(self.now + second + (self.random.randrange(jitter) if jitter else 0), came)

        self.at(leaf_at, at_leaf)

    def _entry(self, qp: int, leaves: bool) -> Entry:
        if (leaves, qp) in self.hidden:
            return Entry(qp)
        entries = self.leaving if leaves else self.arriving
        return entries.setdefault(qp, Entry(qp, life=self.now))

    def _kick(self, one: Connection) -> None:
        if not one.sending:
            one.sending = True
            self.at(self.now + self.gap(self.random), self._send, one)

    def _send(self, one: Connection) -> None:
        one.sending = False
        if one.left == 0 and one.next_psn == one.newest:
            return
        if newer(one.next_psn, one.unacked) >= one.window:
            return
        psn = one.next_psn
        one.next_psn = psn + 1 & _MASK
        if newer(one.next_psn, one.newest) > 0:
            one.newest = one.next_psn
            one.left -= 1
        asks = psn % one.message == one.message - 1 or newer(one.next_psn, one.unacked) >= one.window
        asks = asks or one.left == 0
        if asks and one.timer == 0:
            one.timer = self.now
            self.at(self.now + self.network.timeout_ns, self._timeout, one, self.now)
        self._travel(
            one.at_near,
            lambda: self._entry(one.peer, one.at_near).request(psn, self.now),
            lambda: self._receive(one, psn, asks),
        )
        self._kick(one)

    def _receive(self, one: Connection, psn: int, asks: bool) -> None:
        ahead = newer(psn, one.expected)
        if ahead == 0:
            one.expected = psn + 1 & _MASK
            one.refused = False
        elif ahead > 0:
            if not one.refused:
                one.refused = True
                self._answer(one, one.expected - 1 & _MASK, True)
            return
        if asks:
            self._answer(one, one.expected - 1 & _MASK, False)

    def _answer(self, one: Connection, psn: int, refused: bool) -> None:
        self._travel(
            not one.at_near,
            lambda: self._entry(one.qp, not one.at_near).answer(psn, refused, self.now),
            lambda: self._acknowledged(one, psn, refused),
        )

    def _acknowledged(self, one: Connection, psn: int, refused: bool) -> None:
        if newer(psn, one.unacked) >= 0:
            one.unacked = psn + 1 & _MASK
            if newer(one.next_psn, one.unacked) < 0:
                one.next_psn = one.unacked
            one.timer = 0
            if newer(one.newest, one.unacked) > 0:
                one.timer = self.now
                self.at(self.now + self.network.timeout_ns, self._timeout, one, self.now)
        if refused:
            one.next_psn = one.unacked
        self._kick(one)

    def _timeout(self, one: Connection, since: int) -> None:
        if one.timer != since:
            return
        one.timer = 0
        one.next_psn = one.unacked
        self._kick(one)

    # --- the leaf ---------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """As if the programs were attached only now: entries begin amid traffic."""
        self.leaving.clear()
        self.arriving.clear()

    def tell(self, found: Found) -> None:
        """What the kernel is told."""
        for entries, watched in ((found.unwatch, False), (found.watch, True)):
            for one in entries:
                entry = (self.arriving if one.arrives else self.leaving)[one.name.qp]
                entry.watched = watched
                entry.asked_at.clear()
                entry.answered_at.clear()
        for pair in found.stated:
            self.arriving[pair.near.qp].peer_qp = pair.far.qp
            self.leaving[pair.far.qp].peer_qp = pair.near.qp
            self.arriving[pair.near.qp].watched = self.leaving[pair.far.qp].watched = False
        for pair in found.ended:
            self.arriving[pair.near.qp].peer_qp = self.leaving[pair.far.qp].peer_qp = 0
        for half in found.halves:
            (self.arriving if half.arrives else self.leaving)[half.name.qp].peer_qp = 0

    def watch(
        self, pairing: Pairing, seconds: float, every_ns: int = 50 * MS, read_ns: int = MS
    ) -> list[tuple[int, Pair]]:
        """Look again and again; gives what was stated and when. ``read_ns``: what reading one map takes."""
        stated = []
        end = self.now + int(seconds * 1e9)
        arriving_first = True
        while self.now < end:
            self.run_until(self.now + every_ns)
            looks: dict[bool, Look] = {}
            seen: dict[bool, Records] = {}
            for arrives in (arriving_first, not arriving_first):
                begun = self.now
                # Entries are read one by one: those that are read last may show what came in the meantime.
                entries = self.arriving if arrives else self.leaving
                early, marks = _records({qp: entry for qp, entry in entries.items() if qp % 2})
                self.run_until(begun + read_ns)
                late, more = _records({qp: entry for qp, entry in entries.items() if not qp % 2})
                late["marks"][late["marks"] > 0] += len(early)
                seen[arrives] = np.concatenate((early, late))
                both = np.array([[[(-1, 0)] * CLASSES] * 2, *marks, *more])
                psns, times = both[..., 0].astype(np.int32), both[..., 1].astype(np.uint32)
                looks[arrives] = Look(begun, self.now, psns, times)
            arriving_first = not arriving_first
            found = pairing.observe(seen[True], seen[False], (looks[True], looks[False]))
            stated += [(self.now, pair) for pair in found.stated]
            self.tell(found)
        return stated


def names(pair: Pair) -> tuple[int, int]:
    """Its QPs' numbers, near and far."""
    assert pair.near == QpName(100, NEAR, pair.near.qp)
    assert pair.far == QpName(100, FAR, pair.far.qp)
    return pair.near.qp, pair.far.qp


def _records(entries: dict[int, Entry]) -> tuple[Records, list[list[list[tuple[int, int]]]]]:
    records = np.zeros(len(entries), SIGHTING)
    records["local"] = np.frombuffer(NEAR, np.uint64)
    records["remote"] = np.frombuffer(FAR, np.uint64)
    records["vni"] = 100
    for name in (
        "qp",
        "life",
        "packets",
        "peer_qp",
        "first_psn",
        "request_psn",
        "answered_psn",
        "trouble",
    ):
        records[name] = [getattr(entry, name) for entry in entries.values()]
    records["marks"] = [entry.watched * (1 + index) for index, entry in enumerate(entries.values())]
    return records, [entry.marks() for entry in entries.values()]
