"""One rank at work on a schedule: what it sends when, and what it does with what arrives. Pure but for its memory.

A rank's memory holds the vector, and behind it a place for each transfer that is to be added. Nobody tells anybody
that a place is free again: a rank begins an iteration only when it has the last one's sum, and that holds what
everybody added. So whatever it sends then finds its place used up. (tests/unit/lab/test_workload.py tries it in every
order.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qpd.lab.workload.schedule import Schedule
from qpd.lab.workload.values import ELEMENT

_ALIGNMENT = 64
_TRANSFER_BITS = 20
"""Of the immediate data; the other bits are the iteration's."""
_ITERATIONS = 1 << (32 - _TRANSFER_BITS)


@dataclass(frozen=True)
class Layout:
    """Where a rank's memory has what, in bytes."""

    places: dict[int, int]
    """By transfer: where what is to be added arrives."""
    size: int


def layout(schedule: Schedule, rank: int) -> Layout:
    """The layout of a rank's memory: every other rank knows it, too, and writes there."""
    places = {}
    end = -(-schedule.elements * ELEMENT // _ALIGNMENT) * _ALIGNMENT
    for index, transfer in enumerate(schedule.transfers):
        if transfer.destination == rank and transfer.reduce:
            places[index] = end
            end += -(-(transfer.end - transfer.begin) * ELEMENT // _ALIGNMENT) * _ALIGNMENT
    return Layout(places, end)


@dataclass(frozen=True)
class Posting:
    """A message to send: bytes of this rank's memory, and where they go in the destination's."""

    destination: int
    source: int
    length: int
    address: int
    immediate: int


@dataclass
class PhaseTimes:
    """When a rank began and ended with a phase: its first posting or arrival, its last arrival or acknowledgement."""

    begin_ns: int = 0
    end_ns: int = 0


@dataclass
class Rank:
    """One rank.

    Args:
        schedule: of an iteration.
        rank: which one.
        memory: as `layout` has it.
        message: the most bytes of a message.
    """

    schedule: Schedule
    rank: int
    memory: npt.NDArray[np.uint8]
    message: int
    iteration: int = -1
    phases: list[PhaseTimes] = field(default_factory=list)
    """Of the present iteration."""
    _missing: dict[int, int] = field(default_factory=dict)
    """Bytes of each transfer to this rank that have not arrived."""
    _unsent: dict[int, int] = field(default_factory=dict)
    """Bytes of each transfer from this rank that are not acknowledged."""
    _waits: dict[int, int] = field(default_factory=dict)
    """How many transfers each one from this rank still waits for."""
    _early: list[tuple[int, int, int]] = field(default_factory=list)
    """What arrived for the next iteration before it began here."""

    def __post_init__(self) -> None:
        self._layouts = {self.rank: layout(self.schedule, self.rank)}
        self._layout = self._layouts[self.rank]
        if len(self.memory) < self._layout.size:
            raise ValueError(f"{len(self.memory)} bytes of memory, {self._layout.size} are needed")
        if len(self.schedule.transfers) >> _TRANSFER_BITS:
            raise ValueError(f"{len(self.schedule.transfers)} transfers do not fit in the immediate data")
        self._words = self.memory[: self._layout.size].view(np.uint32)
        self._followers: dict[int, list[int]] = {}
        for index, transfer in enumerate(self.schedule.transfers):
            if transfer.source == self.rank:
                for before in self.schedule.after[index]:
                    self._followers.setdefault(before, []).append(index)

    @property
    def vector(self) -> npt.NDArray[np.uint32]:
        """The vector: what the rank brings, later the sum."""
        return self._words[: self.schedule.elements]

    @property
    def done(self) -> bool:
        """All has arrived, and all that was sent is acknowledged."""
        return not self._missing and not self._unsent

    def begin(self, now_ns: int) -> list[Posting]:
        """Begin the next iteration with what the vector holds; returns what is to be sent."""
        assert self.done, "an iteration begins when the last one has ended"
        self.iteration += 1
        self.phases = [PhaseTimes() for _ in self.schedule.phases]
        postings = []
        for index, transfer in enumerate(self.schedule.transfers):
            size = (transfer.end - transfer.begin) * ELEMENT
            if transfer.destination == self.rank:
                self._missing[index] = size
            if transfer.source == self.rank:
                self._unsent[index] = size
                self._waits[index] = len(self.schedule.after[index])
                if not self._waits[index]:
                    postings += self._post(index, now_ns)
        early, self._early = self._early, []
        for immediate, address, length in early:
            postings += self.arrived(immediate, address, length, now_ns)
        return postings

    def arrived(self, immediate: int, address: int, length: int, now_ns: int) -> list[Posting]:
        """A message has arrived at `address`; returns what is to be sent now."""
        index, iteration = immediate >> (32 - _TRANSFER_BITS), immediate % _ITERATIONS
        if iteration != self.iteration % _ITERATIONS:
            self._early.append((immediate, address, length))
            return []
        transfer = self.schedule.transfers[index]
        if transfer.reduce:
            source = address // ELEMENT
            target = transfer.begin + (address - self._layout.places[index]) // ELEMENT
            count = length // ELEMENT
            sums = self._words[target : target + count]
            np.add(sums, self._words[source : source + count], out=sums)
        self._time(transfer.phase, now_ns)
        self._missing[index] -= length
        if self._missing[index]:
            return []
        del self._missing[index]
        postings = []
        for follower in self._followers.get(index, []):
            self._waits[follower] -= 1
            if not self._waits[follower]:
                postings += self._post(follower, now_ns)
        return postings

    def acknowledged(self, immediate: int, length: int, now_ns: int) -> None:
        """A message that this rank sent has arrived."""
        index = immediate >> (32 - _TRANSFER_BITS)
        self._time(self.schedule.transfers[index].phase, now_ns)
        self._unsent[index] -= length
        if not self._unsent[index]:
            del self._unsent[index]

    def _time(self, phase: int, now_ns: int) -> None:
        times = self.phases[phase]
        times.begin_ns = times.begin_ns or now_ns
        times.end_ns = now_ns

    def _peer(self, rank: int) -> Layout:
        if rank not in self._layouts:
            self._layouts[rank] = layout(self.schedule, rank)
        return self._layouts[rank]

    def _post(self, index: int, now_ns: int) -> list[Posting]:
        transfer = self.schedule.transfers[index]
        self._time(transfer.phase, now_ns)
        begin, end = transfer.begin * ELEMENT, transfer.end * ELEMENT
        address = self._peer(transfer.destination).places[index] if transfer.reduce else begin
        immediate = index << (32 - _TRANSFER_BITS) | self.iteration % _ITERATIONS
        return [
            Posting(
                transfer.destination,
                place,
                min(self.message, end - place),
                address + place - begin,
                immediate,
            )
            for place in range(begin, end, self.message)
        ]
