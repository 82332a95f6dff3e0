"""The QPs of two hosts whose partners are not known: what the evidence leaves of who belongs to whom. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qpd.core.assignment import certain
from qpd.core.evidence import PROOFS, Side, contradicted_by, followed, places, read_before, still
from qpd.core.meeting import CHANCE_MAX, YOUNG, Firsts, drawn, meetings, only_each_other
from qpd.core.sighting import Bools, Look, Numbers, Records

Counts = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

RECENT_NS = 10_000_000_000
"""Who has shown nothing new for so long is at rest: it meets nobody any more, and is no stranger."""
PROGRESS = 1000
"""Where one possible partnership in so many has been ruled out, it goes on."""
AGREEMENTS = 6
"""Moves that must have agreed before a pair is stated …"""
AGREEMENTS_DOUBTED = 4 * AGREEMENTS
"""… and where QPs of the same hosts find no partner."""
STRAYS = 3
"""Strayings in a row that rule a partner out where both sides are unique …"""
STRAYS_ALONE = 12
"""… and where only one is."""
_ODD, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)


class FirstPsns:
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
    def _keys(self) -> tuple[Words, Words]:
        return hosts_of(self._both[0]), hosts_of(self._both[1])

    def between(self, one: np.void) -> Firsts:
        """Of all between the two hosts of this entry, both ways, also of those whose partner is known."""
        key = hosts_of(np.array([one]))[0]
        chosen = zip(self._both, self._keys, strict=True)
        return Firsts(np.concatenate([records["first_psn"][hosts == key] for records, hosts in chosen]))


class TwoHosts:
    """The QPs of two hosts whose partners are not known yet. Rows: those that arrive; columns: those that leave."""

    def __init__(self, arriving: Records, leaving: Records, looks: tuple[Look, Look]) -> None:
        self.rows = Side(arriving, looks[0])
        self.columns = Side(leaving, looks[1])
        shape = (len(arriving), len(leaving))
        self.contradicted: Counts = np.zeros(shape, np.uint8)
        self.strayed: Counts = np.zeros(shape, np.uint8)
        self.agreed: Counts = np.zeros(shape, np.uint8)
        self.since_ns = looks[1].over_ns
        """When it last brought a pair, or some progress, or a QP came up."""
        self._left = 0
        """Possible partnerships when it did."""
        self._found: list[tuple[int, int]] = []
        """Pairs of the last look, which are not expected in the next."""

    def observe(self, arriving: Records, leaving: Records, looks: tuple[Look, Look]) -> None:
        """Take the next look at both directions."""
        rows, columns = places(self.rows.records, arriving), places(self.columns.records, leaving)
        if (rows < 0).any() or (columns < 0).any():
            self.since_ns = looks[1].over_ns
        if not still(rows, len(self.rows.records)) or not still(columns, len(self.columns.records)):
            self.contradicted = _rearranged(self.contradicted, rows, columns)
            self.strayed = _rearranged(self.strayed, rows, columns)
            self.agreed = _rearranged(self.agreed, rows, columns)
        left_alone = self._somebody_went(rows, columns)
        self.rows.advance(arriving, looks[0], rows)
        self.columns.advance(leaving, looks[1], columns)
        if left_alone:
            # Who is at rest may have lost its partner (evicted, as the least recently used are); who is at work will be
            # seen with its own again. So what speaks for partners has to be shown anew.
            self.agreed[:] = 0
            self.rows.worked[:] = self.columns.worked[:] = 0
        self._weigh(self.rows, self.columns, transposed=False)
        self._weigh(self.columns, self.rows, transposed=True)
        left = int(np.count_nonzero(self.contradicted < PROOFS))
        if abs(left - self._left) * PROGRESS > left:
            self._left = left
            self.since_ns = looks[1].over_ns

    def _somebody_went(self, rows: Numbers, columns: Numbers) -> bool:
        """Whether an entry is missing that was there, and whose partner was not found."""
        for side, place, found in (
            (self.rows, rows, [row for row, _ in self._found]),
            (self.columns, columns, [column for _, column in self._found]),
        ):
            there = np.zeros(len(side.records), np.bool_)
            there[place[place >= 0]] = True
            there[found] = True
            if not there.all():
                return True
        return False

    def _weigh(self, answers: Side, questions: Side, *, transposed: bool) -> None:
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
        _add(contradicted, contradicted_by(answers, questions))
        pace = followed(answers, questions)
        if pace is not None:
            follows, strays = pace
            _add(agreed, follows)
            _add(strayed, strays)
            strayed[follows & ~strays] = 0

    def meet(self, firsts: FirstPsns) -> list[tuple[int, int]]:
        """Rows and columns that one look tells."""
        sides = (self.rows, self.columns)
        since_ns = min(side.look.begun_ns for side in sides) - RECENT_NS
        rows, columns = (side.changed_ns > since_ns for side in sides)
        met = only_each_other(
            meetings(read_before(self.rows, self.columns), self.columns.records, (rows, columns)),
            meetings(read_before(self.columns, self.rows), self.rows.records, (columns, rows)),
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

    def decide(self, firsts: FirstPsns, *, trusted: bool) -> list[tuple[int, int]]:
        """Rows and columns that belong together; ``trusted``: also by evidence of one side alone."""
        found = {*self._last(trusted=trusted), *(self.meet(firsts) if trusted else ())}
        rows, columns = Counter(row for row, _ in found), Counter(column for _, column in found)
        self._found = [(row, column) for row, column in sorted(found) if rows[row] == columns[column] == 1]
        return self._found

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
        rows, columns = self.rows.worked >= AGREEMENTS, self.columns.worked >= AGREEMENTS
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


def mixed(first: Words, *more: Words) -> Words:
    """One number of several: integers sort without the interpreter's lock, records do not."""
    mixed = first.copy()
    for words in more:
        mixed = (mixed ^ mixed >> _SHIFT) * _ODD ^ words
    return (mixed ^ mixed >> _SHIFT) * _ODD


def hosts_of(records: Records) -> Words:
    """One number for each two hosts."""
    local, remote = records["local"], records["remote"]
    return mixed(local[:, 0], local[:, 1], remote[:, 0], remote[:, 1])
